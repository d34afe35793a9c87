"""The commands `data ...`: what they print, what they write, and their exit status."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from norm_matters.cli import main


@pytest.fixture(autouse=True)
def photos(tmp_path, monkeypatch) -> Path:
    """A folder `photos` of two classes in the current one."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for part, count in (("train", 10), ("val", 4)):
        for number in range(count):
            path = tmp_path / "photos" / part / "ab"[number % 2] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng([number, count]).integers(0, 256, (20, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(path)
    return tmp_path / "photos"


def said(capsys, *arguments: str, status: int = 0) -> tuple[str, str]:
    found = main(["data", *arguments])
    out, err = capsys.readouterr()
    assert found == status, err
    return out, err


def test_pack_check_stats_and_train(capsys, tmp_path):
    out, err = said(capsys, "pack", "photos", "out", "--images-per-shard", "4", "--workers", "0")
    assert out.startswith("out: 10 train, 4 validation images in 4 shards, ")
    assert "train on it with --dataset webdataset:out" in out
    assert err == ""
    command = json.loads((tmp_path / "out" / "dataset.json").read_text())["command"]
    assert command[:4] == ["norm-matters", "data", "pack", "photos"]
    out, _ = said(capsys, "check", "out", "--workers", "0")
    assert out == "out: 14 images in 4 shards are as they were written\n"
    out, _ = said(capsys, "stats", "out", "--workers", "0", "--output", "counted")
    assert "train: 10 images" in out
    assert (tmp_path / "counted" / "classes.csv").exists()
    out, _ = said(capsys, "stats", "photos", "--json", "--workers", "0")
    assert json.loads(out)["parts"]["train"]["per_class"] == [
        {"label": 0, "class": "a", "images": 5},
        {"label": 1, "class": "b", "images": 5},
    ]
    options = ["--model", "resnet8", "--epochs", "1", "--batch-size", "5", "--device", "cpu", "data.input_size=16"]
    assert main(["train", "--dataset", "webdataset:out", *options, "--output", "runs", "--name", "r"]) == 0
    assert main(["eval", "runs/r"]) == 0


@pytest.mark.parametrize(
    ("options", "shards"),
    [([], 2), (["--images-per-shard", "5"], 3), (["--images-per-shard", "4"], 4), (["--shard-size", "1kB"], 14)],
)
def test_a_dry_run_writes_nothing(capsys, tmp_path, options, shards):
    foretold, _ = said(capsys, "pack", "photos", "out", *options, "--dry-run")
    assert "10 train, 4 validation images, 2 classes" in foretold
    assert f"about {shards} webdataset shards, about 0.0 MB; nothing is written" in foretold
    assert not (tmp_path / "out").exists()
    out, _ = said(capsys, "pack", "photos", "out", *options, "--workers", "0")
    assert f"images in {shards} shards" in out


def test_help_and_no_command(capsys):
    out, _ = said(capsys)
    assert "pack" in out
    assert "stats" in out


@pytest.mark.parametrize(
    ("arguments", "problems"),
    [
        (["pack", "photos", "out", "--format", "zip", "--quality", "101"], ["--format", "--quality"]),
        (["pack", "photos", "out", "--resize", "x", "--seed", "-1", "--workers", "two"], ["--resize", "--seed", "--w"]),
        (["pack", "photos", "out", "--shard-size", "big"], ["--shard-size: value 'big'"]),
        (["pack", "photo", "out"], ["'photo' is neither a folder nor a dataset"]),
        (["pack", "photos", "photos"], ["photos is not empty (it has train); choose a new folder"]),
        (["check", "photos"], ["photos/dataset.json is missing"]),
        (["stats", "photos", "--workers", "x"], ["--workers: value 'x'"]),
        (["stats", "webdataset:none-*.tar"], ["dataset 'webdataset:none-*.tar': none-*.tar is missing"]),
    ],
)
def test_wrong_inputs_are_lines(capsys, arguments, problems):
    out, err = said(capsys, *arguments, status=2)
    assert out == ""
    lines = err.splitlines()
    assert len(lines) == len(problems)
    for line, problem in zip(lines, problems, strict=True):
        assert line.startswith(f"error: {problem}")


def test_a_broken_image_ends_it_unless_it_is_skipped(capsys, photos):
    (photos / "train" / "a" / "x.jpg").write_text("no image")
    _, err = said(capsys, "pack", "photos", "out", "--workers", "0", status=2)
    assert "x.jpg: no image of a known format" in err
    out, err = said(capsys, "pack", "photos", "out", "--workers", "0", "--bad-images", "skip")
    assert err.startswith("skipped: ")
    assert "10 train" in out
