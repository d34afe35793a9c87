"""`verify`: a run's first steps come out as they were recorded, or it is told which did not and what has changed."""

import io
import json
import shutil
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch

from norm_matters.cli import main
from norm_matters.core.errors import UserError
from norm_matters.engine.trace import fingerprint, is_traced
from norm_matters.record.trace import TRACE_FILE, append_trace, read_trace, trim_trace
from norm_matters.verification import _first_plan, verify

SHA = "ab" * 32


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two epochs of six steps on the digits."""
    output = tmp_path_factory.mktemp("runs")
    settings = ["--epochs=2", "--batch-size=256", "--device=cpu", f"--output={output}", "--name=run", "regime.lr=0.05"]
    with redirect_stdout(io.StringIO()):
        assert main(["train", *settings, "train.instruments=none"]) == 0
    return output / "run"


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    return shutil.copytree(run, tmp_path / "elsewhere" / "copy", symlinks=True)


def contents(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {str(path): (path.lstat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}


def change(folder: Path, file: str, old: str, new: str) -> None:
    text = (folder / file).read_text()
    assert old in text
    (folder / file).write_text(text.replace(old, new, 1))


def test_a_trace_has_the_steps_of_three_per_power_of_ten(run: Path) -> None:
    assert [row[0] for row in read_trace(run)] == [1, 2, 5, 10]
    assert [step for step in range(1, 3000) if is_traced(step)] == [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000]


def test_a_run_comes_out_to_the_bit_and_is_left_alone(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(copy)
    assert main(["verify", str(copy)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" (")[0] for line in lines[:4]] == [f"step {step}: equal" for step in (1, 2, 5, 10)]
    assert lines[-1] == "equal to the bit up to step 10"
    assert contents(copy) == before


def test_fewer_steps(copy: Path) -> None:
    assert [check.step for check in verify(copy, steps=4).checks] == [1, 2]


def test_weights_that_differ_are_told_by_their_step(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = read_trace(copy)
    text = (copy / TRACE_FILE).read_text()
    (copy / TRACE_FILE).write_text(text.replace(rows[2][3], SHA))
    assert main(["verify", str(copy)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].startswith("step 2: equal")
    assert lines[2].startswith("step 5: different")
    assert lines[3].startswith("step 10: equal")
    assert lines[-1] == "different from step 5 on"


@pytest.mark.parametrize(("old", "new"), [("seed: 0", "seed: 1"), ("lr: 0.05", "lr: 0.0500001")])
def test_other_settings_come_out_otherwise(old: str, new: str, copy: Path) -> None:
    change(copy, "config.yaml", old, new)
    found = verify(copy, steps=2)
    assert not found.equal
    assert found.first_difference is not None
    assert found.first_difference.step == 1
    assert found.first_difference.weight_difference != 0


def test_as_json_with_what_has_changed_since(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    provenance = json.loads((copy / "provenance.json").read_text())
    provenance["machine"]["threads"] = 77
    provenance["versions"]["torch"] = "2.10.0"
    provenance["data"]["fingerprint"]["train"]["sha256"] = SHA
    provenance["package"]["commit"] = "0123"
    provenance["package"]["dirty"] = True
    (copy / "provenance.json").write_text(json.dumps(provenance))
    assert main(["verify", str(copy), "--steps=2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["equal"] is True
    assert found["first_difference"] is None
    assert [step["step"] for step in found["steps"]] == [1, 2]
    assert found["steps"][0]["recorded"] == found["steps"][0]["found"]
    told = {(each["kind"], each["fact"]): each["recorded"] for each in found["differences"]}
    assert told["threads", "machine.threads"] == 77
    assert told["versions", "versions.torch"] == "2.10.0"
    assert told["data", "data.fingerprint.train.sha256"] == SHA
    assert told["code", "package.commit"] == "0123"
    assert told["code", "uncommitted changes"] is True


def test_a_run_that_was_extended_is_compared_as_it_began(copy: Path) -> None:
    with redirect_stdout(io.StringIO()):
        assert main(["train", f"--resume={copy}", "--epochs=4", "--extend"]) == 0
    assert [row[0] for row in read_trace(copy)] == [1, 2, 5, 10, 20]
    found = verify(copy, steps=100)
    assert [check.step for check in found.checks] == [1, 2, 5, 10]
    assert found.equal


def test_a_run_that_began_again_at_another_length_is_compared_at_that(copy: Path) -> None:
    """Killed before its first checkpoint: nothing is left of its first plan."""
    shutil.rmtree(copy / "checkpoints")
    for name in ("results.csv", TRACE_FILE):
        (copy / name).unlink()
    with redirect_stdout(io.StringIO()):
        assert main(["train", f"--resume={copy}", "--epochs=4"]) == 0
    found = verify(copy, steps=100)
    assert [check.step for check in found.checks] == [1, 2, 5, 10, 20]
    assert found.equal


def event(step: int, epochs: int, *, before: int | None = None) -> dict:
    return {
        "step": step,
        "epochs": epochs,
        **({} if before is None else {"changed": {"train.epochs": [before, epochs]}}),
    }


@pytest.mark.parametrize(
    ("events", "expected"),
    [
        ([], (9, None)),
        ([event(50, 9)], (9, None)),
        ([event(100, 9, before=5)], (5, 100)),
        ([event(100, 9, before=5), event(50, 9)], (5, 50)),
        ([event(100, 9, before=5), event(150, 9)], (5, 100)),
        ([event(100, 7, before=5), event(50, 5)], (5, None)),
        ([event(0, 9, before=5)], (9, None)),
        ([event(100, 9, before=5), event(0, 9)], (9, None)),
        ([event(100, 7, before=5), event(120, 9, before=7)], (5, 100)),
        ([event(100, 9, before=5), event(100, 9, before=5)], (5, 100)),
        ([{"changed": {"train.epochs": 3}}, {"step": True, "epochs": 4}, {}], (9, None)),
    ],
)
def test_each_stretch_is_compared_under_its_own_plan(events: list[dict], expected: tuple[int, int | None]) -> None:
    assert _first_plan(events, 9) == expected


@pytest.mark.parametrize("steps", ["0", "-1", "few", "1.5"])
def test_wrong_numbers_of_steps(steps: str, copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(copy), f"--steps={steps}"]) == 2
    assert "--steps" in capsys.readouterr().err


def test_what_cannot_be_verified(copy: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no run folder"):
        verify(tmp_path)
    change(copy, "config.yaml", "name: digits", "name: mnist")
    with pytest.raises(UserError, match="is missing"):
        verify(copy, data_dir=str(tmp_path))
    (copy / TRACE_FILE).unlink()
    with pytest.raises(UserError, match=r"has no trace\.csv"):
        verify(copy)


def test_a_fingerprint_sees_every_bit() -> None:
    tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(3)}
    norm, sha = fingerprint(tensors)
    assert norm == pytest.approx(55**0.5)
    assert fingerprint(dict(reversed(tensors.items()))) == (norm, sha)
    strided = tensors["a"].t().contiguous().t()
    assert fingerprint({**tensors, "a": strided}) == (norm, sha)
    for other in (
        {**tensors, "a": tensors["a"].nextafter(torch.tensor(9.0))},
        {**tensors, "a": tensors["a"].double()},
        {**tensors, "a": tensors["a"].view(3, 2)},
        {**tensors, "b": torch.tensor(4)},
        {"a": tensors["a"], "c": tensors["b"]},
        {"a": -tensors["a"], "b": tensors["b"]},
    ):
        assert fingerprint(other)[1] != sha


def test_rows_are_read_back_and_trimmed(tmp_path: Path) -> None:
    assert read_trace(tmp_path) == []
    trim_trace(tmp_path, 3)
    rows = [(1, 2.302585092994046, 1e-300, SHA), (2, float("inf"), 3.0, SHA), (5, 0.1, 0.2, SHA)]
    for row in rows:
        append_trace(tmp_path, row)
    assert read_trace(tmp_path) == rows
    whole = (tmp_path / TRACE_FILE).read_bytes()
    (tmp_path / TRACE_FILE).write_bytes(whole + b"10,0.1")
    assert read_trace(tmp_path) == rows
    trim_trace(tmp_path, 4)
    assert read_trace(tmp_path) == rows[:2]
    append_trace(tmp_path, rows[2])
    assert (tmp_path / TRACE_FILE).read_bytes() == whole
    trim_trace(tmp_path, 0)
    assert read_trace(tmp_path) == []
    append_trace(tmp_path, rows[0])
    assert read_trace(tmp_path) == rows[:1]


@pytest.mark.parametrize(
    "text",
    [
        "epoch\n1\n",
        f"step,loss,weight_norm,weights_blake2b\n2,1,1,{SHA}\n1,1,1,{SHA}\n",
        f"step,loss,weight_norm,weights_blake2b\n0,1,1,{SHA}\n",
        f"step,loss,weight_norm,weights_blake2b\n1,1,1,{SHA},1\n",
        "step,loss,weight_norm,weights_blake2b\n1,1,1\n",
        "step,loss,weight_norm,weights_blake2b\n1,1,1,xyz\n",
        "step,loss,weight_norm,weights_blake2b\n\n",
        "\xff\n",
    ],
)
def test_a_damaged_trace_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / TRACE_FILE).write_text(text)
    with pytest.raises(UserError, match=r"trace\.csv"):
        read_trace(tmp_path)
