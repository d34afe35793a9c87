"""What is published of an experiment, and what becomes of it when another machine publishes further runs."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from norm_matters.core.errors import StorageError, UserError
from norm_matters.experiments.claims import published as room
from norm_matters.experiments.claims.decide import WITHIN, WORSE, compare, verdict
from norm_matters.experiments.claims.evidence import gather, judge, write_verdicts
from norm_matters.experiments.claims.performing import Result, perform
from norm_matters.experiments.claims.planning import ExperimentPlan, plan_experiment
from norm_matters.experiments.claims.recipe import Arm, Choice, Claim, Evidence, Recipe, Scale, Table

ERRORS = {"l2": [20.0, 21.0, 22.0], "l1": [20.1, 21.0, 21.9], "topk": [30.0, 31.0, 32.0]}


def _look(evidence: Evidence) -> list[Table]:
    """A table that needs the folders of the runs, and one that needs their rows only."""
    folders = {
        arm: [run for run in runs.values() if (run.folder / "config.yaml").is_file()]
        for arm, runs in evidence.runs.items()
    }
    rows = [{"arm": arm, "runs": len(found), "share": len(found) / 3} for arm, found in folders.items() if found]
    counts = [{"arm": arm, "ended": len(evidence.diverged(arm))} for arm in evidence.runs]
    return [Table("folders", "Folders", rows), Table("counts", "Counts", counts)]


def recipe(choice: Choice | None = None, **config: Any) -> Recipe:
    def claim(name: str, arm: str) -> Claim:
        return Claim(
            name,
            "It is so.",
            "",
            "the interval is inside",
            ("l2", arm),
            lambda each: verdict(name, [compare(each, arm, "l2")], holds=WITHIN, fails=WORSE),
        )

    return Recipe(
        "example",
        "Is it so?",
        (claim("X-1", "l1"), claim("X-2", "topk")),
        {"smoke": Scale({"train.epochs": 2, "device": "cpu", **config}, 3, "digits", "A small one.", choice=choice)},
        tuple(Arm(name, "", {"model.norm": name}) for name in ERRORS),
        "l2",
        look=_look,
    )


@pytest.fixture
def sitting(tmp_path: Path, make_run: Callable[..., Path]) -> Callable[..., ExperimentPlan]:
    """A function that makes the plan of a machine of its own, whose runs of these arms are done."""

    def make(machine: str, arms: Sequence[str], more: float = 0.0, seeds: int = 3, **config: Any) -> ExperimentPlan:
        plan = plan_experiment(recipe(**config), "smoke", output=tmp_path / machine, arms=arms, seeds=seeds)
        for member in [*plan.choosing(), *plan.comparing()]:
            error = ERRORS[member.arm][member.seed] if member.candidate is None else 20.0
            folder = make_run(plan.runs, member.cell, [50.0, error + more])
            facts = {"package": {"commit": machine}, "versions": {}, "machine": {}}
            (folder / "provenance.json").write_text(json.dumps(facts))
        return plan

    return make


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """Where everything is published."""
    return tmp_path / "results"


def documents(target: Path) -> dict[str, dict[str, Any]]:
    """Claim -> verdict.json."""
    return {path.parent.name: json.loads(path.read_text()) for path in (target / "example-smoke").glob("*/*.json")}


def published(plan: ExperimentPlan, target: Path, *command: str) -> Result:
    """Publish what a machine has run, whose run folders are gone afterwards."""
    result = perform(plan, command=command, publish_to=target)
    shutil.rmtree(plan.output)
    return result


def test_only_verdicts_and_tables_are_published(sitting: Callable[..., ExperimentPlan], tmp_path: Path) -> None:
    plan = sitting("a", ["l2", "l1"])
    found = gather(plan, [Table("numbers", "Numbers", [{"a": 1, "b": 2.5}])])
    write_verdicts(plan, found, judge(found), {"command": ["x"]})
    (plan.folder / "other.txt").write_text("x")
    folder = room.publish(plan, tmp_path / "results")
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    assert names == ["X-1/verdict.json", "X-2/verdict.json", "numbers.csv", "runs.csv", "setup.json"]
    assert (folder / "numbers.csv").read_text() == "a,b\n1,2.5\n"


def test_what_was_published_is_judged_as_the_runs_were(
    sitting: Callable[..., ExperimentPlan], make_run: Callable[..., Path]
) -> None:
    plan = sitting("a", ["l2", "l1"])
    other = plan_experiment(plan.recipe, "smoke", output=plan.output, seeds=4, arms=["l2", "l1"])
    for member in other.comparing():
        if member.seed == 3:  # both have stopped, one of them in its first epoch
            folder = make_run(other.runs, member.cell, [20.0] if member.arm == "l1" else [])
            (folder / "log.txt").write_text("x stopped: NumericalError: the loss is not finite")
    evidence = gather(other)
    write_verdicts(other, evidence, judge(evidence), {"command": ["x"]})
    path = other.folder / "X-1" / "verdict.json"
    document = json.loads(path.read_text())
    assert "1 of 4 runs of l1 and 1 of 4 runs of l2 stopped" in document["sentence"]
    found = room.read_evidence(plan.recipe, "smoke", other.folder)
    assert found.diverged("l2") == {0: False, 1: False, 2: False, 3: True}
    path.write_text(json.dumps({**document, "sentence": "in other words", "statistics": []}))
    room.judge_again(plan.recipe, "smoke", other.folder)
    assert json.loads(path.read_text()) == document
    path.write_text(json.dumps({**document, "sentence": "in other words", "rule": "another"}))
    room.judge_again(plan.recipe, "smoke", other.folder)
    assert json.loads(path.read_text())["sentence"] == "in other words"


@pytest.mark.parametrize("content", ["", "arm,seed,state,epoch\nl3,0,done,1\n", "arm,seed,state,epoch\nl2,x,done,1\n"])
def test_a_damaged_table_of_runs_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "runs.csv").write_text(content or "arm\nl2\n")
    with pytest.raises(UserError, match=r"runs\.csv: no table of the runs of example, smoke scale"):
        room.read_evidence(recipe(), "smoke", tmp_path)


def test_where_nothing_can_be_published_nothing_is_trained(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="file"):
        perform(plan_experiment(recipe(), "smoke", output=tmp_path / "out"), publish_to=tmp_path / "file" / "results")
    assert not (tmp_path / "out" / "runs").exists()


def test_arms_are_added_to_what_was_published(sitting: Callable[..., ExperimentPlan], target: Path) -> None:
    published(sitting("a", ["l2", "l1"]), target, "x", "a")
    before = documents(target)
    assert (before["X-1"]["verdict"], before["X-2"]["verdict"]) == ("equal", "not run")
    result = published(sitting("b", ["topk"]), target, "x", "b")
    assert result.kept == [f"{arm}-s{seed}" for arm in ("l2", "l1") for seed in range(3)]
    after = documents(target)
    assert after["X-1"]["statistics"] == before["X-1"]["statistics"]
    assert (after["X-2"]["verdict"], after["X-2"]["seeds"]) == ("worse", [0, 1, 2])
    provenance = after["X-2"]["provenance"]
    assert (provenance["command"], provenance["earlier_commands"]) == (["x", "b"], [["x", "a"]])
    kinds = [(kind["package"]["commit"], kind["runs"], kind["names"]) for kind in provenance["runs"]]
    assert kinds == [("b", 3, ["topk-s0", "topk-s1", "topk-s2"]), ("a", 6, result.kept)]
    folder = target / "example-smoke"
    assert (folder / "folders.csv").read_text() == "arm,runs,share\nl2,3,1.0\nl1,3,1.0\ntopk,3,1.0\n"
    assert (folder / "counts.csv").read_text() == "arm,ended\nl2,3\nl1,3\ntopk,3\n"
    assert set(json.loads((folder / "setup.json").read_text())["arms"]) == set(ERRORS)


def test_a_third_machine_keeps_the_first(sitting: Callable[..., ExperimentPlan], target: Path) -> None:
    for machine, arm in (("a", "l2"), ("b", "l1"), ("c", "topk")):
        published(sitting(machine, [arm]), target, machine)
    found = documents(target)["X-2"]
    assert found["verdict"] == "worse"
    assert {kind["package"]["commit"]: kind["runs"] for kind in found["provenance"]["runs"]} == {"a": 3, "b": 3, "c": 3}
    assert sorted(found["provenance"]["earlier_commands"]) == [["a"], ["b"]]


def test_runs_made_again_take_the_place_of_the_published(sitting: Callable[..., ExperimentPlan], target: Path) -> None:
    published(sitting("a", ["l2", "l1"]), target, "a")
    result = published(sitting("b", ["l1"], more=10.0, seeds=2), target, "b")
    assert result.kept == ["l2-s0", "l2-s1", "l2-s2", "l1-s2"]
    assert result.evidence.accuracy("l1") == pytest.approx({0: 69.9, 1: 69.0, 2: 78.1})
    kinds = documents(target)["X-1"]["provenance"]["runs"]
    assert [(kind["package"]["commit"], kind["names"]) for kind in kinds] == [
        ("b", ["l1-s0", "l1-s1"]),
        ("a", ["l2-s0", "l2-s1", "l2-s2", "l1-s2"]),
    ]


def test_an_arm_that_chose_again_is_not_mixed_with_the_published(
    sitting: Callable[..., ExperimentPlan], target: Path
) -> None:
    choice = Choice("regime.lr", (0.1, 0.2))
    published(sitting("a", ["l2", "l1"], choice=choice), target)
    result = published(sitting("b", ["l1"], seeds=2, choice=choice), target)
    assert result.kept == ["l2-s0", "l2-s1", "l2-s2"]


def test_seeds_that_are_left_are_missing_also_of_published_arms(
    sitting: Callable[..., ExperimentPlan], target: Path
) -> None:
    published(sitting("a", ["l2"], seeds=2), target)
    result = published(sitting("b", ["l1"]), target)
    assert result.verdicts[0].sentence.startswith("Provisional, 2 of 3 seeds of l2")


def test_the_page_shows_published_runs(sitting: Callable[..., ExperimentPlan], target: Path) -> None:
    published(sitting("a", ["l2", "l1"]), target)
    result = perform(sitting("b", ["topk"]), publish_to=target)
    text = result.page.read_text()
    assert text.count("3 done") == 3
    assert "l1-s2" in text, "the provenance names the runs"


def test_runs_of_other_settings_are_not_mixed(sitting: Callable[..., ExperimentPlan], target: Path) -> None:
    published(sitting("a", ["l2", "l1"], **{"data.batch_size": 64}), target)
    plan = sitting("b", ["topk"], **{"data.batch_size": 32})
    before = {path: path.read_bytes() for path in target.rglob("*") if path.is_file()}
    with pytest.raises(UserError) as caught:
        perform(plan, publish_to=target)
    assert caught.value.problems == tuple(
        f"{target}/example-smoke/setup.json: {arm} was run with data.batch_size=64, and is now run with "
        "data.batch_size=32; publish to another folder, or remove this one"
        for arm in ("l2", "l1")
    )
    assert {path: path.read_bytes() for path in target.rglob("*") if path.is_file()} == before
    assert not plan.folder.exists()


def test_the_place_of_the_images_may_differ(sitting: Callable[..., ExperimentPlan], target: Path) -> None:
    published(sitting("a", ["l2", "l1"], **{"data.dir": "/here"}), target)
    assert published(sitting("b", ["topk"], **{"data.dir": "/there"}), target).kept


@pytest.mark.parametrize("content", [None, "", "[]", "{}", '{"arms": {"l1": {}}}', '{"arms": {"l2": 3, "l1": {}}}'])
def test_published_runs_without_their_settings_are_refused(
    content: str | None, sitting: Callable[..., ExperimentPlan], target: Path
) -> None:
    published(sitting("a", ["l2", "l1"]), target)
    path = target / "example-smoke" / "setup.json"
    path.unlink()
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=r"setup\.json: no settings of the runs that were published there"):
        perform(sitting("b", ["topk"]), publish_to=target)
