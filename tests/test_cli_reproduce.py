"""`reproduce`: what it lists, says first, refuses, trains, and leaves."""

import importlib.util
import json
import re
import shutil
from pathlib import Path
from types import ModuleType

import pytest

import norm_matters as nm
from norm_matters.cli import main
from norm_matters.experiments.claims import RECIPES
from norm_matters.experiments.claims.planning import plan_experiment
from norm_matters.experiments.claims.published import judge_again

ROOT = Path(__file__).parents[1]
TINY = ["--scale", "smoke", "--seeds", "2", "--device", "cpu"]


def errors(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().err.splitlines()


def docs_script() -> ModuleType:
    """docs/paper.py, which is in no package."""
    spec = importlib.util.spec_from_file_location("docs_paper", ROOT / "docs" / "paper.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", "list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == RECIPES.names()
    assert main(["reproduce", "list", "--json"]) == 0
    assert [each["id"] for each in json.loads(capsys.readouterr().out)] == RECIPES.names()


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", "--help"]) == 0
    text = capsys.readouterr().out
    for words in ("ID|list|all", "--scale smoke|small|paper", "--seeds", "--arms", "--pilot", "--publish", "--dry-run"):
        assert words in text, words


def test_completion_knows_the_experiments() -> None:
    from norm_matters.cli_reproduce import _ids

    assert _ids() == ["list", "all", *RECIPES.names()]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["wdd"], "unknown experiment 'wdd'; did you mean 'wd'?"),
        (["lp", "--scale", "smal"], "--scale: lp has no 'smal'; did you mean 'small'?"),
        (["lp", "--arms", "l2,l3"], "--arms: lp has no 'l3'"),
        (["lp", "--arms", ","], "--arms: lp has no ''"),
        (["cost", "--arms", "l1"], "--arms: cost has none: it computes, and trains nothing"),
        (["lp", "--seeds", "x"], "--seeds: value 'x' is not valid"),
        (["lp", "--seeds", "1"], "--seeds: value 1 is not valid"),
        (["all", "--scale", "big"], "--scale: value 'big' is not valid; it takes smoke, small, paper"),
        (["all", "--arms", "l2"], "--arms: experiments have arms of their own"),
        (["lp", "--executor", "locl"], "--executor: value 'locl' is not valid"),
        (["lp", "--device", "gpu"], "device: value 'gpu' is not valid"),
        (["lp", "--dataset", "cifar11"], "cifar11"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["reproduce", *arguments, "--output", str(tmp_path / "out")]) == 2
    (line,) = errors(capsys)
    assert words in line
    assert not (tmp_path / "out").exists()


def test_missing_images_are_told_with_the_option_that_names_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["reproduce", "lp", "--data-dir", str(tmp_path), "--output", str(tmp_path / "out")]) == 2
    (line,) = errors(capsys)
    assert line.startswith("error: lp small: ")
    assert line.endswith("name the images with --dataset (such as parquet:FOLDER) or --data-dir")
    assert not (tmp_path / "out").exists()


def test_an_experiment_of_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = ["--output", str(tmp_path / "out"), "--publish", str(tmp_path / "results")]
    assert main(["reproduce", "l1-l2", *TINY, *output]) == 0
    first = capsys.readouterr().out
    assert "2 seeds of each arm; no pilot has been run" in first
    assert "4 runs, 4 to train" in first
    assert "Q-L1: " in first
    folder = tmp_path / "out" / "l1-l2-smoke"
    verdict = json.loads((folder / "Q-L1" / "verdict.json").read_text())
    assert verdict["seeds"] == [0, 1]
    assert verdict["provenance"]["command"][:3] == ["norm-matters", "reproduce", "l1-l2"]
    assert [kind["runs"] for kind in verdict["provenance"]["runs"]] == [4]
    assert (tmp_path / "out" / "index.html").is_file()
    assert (tmp_path / "results" / "l1-l2-smoke" / "runs.csv").read_text() == (folder / "runs.csv").read_text()
    runs = tmp_path / "out" / "runs" / "l1-l2-smoke"
    before = {path: path.stat().st_mtime_ns for path in runs.glob("*/results.csv")}
    assert len(before) == 4
    # Again: nothing is trained, and Python says the same.
    assert main(["reproduce", "l1-l2", *TINY, *output, "--json"]) == 0
    (told,) = json.loads(capsys.readouterr().out)
    assert (told["claim"], told["verdict"]) == ("Q-L1", verdict["verdict"])
    result = nm.reproduce("l1-l2", scale="smoke", seeds=2, output=tmp_path / "out", device="cpu")
    assert result.verdicts[0].sentence == verdict["sentence"]
    assert {path: path.stat().st_mtime_ns for path in runs.glob("*/results.csv")} == before


