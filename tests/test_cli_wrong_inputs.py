"""Wrong inputs: each ends with its exit status and one clear line per mistake, and what is seen before training creates
nothing."""

import io
import os
import resource
import shlex
import shutil
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from norm_matters.cli import main

MODEL = """
import torch.nn as nn

def model(num_classes, in_channels):
    return nn.Sequential(nn.Conv2d(in_channels, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, OUT))
"""
FILES = {
    "broken.yaml": "model: {norm: l1",
    "tag.yaml": "output: !!python/object/apply:os.mkdir [created]",
    "bomb.yaml": "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]",
    "twice.yaml": "seed: 1\nseed: 2",
    "deep.yaml": "model: {options: {a: " + "[" * 30 + "]" * 30 + "}}",
    "list.yaml": "- seed: 1",
    "no_norm.py": MODEL.replace("OUT", "num_classes"),
    "too_few.py": MODEL.replace("OUT", "2"),
    "syntax.py": "def model(:",
    "no_model.py": "x = 1",
    "weights.safetensors": "not tensors",
    "data.parquet": "not parquet",
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with files and folders that are wrong in many ways, and one good run of one epoch."""
    folder = tmp_path_factory.mktemp("place")
    for name, text in FILES.items():
        (folder / name).write_text(text)
    (folder / "empty").mkdir()
    image = Image.fromarray(np.zeros((16, 16, 3), np.uint8))
    for path in (
        "one/a/1.png",
        "differ/train/a/1.png",
        "differ/train/b/1.png",
        "differ/val/a/1.png",
        "differ/val/c/1.png",
    ):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        image.save(folder / path)
    with redirect_stdout(io.StringIO()):
        assert (
            main(["train", "--epochs=1", "--batch-size=256", "--device=cpu", f"--output={folder}", "--name=good"]) == 0
        )
    return folder


@pytest.fixture(autouse=True)
def inside(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in that folder, and look for datasets in the empty one."""
    monkeypatch.chdir(place)
    monkeypatch.setenv("NORM_MATTERS_DATA", str(place / "empty"))


def everything_in(folder: Path) -> list[tuple[str, int]]:
    """All files with their times, but for the lock of a run, which a command takes before it looks further."""
    return sorted(
        (str(path), path.lstat().st_mtime_ns)
        for path in folder.rglob("*")
        if "__pycache__" not in path.parts and path.name != ".lock"
    )


def errors(status: int, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Run a command that must fail, return its lines on stderr."""
    assert main(arguments) == status
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert lines
    assert all(line.startswith("error: ") for line in lines), captured.err
    assert "Traceback" not in captured.err
    return lines


TRAIN = {
    "unknown norm": ("--norm l7", ["model.norm", "l7", "l1"]),
    "unknown option of a norm": ("--norm l1:momentun=1", ["model.norm", "'momentun'", "'momentum'"]),
    "impossible option of a norm": ("--norm topk:k=0", ["model.norm", "k", "0"]),
    "unbalanced spec": ("--norm ghost:base=(l1", ["model.norm", "ghost"]),
    "unknown model": ("--model resnt20", ["model.name", "resnt20", "resnet20"]),
    "unknown model of torchvision": ("--model torchvision:resnt18", ["model.name", "resnt18", "torchvision:resnet18"]),
    "unknown option of a model": ("model.options.widht=2", ["widht", "width"]),
    "unknown dataset": ("--dataset digit", ["data.name", "'digit'", "digits"]),
    "unknown regime": ("regime.name=cosin", ["regime.name", "cosin", "cosine"]),
    "unknown key": ("model.nrom=l1", ["model.nrom", "model.norm"]),
    "no KEY=VALUE": ("l1", ["'l1'", "KEY=VALUE"]),
    "batch size 0": ("--batch-size 0", ["data.batch_size", "value 0", "from 1"]),
    "epochs 0": ("--epochs 0", ["train.epochs", "value 0", "from 1"]),
    "epochs in words": ("--epochs many", ["train.epochs", "'many'", "whole number"]),
    "seed below 0": ("--seed -1", ["seed", "-1", "from 0"]),
    "learning rate nan": ("--lr nan", ["regime.lr", "nan", "above 0"]),
    "unknown precision": ("--precision fp23", ["train.precision", "fp23", "'fp32'"]),
    "unknown device": ("--device gpu", ["device", "gpu", "cuda:N"]),
    "a device that is not there": ("--device cuda:99", ["device", "cuda:99"]),
    "a name that leaves the output folder": ("--name ../../etc", ["name", "'../../etc'", "folder name"]),
    "a name that is taken": ("--output . --name good --epochs 1", ["good"]),
    "no config file": ("--config none.yaml", ["none.yaml", "No such file"]),
    "a folder as config": ("--config empty", ["empty", "Is a directory"]),
    "broken YAML": ("--config broken.yaml", ["broken.yaml, line 1", "broken YAML"]),
    "YAML that makes objects": ("--config tag.yaml", ["tag.yaml, line 1", "tags"]),
    "YAML that explodes": ("--config bomb.yaml", ["bomb.yaml, line 1", "aliases"]),
    "YAML with a key twice": ("--config twice.yaml", ["twice.yaml, line 2", "'seed'", "twice"]),
    "YAML nested deep": ("--config deep.yaml", ["deep.yaml, line 1", "deep"]),
    "YAML with a list": ("--config list.yaml", ["list.yaml", "mapping"]),
    "a missing folder of images": ("--dataset imagefolder:none", ["none"]),
    "an empty folder of images": ("--dataset imagefolder:empty", ["empty"]),
    "a folder with one class": ("--dataset imagefolder:one", ["one"]),
    "classes that differ": ("--dataset imagefolder:differ", ["differ", "'b'", "'c'"]),
    "imagefolder without a folder": ("--dataset imagefolder", ["imagefolder:DIR"]),
    "a missing parquet file": ("--dataset parquet:none.parquet", ["none.parquet"]),
    "a parquet file that is none": ("--dataset parquet:data.parquet", ["data.parquet"]),
    "data that was not fetched": ("--dataset cifar10", ["cifar", "--download"]),
    "a missing model file": ("--model none.py", ["none.py"]),
    "a model file with a wrong line": ("--model syntax.py", ["syntax.py", "1"]),
    "a model file without a model": ("--model no_model.py", ["no_model.py", "model"]),
    "a network with too few outputs": ("--model too_few.py", ["2", "10"]),
    "a network without the norm asked for": ("--model no_norm.py --norm l1", ["l1"]),
    "an image too small for the network": ("--model alexnet", ["alexnet", "8"]),
    "missing weights": ("--pretrained none.safetensors", ["none.safetensors"]),
    "weights that are none": ("--pretrained weights.safetensors", ["weights.safetensors"]),
    "a weight norm": ("--weight-norm l2", ["weight"]),
    "sync_norm": ("--norm layer model.sync_norm=true", ["sync_norm", "layer"]),
    "an unknown optimizer": ("'regime.phases=[{epoch: 0, optimizer: SDG, lr: 0.1}]'", ["SDG", "SGD"]),
    "an unknown setting": (
        "'regime.phases=[{epoch: 0, optimizer: SGD, lr: 0.1, momentun: 0.9}]'",
        ["phases[0].momentun", "'momentum'"],
    ),
    "code in a phase": ("'regime.phases=[{epoch: 0, lr: 0.1, step_lambda: \"lambda t: 1\"}]'", ["step_lambda"]),
    "phases and a name": ("'regime.phases=[{epoch: 0}]' regime.name=cosine", ["regime", "phases", "'cosine'"]),
    "resume of no run": ("--resume empty", ["empty", "no run"]),
    "resume with another model": ("--resume good --model resnet20", ["model.name", "'resnet8'", "'resnet20'"]),
    "resume with another seed": ("--resume good seed=5", ["seed", "5"]),
    "resume with a config": ("--resume good --config twice.yaml", ["--config", "leave"]),
    "extend without resume": ("--extend", ["--extend", "--resume"]),
    "unknown option": ("--nrom l1", ["--nrom", "--norm"]),
    "an option without its value": ("--norm", ["--norm"]),
}


@pytest.mark.parametrize(("arguments", "words"), TRAIN.values(), ids=TRAIN.keys())
def test_train_refuses_in_one_line_and_creates_nothing(
    arguments: str, words: list[str], place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = everything_in(place)
    (line,) = errors(2, ["train", *shlex.split(arguments)], capsys)
    for word in words:
        assert word in line
    assert len(line) < 400
    assert everything_in(place) == before


def test_all_mistakes_are_told_at_once(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = "train --config twice.yaml --model resnt20 --norm l7 --epochs 0 --lr x --dataset digit nope=1"
    lines = errors(2, shlex.split(arguments), capsys)
    starts = ["twice.yaml, line 2", "nope", "train.epochs", "regime.lr", "model.name", "model.norm", "data.name"]
    assert sorted(line.removeprefix("error: ").split(":")[0] for line in lines) == sorted(starts)


OTHER = {
    "unknown command": ("trian", ["'trian'", "'train'"]),
    "eval of nothing": ("eval none", ["none"]),
    "eval of a folder that is no run": ("eval empty", ["empty"]),
    "eval of a file": ("eval twice.yaml", ["twice.yaml"]),
    "eval with batch size 0": ("eval good --batch-size 0", ["data.batch_size", "value 0", "from 1"]),
    "eval on an unknown device": ("eval good --device gpu", ["device", "'gpu'", "cuda:N"]),
    "eval with workers in words": ("eval good --workers few", ["data.workers", "'few'", "from 0"]),
    "eval without a run": ("eval", ["RUN"]),
    "predict with no run": ("predict empty a.png", ["empty"]),
    "predict of a missing image": ("predict good none.png", ["none.png"]),
    "predict of a folder without images": ("predict good empty", ["empty"]),
    "predict as CSV and JSON": ("predict good a.png --csv --json", ["--csv", "--json"]),
    "predict of no image": ("predict good", ["IMAGE"]),
    "predict zero classes": ("predict good one --top 0", ["--top", "'0'", "from 1"]),
    "predict more digits than Python reads": ("predict good one --top " + "9" * 5000, ["--top", "from 1"]),
    "verify more digits than Python reads": ("verify good --steps " + "9" * 5000, ["--steps", "from 1"]),
    "processes of more digits than Python reads": ("train --processes " + "9" * 5000, ["--processes", "from 1"]),
    "rounds of more digits than Python reads": ("bench norms --repeats " + "9" * 5000, ["--repeats", "from 1"]),
    "workers of more digits than Python reads": ("bench input --workers 0," + "9" * 5000, ["--workers", "from 0"]),
    "classes of more digits than Python reads": (
        "import one out.safetensors --model resnet20 --num-classes " + "9" * 5000,
        ["--num-classes", "from 1"],
    ),
    "report of no run": ("report empty", ["empty"]),
    "compare with one that is no run": ("compare good empty", ["empty"]),
    "compare into a folder": ("compare good --output empty", ["empty", "folder"]),
    "list of an unknown kind": ("list modles", ["'modles'", "'models'"]),
    "list with a filter that nothing passes": ("list models --filter xyz", ["'xyz'"]),
}


@pytest.mark.parametrize(("arguments", "words"), OTHER.values(), ids=OTHER.keys())
def test_other_commands_refuse_in_one_line_and_create_nothing(
    arguments: str, words: list[str], place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = everything_in(place)
    (line,) = errors(2, arguments.split(), capsys)
    for word in words:
        assert word in line
    assert everything_in(place) == before


@pytest.mark.parametrize("part", ["model.safetensors", "training.safetensors", "state.json"])
def test_a_checkpoint_that_was_cut_short_is_named(
    part: str, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "cut"
    shutil.copytree(place / "good", run, symlinks=True)
    file = (run / "checkpoints" / "last").resolve() / part
    os.truncate(file, file.stat().st_size // 2)
    before = everything_in(run)
    (line,) = errors(2, ["eval", str(run)], capsys)
    assert part in line
    found = errors(2, ["train", "--resume", str(run)], capsys)
    assert "--restart" in found[0]
    assert any(part in line for line in found[1:])
    assert everything_in(run) == before


def test_a_text_named_jpg_ends_training_with_its_path_and_keeps_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for label in ("cat", "dog"):
        (tmp_path / "pets" / label).mkdir(parents=True)
        for i in range(6):
            Image.fromarray(np.full((20, 20, 3), 40 * i, np.uint8)).save(tmp_path / "pets" / label / f"{i}.png")
    broken = tmp_path / "pets" / "dog" / "broken.jpg"
    broken.write_text("not an image")
    arguments = f"train --dataset imagefolder:{tmp_path / 'pets'} --model resnet20 --device cpu --name run".split()
    arguments += [f"--output={tmp_path}", "--epochs=2", "data.input_size=16", "data.holdout=0.2", "--batch-size=4"]
    (line,) = errors(2, arguments, capsys)
    assert str(broken) in line
    assert str(broken) in (tmp_path / "run" / "log.txt").read_text()


def test_an_output_below_a_file_is_a_storage_error(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = everything_in(place)
    (line,) = errors(74, ["train", "--output", "twice.yaml/runs", "--epochs", "1", "--device", "cpu"], capsys)
    assert "twice.yaml" in line
    (line,) = errors(74, ["compare", "good", "--output", "twice.yaml/page.html"], capsys)
    assert "twice.yaml" in line
    assert everything_in(place) == before


@pytest.mark.slow
def test_a_full_disk_is_a_storage_error_and_leaves_the_last_checkpoint(
    command: Callable, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "full"
    shutil.copytree(place / "good", run, symlinks=True)
    # Every file but the weights fits; from the second epoch on they do not.
    limit = (run / "checkpoints" / "last" / "model.safetensors").stat().st_size // 2
    process = command(
        *["train", "--resume", str(run), "--epochs", "2", "--extend", "--device", "cpu"],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    _, error = process.communicate(timeout=120)
    assert process.returncode == 74, error
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert main(["eval", str(run), "--device", "cpu"]) == 0
