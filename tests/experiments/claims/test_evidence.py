"""What an experiment leaves: verdicts, tables, pages; and hostile or damaged files."""

import csv
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from norm_matters.core.errors import UserError
from norm_matters.experiments.claims import evidence as room
from norm_matters.experiments.claims import figures
from norm_matters.experiments.claims.decide import WITHIN, WORSE, compare, verdict
from norm_matters.experiments.claims.pages import write_index, write_page
from norm_matters.experiments.claims.performing import perform
from norm_matters.experiments.claims.planning import ExperimentPlan, plan_experiment
from norm_matters.experiments.claims.recipe import Arm, Claim, PaperCurve, Recipe, Scale, Table

HOSTILE = "<script>alert(1)</script>"
ERRORS = {"l2": ([50.0, 20.0], [50.0, 21.0], [50.0, 22.0]), "l1": ([50.0, 20.1], [50.0, 21.0], [50.0, 21.9])}


def recipe(**options: Any) -> Recipe:
    claim = Claim(
        "X-1",
        f"L1 is {HOSTILE}.",
        "nothing",
        "the interval is inside",
        ("l1", "l2"),
        lambda each: verdict("X-1", [compare(each, "l1", "l2")], holds=WITHIN, fails=WORSE),
    )
    return Recipe(
        "example",
        "Is it so?",
        (claim,),
        {"smoke": Scale({"train.epochs": 2, "device": "cpu"}, 3, "digits", "A small one.")},
        (Arm("l2", HOSTILE, {"model.norm": "l2"}), Arm("l1", "", {"model.norm": "l1"})),
        "l2",
        paper_curves={"l1": PaperCurve("lp_norms_imagenet_error", "R18_L1", "L1")},
        **options,
    )


@pytest.fixture
def plan(tmp_path: Path, make_run: Callable[..., Path]) -> ExperimentPlan:
    """An experiment whose runs are done."""
    found = plan_experiment(recipe(diverged=15.0), "smoke", output=tmp_path / "out")
    for member in found.comparing():
        make_run(found.runs, member.cell, ERRORS[member.arm][member.seed])
    return found


def written(plan: ExperimentPlan, **options: Any) -> dict[str, Any]:
    found = room.gather(plan, **options)
    room.write_verdicts(plan, found, room.judge(found), {"command": ["x"]})
    return json.loads((plan.folder / "X-1" / "verdict.json").read_text())


def test_a_verdict_tells_all_that_is_needed(plan: ExperimentPlan) -> None:
    document = written(plan)
    assert {"claim", "verdict", "statistics", "seeds", "scale", "provenance"} <= set(document)
    assert (document["claim"], document["scale"], document["seeds"]) == ("X-1", "smoke", [0, 1, 2])
    assert (document["verdict"], document["holds"]) == ("equal", True)
    (found,) = document["statistics"]
    assert (found["what"], found["n"], found["margin"]) == ("l1 less l2", 3, 0.5)
    assert found["estimate"] == pytest.approx(0.0)
    assert found["low"] < 0 < found["high"]
    assert room.read_verdicts(plan.output) == [document]


def test_what_is_not_run_has_a_verdict_too(tmp_path: Path) -> None:
    document = written(plan_experiment(recipe(), "smoke", output=tmp_path))
    assert (document["verdict"], document["holds"], document["statistics"]) == ("not run", None, [])