def test_published_runs_count_and_those_of_other_settings_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "results" / "l1-l2-smoke"
    folder.mkdir(parents=True)
    lines = [f"l1,{seed},done,{epoch + 1},10" for seed in (0, 1) for epoch in range(2)]
    (folder / "runs.csv").write_text("\n".join(["arm,seed,state,epoch,val_error1", *lines]) + "\n")
    own = plan_experiment(RECIPES.get("l1-l2"), "smoke", output=tmp_path).settings_of(RECIPES.get("l1-l2").arm("l1"))
    (folder / "setup.json").write_text(json.dumps({"arms": {"l1": {**own, "model.name": "vgg11"}}}))
    command = ["reproduce", "l1-l2", *TINY, "--arms", "l2", "--publish", str(tmp_path / "results")]
    for option in ([], ["--dry-run"]):
        assert main([*command, "--output", str(tmp_path / "out"), *option]) == 2
        (line,) = errors(capsys)
        assert "setup.json: l1 was run with model.name=vgg11, and is now run with model.name=resnet8" in line
    assert not (tmp_path / "out").exists()
    (folder / "setup.json").write_text(json.dumps({"arms": {"l1": own}}))
    assert main([*command, "--output", str(tmp_path / "out")]) == 0
    text = capsys.readouterr().out
    assert "with 2 runs that were published before: l1-s0, l1-s1" in text
    assert "2 runs, 2 to train" in text
    assert json.loads((folder / "Q-L1" / "verdict.json").read_text())["seeds"] == [0, 1]


@pytest.mark.slow
def test_a_pilot_says_how_many_seeds_are_needed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--scale", "smoke", "--device", "cpu", "--output", str(tmp_path)]
    assert main(["reproduce", "l1-l2", *options, "--pilot"]) == 0
    text = capsys.readouterr().out
    assert "6 runs, 6 to train" in text
    assert "no pilot has been run" not in text
    assert re.search(
        r"l1 less l2: SD [\d.]+ points over 3 pairs; [\d,]+( or more)? seeds give 80% power at half the margin", text
    )
    runs = sorted(folder.name for folder in (tmp_path / "runs" / "l1-l2-smoke").iterdir() if "s2" in folder.name)
    assert runs == [f"{arm}-s{seed}" for arm in ("l1", "l2") for seed in (2000, 2001, 2002)]
    assert not (tmp_path / "l1-l2-smoke" / "Q-L1").exists(), "no verdict is made from a pilot"
    assert main(["reproduce", "l1-l2", *options, "--dry-run"]) == 0
    assert "a pilot of 3 pairs has shown" in capsys.readouterr().out


@pytest.mark.slow
def test_a_pilot_decides_how_many_seeds_there_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "l1-l2-smoke"
    folder.mkdir()
    (folder / "pilot.json").write_text('{"sd": 0.1, "n": 3, "arm": "l1", "seeds": 8}')
    assert (
        main(["reproduce", "l1-l2", "--scale", "smoke", "--dry-run", "--executor", "slurm", "--output", str(tmp_path)])
        == 0
    )
    text = capsys.readouterr().out
    assert "8 seeds of each arm; a pilot of 3 pairs has shown an SD of 0.1 points, which asks for 8 seeds" in text
    assert "16 runs, 16 to train" in text
    (folder / "pilot.json").write_text("{}")
    assert main(["reproduce", "l1-l2", "--scale", "smoke", "--dry-run", "--output", str(tmp_path)]) == 2
    assert "pilot.json: no pilot's result" in errors(capsys)[0]


