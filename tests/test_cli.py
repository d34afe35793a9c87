"""The commands, in one process (torch loads once): what they print, what they write, and their exit status."""

import csv
import io
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from norm_matters import run as run_module
from norm_matters.cli import main
from norm_matters.core.config import load_config
from norm_matters.core.errors import NumericalError, StorageError
from norm_matters.record import read_table


@dataclass(frozen=True)
class Trained:
    """A run of one epoch, and what its command printed."""

    folder: Path
    out: str
    err: str

    @property
    def last(self) -> dict[str, Any]:
        return read_table(self.folder / "results.csv")[-1]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    output = tmp_path_factory.mktemp("runs")
    arguments = ["--norm", "l1", "--seed", "3", "--batch-size=256", "--output", str(output), "train.clip_norm=5"]
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        assert main(["train", "--epochs", "1", "--device", "cpu", *arguments]) == 0
    return Trained(output / "resnet8-l1-digits-s3", out.getvalue(), err.getvalue())


@pytest.fixture
def run(trained: Trained) -> Path:
    """The run's folder."""
    return trained.folder


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder of two images and a broken one."""
    folder = tmp_path / "images"
    folder.mkdir()
    for name, level in (("black.png", 0), ("white.png", 255)):
        Image.fromarray(np.full((8, 8), level, np.uint8)).save(folder / name)
    (folder / "broken.jpg").write_text("not an image")
    return folder


def test_train_prints_epochs_accuracy_and_report(trained: Trained) -> None:
    headline, epoch, accuracy, report = trained.out.splitlines()
    assert headline.startswith(f"{trained.folder}: resnet8 with l1 on digits")
    assert epoch.startswith("epoch 1/1: train loss ")
    assert accuracy == f"accuracy {100 - trained.last['val_error1']:.2f}% after epoch 1"
    assert report == f"report {trained.folder / 'report.html'}"
    assert (trained.folder / "report.html").stat().st_size > 0
    assert trained.err == ""


def test_options_and_overrides_reach_the_record(run: Path) -> None:
    config = load_config(run / "config.yaml")
    assert (config.model.norm, config.train.clip_norm, config.train.epochs, config.seed) == ("l1", 5.0, 1, 3)
    command = json.loads((run / "provenance.json").read_text())["command"]
    assert command[:4] == ["norm-matters", "train", "--epochs", "1"]
    assert command[-1] == "train.clip_norm=5"


def test_a_run_can_be_resumed_and_extended(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run, copy, symlinks=True)
    assert main(["train", "--resume", str(copy), "--epochs", "2"]) == 2
    assert "--extend" in capsys.readouterr().err
    assert main(["train", "--resume", str(copy), "--epochs", "2", "--extend"]) == 0
    assert "after epoch 2" in capsys.readouterr().out
    assert [row["epoch"] for row in read_table(copy / "results.csv")] == [1, 2]


def test_eval_of_a_run_and_of_a_checkpoint(trained: Trained, capsys: pytest.CaptureFixture[str]) -> None:
    run = trained.folder
    assert main(["eval", str(run), "--device", "cpu"]) == 0
    text = capsys.readouterr().out
    assert main(["eval", str(run / "checkpoints" / "last"), "--device", "cpu", "--json", "--batch-size", "50"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert f"error@1 {scores['error1']:.2f}%, error@5 {scores['error5']:.2f}%" in text
    assert f"{scores['images']} images" in text
    assert scores["error1"] == trained.last["val_error1"]


def test_eval_json_has_no_nan(run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("norm_matters.inference.evaluate", lambda *_, **__: {"loss": float("nan"), "images": 3})
    assert main(["eval", str(run), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"loss": None, "images": 3}


def test_predict_skips_broken_images_with_a_count(run: Path, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", str(run), str(images), "--top", "2", "--device", "cpu"]) == 0
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert [line.split(": ")[0] for line in lines] == [str(images / "black.png"), str(images / "white.png")]
    assert all(line.count("%") == 2 for line in lines)
    broken, count = captured.err.splitlines()
    assert "broken.jpg" in broken
    assert count == "skipped 1 of 3 images"


def test_predict_as_csv_and_json_agree(run: Path, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["predict", str(run), str(images), "--device", "cpu", "--top", "3"]
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert main([*arguments, "--csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert len(found) == 2
    assert [(row["path"], row["class"], float(row["probability"])) for row in rows] == [
        (image["path"], name, probability)
        for image in found
        for name, probability in zip(image["classes"], image["probabilities"], strict=True)
    ]
    assert [row["rank"] for row in rows] == ["1", "2", "3"] * 2


def test_predict_reads_paths_from_standard_input(
    run: Path, images: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{images / 'white.png'}\n\n{images / 'black.png'}\n"))
    assert main(["predict", str(run), "-", "--device", "cpu", "--top", "1"]) == 0
    assert [Path(line.split(": ")[0]).name for line in capsys.readouterr().out.splitlines()] == [
        "white.png",
        "black.png",
    ]


def test_predict_without_one_readable_image_fails(run: Path, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", str(run), str(images / "broken.jpg"), "--device", "cpu"]) == 2
    assert "error: none of the images" in capsys.readouterr().err


def test_report_and_compare_run_with_torch_blocked(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "torch"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torch", None)  # type: ignore[arg-type]
    page = run / "report.html"
    page.unlink()
    assert main(["report", str(run)]) == 0
    assert page.stat().st_size > 0
    output = tmp_path / "both.html"
    assert main(["compare", str(run), str(run), "--output", str(output)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"report {page}"
    assert lines[1].split()[:3] == ["run", "n", "epoch"]
    assert lines[2].split()[1:3] == ["1", "1"]
    assert lines[-1] == f"page {output}"
    assert output.stat().st_size > 0


@pytest.mark.parametrize(
    ("kind", "name"),
    [("models", "resnet20"), ("norms", "topk"), ("datasets", "digits"), ("regimes", "cosine"), ("transforms", "flip")],
)
def test_list(kind: str, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", kind]) == 0
    everything = capsys.readouterr().out
    assert main(["list", kind, "--filter", name[:4]]) == 0
    some = capsys.readouterr().out
    assert name in some
    assert len(some) < len(everything)
    assert set(some.split()) <= set(everything.split())


def test_list_regimes_plots_the_learning_rate(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "regimes", "--filter", "linear"]) == 0
    plot = capsys.readouterr().out
    assert plot.startswith("linear")
    assert "epochs" in plot
    assert plot.count("\n") > 5


def test_list_models_of_torchvision(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "models", "--filter", "torchvision:resnet1*"]) == 0
    assert set(capsys.readouterr().out.split()) == {f"torchvision:resnet{depth}" for depth in (18, 101, 152)}


def test_without_a_command_the_help_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    text = capsys.readouterr().out
    for name in ("train", "eval", "predict", "report", "compare", "list", "trust", "verify", "--install-completion"):
        assert name in text


def test_shell_completion(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("_NORM_MATTERS_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "norm-matters list tr")
    monkeypatch.setenv("COMP_CWORD", "2")
    with pytest.raises(SystemExit) as ended:
        main([])
    assert ended.value.code in (0, None)
    assert capsys.readouterr().out.split() == ["transforms"]


@pytest.mark.parametrize(
    ("arguments", "pretrained"),
    [
        (["--pretrained"], True),
        (["--pretrained", "--norm", "l1"], True),
        (["--pretrained", "seed=1"], True),
        (["--pretrained", "weights.safetensors", "seed=1"], "weights.safetensors"),
        (["--pretrained=a=b.safetensors"], "a=b.safetensors"),
        (["--pretrained=false"], False),
        ([], False),
    ],
)
def test_pretrained_takes_a_file_or_none(
    arguments: list[str], pretrained: bool | str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def train(config, **_):
        seen.append(config.model.pretrained)
        raise NumericalError("stop here")

    monkeypatch.setattr(run_module, "train", train)
    assert main(["train", *arguments]) == 76
    assert seen == [pretrained]
    assert capsys.readouterr().err == "error: stop here\n"


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (StorageError("the disk is full"), 74, "error: the disk is full\n"),
        (KeyboardInterrupt(), 130, "error: interrupted\n"),
        (StorageError("a\x1b[31mname\nof two lines"), 74, "error: a\\x1b[31mname\\nof two lines\n"),
    ],
)
def test_exit_status_of_errors(
    error: BaseException,
    status: int,
    words: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def train(*_, **__):
        raise error

    monkeypatch.setattr(run_module, "train", train)
    assert main(["train"]) == status
    assert capsys.readouterr().err == words


def test_our_own_mistakes_show_a_traceback(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def train(*_, **__):
        raise AssertionError("cannot be")

    monkeypatch.setattr(run_module, "train", train)
    assert main(["train"]) == 1
    assert "Traceback" in (error := capsys.readouterr().err)
    assert "AssertionError: cannot be" in error


def test_ctrl_c_ends_with_a_record_and_130(command: Callable, image_folder: Path, tmp_path: Path) -> None:
    # A process group of its own: Ctrl-C reaches the workers too.
    images = [f"--dataset=imagefolder:{image_folder}", "data.input_size=16", "data.workers=1"]
    process = command(
        "train", *images, "--epochs=500", "--output", str(tmp_path), "--name=long", start_new_session=True
    )
    line = ""
    while not line.startswith("epoch 1/"):
        line = process.stdout.readline()
        assert line, process.stderr.read()
    os.killpg(process.pid, signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert (process.returncode, error) == (130, "error: interrupted\n")
    assert (tmp_path / "long" / "report.html").exists()
    assert main(["eval", str(tmp_path / "long"), "--device", "cpu"]) == 0


def test_a_reader_that_leaves_gets_no_traceback(command: Callable) -> None:
    process = command("list", "datasets")
    process.stdout.close()
    process.wait(timeout=60)
    assert process.stderr.read() == ""
    process.stderr.close()
