"""From recipes to runs: names, pairs, order, what is chosen, and what is refused."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from norm_matters.core.config import load_config
from norm_matters.core.errors import UserError
from norm_matters.experiments.claims import RECIPES
from norm_matters.experiments.claims.performing import PILOT_SEEDS, pilot_of
from norm_matters.experiments.claims.phases import phase_products
from norm_matters.experiments.claims.planning import (
    ExperimentPlan,
    checked,
    has_diverged,
    plan_experiment,
    with_folders,
)
from norm_matters.experiments.claims.recipe import Arm, Choice, Recipe, Scale
from norm_matters.experiments.pace import Pace
from norm_matters.run import prepare

SIZE = {"train.epochs": 1, "data.batch_size": 256, "device": "cpu", "data.workers": 0}
RECORDED = Arm("on", "records", {"model.norm": "l2"})
REPLAYED = Arm("replayed", "replays", {"model.norm": "l1", "name": "{on}"}, after=("on",))


def example(arms: tuple[Arm, ...] = (RECORDED, REPLAYED), choice: Choice | None = None) -> Recipe:
    return Recipe("example", "?", (), {"smoke": Scale(SIZE, 2, "digits", "", choice=choice)}, arms, arms[0].name)


def planned(tmp_path: Path, recipe: Recipe, **options: Any) -> ExperimentPlan:
    return plan_experiment(recipe, "smoke", output=tmp_path, **options)


@pytest.mark.parametrize("name", RECIPES.names())
@pytest.mark.parametrize("scale", ["smoke", "small", "paper"])
def test_every_recipe_gives_configurations_that_are_valid(name: str, scale: str, tmp_path: Path) -> None:
    recipe = RECIPES.get(name)
    plan = plan_experiment(recipe, scale, output=tmp_path, seeds=2)
    members = [*plan.choosing(), *plan.comparing()]
    names = [member.cell.name for member in members]
    assert len(set(names)) == len(names)
    assert all(member.cell.config.seed in (0, 1) for member in plan.comparing())
    # Another arm is another configuration, or it would be the same run twice.
    first = [member.cell.config.model_dump_json() for member in plan.comparing() if member.seed == 0]
    assert len(set(first)) == len(first)
    assert recipe.scale(scale).about
    for claim in recipe.claims:
        assert claim.statement.endswith(".")
        assert claim.rule


@pytest.mark.parametrize("name", [name for name in RECIPES.names() if RECIPES.get(name).arms])
def test_a_pilot_is_of_two_arms_that_a_claim_compares(name: str, tmp_path: Path) -> None:
    recipe = RECIPES.get(name)
    pilot = pilot_of(plan_experiment(recipe, "small", output=tmp_path))
    base, other = (arm.name for arm in pilot.arms)
    assert base == recipe.baseline
    assert any({base, other} <= set(claim.arms) for claim in recipe.claims)
    assert {member.seed for member in pilot.comparing()} == set(PILOT_SEEDS)


def test_a_pilot_needs_the_baseline(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--pilot: lp has no two arms to compare"):
        pilot_of(plan_experiment(RECIPES.get("lp"), "smoke", output=tmp_path, arms=["l1"]))


def test_verdicts_are_about_the_seeds_of_earlier_sittings_too(tmp_path: Path) -> None:
    plan = planned(tmp_path, example((RECORDED, Arm("other", ""))), seeds=2)
    for name in ("on-s0", "on-s4", "other-s7", "on-s2000", "choice-on-0-s1000", "strange-s3"):
        (plan.runs / name).mkdir(parents=True)
    assert plan.whole().seeds == [0, 1, 4, 7]
    assert plan.seeds == range(2)


def test_simulated_formats_have_a_pace_of_their_own() -> None:
    def config(norm: str) -> Any:
        return load_config(options={"model.name": "vgg11", "model.norm": norm, "train.epochs": 3})

    pace = Pace()
    pace.add(config("l2"), [{"seconds": 10.0}])
    assert pace.of(config("l1")) == 10
    assert pace.of(config("l1:stats_format=fp16,accumulator=fp32")) is None
    pace.add(config("l2:stats_format=fp16,accumulator=fp32"), [{"seconds": 30.0}])
    assert pace.of(config("l1:stats_format=fp16,accumulator=pairwise")) == 30


def test_runs_are_named_by_arm_and_seed_whatever_else_is_run(tmp_path: Path) -> None:
    plan = planned(tmp_path, example((RECORDED, Arm("other", "", {"model.norm": "l1"}))))
    assert [member.cell.name for member in plan.comparing()] == ["on-s0", "on-s1", "other-s0", "other-s1"]
    alone = planned(tmp_path, plan.recipe, arms=["other"], seeds=3)
    assert [member.cell.name for member in alone.comparing()] == ["other-s0", "other-s1", "other-s2"]
    assert alone.comparing()[0].cell == plan.comparing()[2].cell


def test_an_arm_brings_those_it_comes_after_and_names_their_folders(tmp_path: Path) -> None:
    recipe = example((RECORDED, replace(REPLAYED, overrides={"model.norm": "l1", "data.dir": "{on}/{seed}"})))
    plan = planned(tmp_path, recipe, arms=["replayed"])
    assert [arm.name for arm in plan.arms] == ["on", "replayed"]
    last = plan.comparing()[-1]
    assert last.after == ("on-s1",)
    assert last.cell.config.data.dir == f"{tmp_path.resolve()}/runs/example-smoke/on-s1/{{seed}}"


def test_folders_are_named_however_deep() -> None:
    found = with_folders([{"a": ["{on}/x", 3, None]}, "{off}"], {"on": "/r"})
    assert found == [{"a": ["/r/x", 3, None]}, "{off}"]


def test_seeds_pair_weights_order_and_augmentation(tmp_path: Path) -> None:
    recipe = example(
        (RECORDED, Arm("l1", "", {"model.norm": "l1"}), Arm("bounded", "", {"model.weight_norm": "bounded"}))
    )
    plans = [prepare(member.cell.config) for member in planned(tmp_path, recipe).comparing()]
    same, other = (plans[0], plans[2], plans[4]), plans[1]

    def weights(plan: Any) -> list[torch.Tensor]:
        return [parameter for parameter in plan.built.module.parameters() if parameter.ndim == 4]

    def batch(plan: Any) -> torch.Tensor:
        return next(iter(plan.train.epoch(3)))[0]

    for plan in same[1:]:
        assert all(map(torch.equal, weights(plan), weights(same[0])))
        assert np.array_equal(plan.train.order(3), same[0].train.order(3))
        assert torch.equal(batch(plan), batch(same[0]))
    assert not torch.equal(weights(other)[0], weights(same[0])[0])
    assert not np.array_equal(other.train.order(3), same[0].train.order(3))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"arms": ["onn"]}, "--arms: example has no 'onn'; did you mean 'on'\\?; it has on, replayed"),
        ({"seeds": 1}, "--seeds: value 1 is not valid"),
    ],
)
def test_mistakes(options: dict[str, Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=words):
        planned(tmp_path, example(), **options)


def test_an_unknown_scale_is_told_with_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--scale: example has no 'smok'; did you mean 'smoke'"):
        plan_experiment(example(), "smok", output=tmp_path)


def test_a_folder_with_other_settings_is_refused(tmp_path: Path, make_run: Callable[..., Path]) -> None:
    plan = planned(tmp_path, example((RECORDED,)))
    make_run(plan.runs, plan.comparing()[0].cell, [30.0])
    assert planned(tmp_path, example((RECORDED,))).standings(plan.comparing())[0].status == "done"
    with pytest.raises(UserError, match=r"model.norm: the run in .*on-s0' has l2, not l1"):
        planned(tmp_path, example((replace(RECORDED, overrides={"model.norm": "l1"}),)))


def test_what_diverged_has_ended(tmp_path: Path, make_run: Callable[..., Path]) -> None:
    plan = planned(tmp_path, example((replace(RECORDED, overrides={"train.epochs": 3}),)))
    folder = make_run(plan.runs, plan.comparing()[0].cell, [30.0])
    assert plan.standings(plan.comparing())[0].status == "cut off"
    (folder / "log.txt").write_text("a\nb stopped: NumericalError: the loss is not finite\n")
    assert has_diverged(folder)
    assert plan.standings(plan.comparing())[0].status == "failed"
    with (folder / "log.txt").open("a") as log:
        log.write("c warning: no report: the disk is full; 'norm-matters report x' tries again\n")
    assert has_diverged(folder), "that it has no page does not change how it ended"
    (folder / "log.txt").write_text("stopped: NumericalError: once\ndone\n")
    assert not has_diverged(folder)


def test_the_choice_is_made_on_held_out_images_by_seeds_of_its_own(
    tmp_path: Path, make_run: Callable[..., Path]
) -> None:
    choice = Choice("regime.lr", (0.1, 0.2, 0.3), holdout=0.25, seeds=(50, 51))
    plan = planned(tmp_path, example((replace(RECORDED, overrides={"regime.name": "constant"}),), choice))
    trials = plan.choosing()
    assert {member.cell.config.data.holdout for member in trials} == {0.25}
    assert {member.seed for member in trials} == {50, 51}
    errors = {0.1: (40.0, 20.0), 0.2: (25.0, 25.0), 0.3: (10.0, 60.0)}
    assert plan.chosen() == {}
    for member in trials:
        make_run(plan.runs, member.cell, [errors[member.candidate][member.seed - 50]])
    assert plan.chosen() == {"on": 0.2}  # the best mean, not the best run
    compared = plan.comparing(plan.chosen())
    assert {member.cell.config.regime.lr for member in compared} == {0.2}
    assert {member.cell.config.data.holdout for member in compared} == {None}


def test_the_product_of_the_papers_phases() -> None:
    settings = {"train.epochs": 80, "regime.name": "vgg-cifar", "data.batch_size": 128}
    products = phase_products(checked(settings), steps_per_epoch=390)
    assert [each.epoch for each in products] == [0, 20, 40, 60]
    assert [each.product for each in products] == pytest.approx([7.8, 0.78, 0.078, 0.0078])
    assert products[0].momentum == 0.9


def test_wd_keeps_the_papers_product_at_small_scale(tmp_path: Path) -> None:
    plan = plan_experiment(RECIPES.get("wd"), "small", output=tmp_path, seeds=2)
    first = next(member.cell.config for member in plan.comparing() if member.arm == "on")
    assert phase_products(first, steps_per_epoch=390)[0].product == pytest.approx(7.8, rel=0.01)