def test_a_dry_run_lists_the_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--executor", "slurm", "--output", str(tmp_path / "out")]
    assert main(["reproduce", "l1-l2", *TINY, *options, "--dry-run"]) == 0
    names = [f"{arm}-s{seed}" for arm in ("l2", "l1") for seed in (0, 1)]
    assert capsys.readouterr().out.splitlines()[-4:] == [f"  {name}: new" for name in names]
    assert main(["reproduce", "l1-l2", *TINY, *options, "--dry-run", "--json"]) == 0
    (told,) = json.loads(capsys.readouterr().out)
    assert told["runs"] == dict.fromkeys(names, "new")
    assert not (tmp_path / "out").exists()


def test_published_verdicts_are_what_their_runs_say(tmp_path: Path) -> None:
    script = docs_script()
    shutil.copytree(script.RESULTS, tmp_path / "claims")
    judged = 0
    for folder in (tmp_path / "claims").iterdir():
        name, _, scale = folder.name.rpartition("-")
        if (folder / "runs.csv").is_file():
            judge_again(RECIPES.get(name), scale, folder)
            judged += 1
    assert judged >= 4
    for path in script.RESULTS.glob("*/*/verdict.json"):
        assert path.read_text() == (tmp_path / "claims" / path.relative_to(script.RESULTS)).read_text()


def test_identities_hold_to_rounding(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", "invariance", "--scale", "smoke", "--output", str(tmp_path), "--json"]) == 0
    found = {each["claim"]: each for each in json.loads(capsys.readouterr().out)}
    assert {each["verdict"] for each in found.values()} == {"holds"}
    for claim in ("ID-SCALE", "ID-STEP", "ID-CORRECTION", "ID-MOMENTUM"):
        (row,) = json.loads((tmp_path / "invariance-smoke" / claim / "verdict.json").read_text())["statistics"]
        assert row["estimate"] < 1e-10


def test_the_page_of_docs_is_what_its_script_writes() -> None:
    text = (ROOT / "docs" / "paper.md").read_text()
    assert text == docs_script().text()
    for name in re.findall(r"!\[.*?\]\((.*?)\)", text):
        assert (ROOT / "docs" / name).is_file()


def test_the_page_of_docs_tells_mean_and_spread_of_each_arm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script, recipe = docs_script(), RECIPES.get("wd")
    epochs = recipe.scale("smoke").config["train.epochs"]
    assert epochs == 8  # the last quarter are two epochs
    lines = ["arm,seed,state,epoch,val_error1"]
    for arm, seed, state, error in (("on", 0, "done", 10), ("on", 1, "done", 13), ("off", 0, "missing", 20)):
        lines += [f"{arm},{seed},{state},{epoch + 1},{error if epoch > 5 else 90}" for epoch in range(epochs)]
    lines += ["corrected,0,diverged,1,50", "corrected,1,diverged,,"]  # the second has stopped in its first epoch
    lines += [f"norm-schedule,{seed},diverged,{n + 1},95" for seed in (0, 1) for n in range(epochs)]
    (tmp_path / "wd-smoke").mkdir()
    (tmp_path / "wd-smoke" / "runs.csv").write_text("\n".join(lines) + "\n")
    monkeypatch.setattr(script, "RESULTS", tmp_path)
    last = {line.split("`")[1]: line.split(" | ")[-1] for line in script._arms(recipe, ["smoke"])[2:]}
    assert last["on"] == "88.50 (2.12; 2) |"
    assert last["off"] == "not run |"
    assert last["corrected"] == "–, 2 stopped |"
    least = recipe.diverged
    assert least == 20
    assert last["norm-schedule"] == "5.00 (0.00; 2, 2 diverged) |"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_all_at_smoke_scale(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", "all", "--scale", "smoke", "--output", str(tmp_path), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert all(each["verdict"] != "not run" for each in told)
    found = {(each["experiment"], each["claim"]) for each in told}
    wanted = {(name, claim.id) for name in RECIPES.names() for claim in RECIPES.get(name).claims}
    assert found == wanted
    assert len(list(tmp_path.glob("*/*/verdict.json"))) == len(wanted)
    for name in RECIPES.names():
        assert (tmp_path / f"{name}-smoke.html").stat().st_size > 5000
        assert f'href="{name}-smoke.html"' in (tmp_path / "index.html").read_text()