def test_runs_of_all_epochs_are_kept(plan: ExperimentPlan) -> None:
    written(plan)
    with (plan.folder / "runs.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 12
    assert rows[1] | {"arm": "l2", "seed": "0", "state": "done", "epoch": "2", "val_error1": "20.0"} == rows[1]


def test_a_run_below_the_recipes_accuracy_has_diverged(tmp_path: Path, make_run: Callable[..., Path]) -> None:
    plan = plan_experiment(recipe(diverged=15.0), "smoke", output=tmp_path)
    errors = {"l2": [20.0, 84.0], "l1": [20.0, 86.0]}
    for member in plan.comparing():
        make_run(plan.runs, member.cell, errors[member.arm])
    found = room.gather(plan)
    assert set(found.diverged("l1").values()) == {True}
    assert set(found.diverged("l2").values()) == {False}
    assert found.accuracy("l1")[0] == 14  # it has come to its end, and counts
    assert found.lost("l1") == []


def test_a_run_that_stopped_on_its_numbers_has_no_accuracy(tmp_path: Path, make_run: Callable[..., Path]) -> None:
    plan = plan_experiment(recipe(), "smoke", output=tmp_path)
    folder = make_run(plan.runs, plan.comparing()[0].cell, [20.0])
    (folder / "log.txt").write_text("x stopped: NumericalError: the loss is not finite")
    found = room.gather(plan)
    assert (found.diverged("l2"), found.accuracy("l2"), found.lost("l2")) == ({0: True}, {}, [0])


def test_arms_of_earlier_sittings_count(plan: ExperimentPlan) -> None:
    later = plan_experiment(plan.recipe, "smoke", output=plan.output, arms=["l1"])
    assert [arm.name for arm in later.arms] == ["l1"]
    result = perform(later)
    assert result.verdicts[0].word == "equal"
    assert "3 done" in result.page.read_text()


def test_numbers_that_json_has_not(plan: ExperimentPlan) -> None:
    room.write_verdicts(plan, room.gather(plan), room.judge(room.gather(plan)), {"a": math.nan, "b": [math.inf]})
    document = json.loads((plan.folder / "X-1" / "verdict.json").read_text())
    assert document["provenance"] == {"a": None, "b": ["inf"]}


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": 99}', '{"format": 1}', "[" * 100_000])
def test_a_damaged_verdict_is_named(content: str, plan: ExperimentPlan) -> None:
    written(plan)
    file = plan.folder / "X-1" / "verdict.json"
    file.write_text(content)
    with pytest.raises(UserError, match=str(file)):
        write_index(plan.output)


def test_the_page_shows_words_curves_and_the_paper(plan: ExperimentPlan) -> None:
    found = room.gather(plan, tables=[Table("numbers", "Some numbers", [{"a": HOSTILE}], "A note.")])
    page = write_page(plan, found, room.judge(found), {"command": [HOSTILE]}, {"l2-s0": HOSTILE})
    text = page.read_text()
    assert HOSTILE not in text
    assert text.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 4  # claim, arm, table, failed run
    paper = ("What differs from the paper", "The paper&#x27;s figure", "NeurIPS 2018 poster")
    ours = ("Is it so?", "equal", "L1 and l2 are equal", "A small one.", "Some numbers", "3 done", "0.5 points")
    for words in (*paper, *ours):
        assert words in text, words


@pytest.mark.parametrize(
    "entry", ["experiment", "claim", "verdict", "holds", "sentence", "scale", "statistics", "seeds"]
)
def test_a_verdict_with_an_entry_of_another_kind_is_named(entry: str, plan: ExperimentPlan) -> None:
    document = written(plan)
    file = plan.folder / "X-1" / "verdict.json"
    file.write_text(json.dumps({**document, entry: 3}))
    with pytest.raises(UserError, match=f"{file}: no verdict: it has no valid {entry}"):
        write_index(plan.output)


def test_the_index_names_what_was_not_run(plan: ExperimentPlan) -> None:
    text = write_index(plan.output).read_text()
    assert "Not run yet" in text
    assert "Do L1, Linf and Top(10) batch norm do as well as L2" in text


def test_the_index_links_every_page(plan: ExperimentPlan) -> None:
    written(plan)
    text = write_index(plan.output).read_text()
    assert 'href="example-smoke.html"' in text
    assert "seeds: 0, 1, 2" in text
    assert HOSTILE not in text


def test_a_test_that_two_claims_look_at_is_one_row(plan: ExperimentPlan) -> None:
    found = room.gather(plan)
    claims = tuple(replace(plan.recipe.claims[0], id=name) for name in ("X-1", "X-2"))
    twice = replace(plan, recipe=replace(plan.recipe, claims=claims))
    verdicts = [replace(room.judge(found)[0], claim=name) for name in ("X-1", "X-2")]
    text = write_page(twice, found, verdicts, {}, {}).read_text()
    assert text.count(">X-1, X-2</t") == 1
    assert ">X-1</t" not in text


def test_an_empty_folder_has_an_index_that_says_so(tmp_path: Path) -> None:
    assert "No experiment has been run yet." in write_index(tmp_path).read_text()


def test_the_papers_curves() -> None:
    epochs, accuracy = figures.paper_curve(PaperCurve("weight_decay_vgg11_cifar10_test_accuracy", "wd_on", ""))
    late = accuracy[(epochs >= 61) & (epochs <= 80)]
    assert late.mean() == pytest.approx(90.53, abs=0.02)
    epochs, accuracy = figures.paper_curve(PaperCurve("l1_constant_imagenet_error", "one", ""))
    assert epochs[0] == 1
    assert 100 - accuracy[-10:].mean() == pytest.approx(33.9, abs=0.15)
    assert "NeurIPS 2018 poster" in figures.source()
