"""Whole runs on two ranks: one record, one voice, any rank's failure, and going on with another number of ranks."""

import csv
import json
import re
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from norm_matters.core.config import load_config
from norm_matters.models.trust import trust_file
from norm_matters.record import TIMING_COLUMNS, find_checkpoint, load_checkpoint, read_measurements
from norm_matters.run import CHECKS, resume, train

WORKER = Path(__file__).with_name("run_worker.py")
MODEL = """
import torch
from torch import nn


class Flat(nn.Module):
    def forward(self, x):
        return x.double().flatten(1)[:, ::4]


def model(num_classes, in_channels):
    layers = [Flat(), nn.Linear(16, 16), nn.BatchNorm1d(16), nn.ReLU(), DROPOUT nn.Linear(16, num_classes)]
    return nn.Sequential(*layers).double()
"""


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> Path:
    """Files with a small network in float64, with dropout and without."""
    folder = tmp_path_factory.mktemp("models")
    (folder / "plain.py").write_text(MODEL.replace("DROPOUT", ""))
    (folder / "dropout.py").write_text(MODEL.replace("DROPOUT", "nn.Dropout(0.3),"))
    for file in folder.iterdir():
        trust_file(file)
    return folder


def settings(model: Path, output: Path, *more: str, epochs: int = 2) -> list[str]:
    listed = ["model.norm=l1", "model.sync_norm=true", "data.workers=0", "data.batch_size=93", "regime.name=constant"]
    return [f"model.name={model}", f"output={output}", f"train.epochs={epochs}", "device=cpu", *listed, *more]


def alone(model: Path, output: Path, *more: str, epochs: int = 2) -> Path:
    """The folder of a run in this process."""
    config = load_config(overrides=settings(model, output, *more, epochs=epochs), checks=CHECKS)
    return train(config).folder


def only_run(output: Path) -> Path:
    (folder,) = output.iterdir()
    return folder


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "results.csv").open(newline="") as stream:
        return [{key: row[key] for key in row if key not in TIMING_COLUMNS} for row in csv.DictReader(stream)]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "checkpoints" / "last" / "model.safetensors")


def assert_close(a: Path, b: Path, limit: float) -> None:
    own, other = weights(a), weights(b)
    assert own.keys() == other.keys()
    for name, tensor in own.items():
        torch.testing.assert_close(tensor, other[name], rtol=limit, atol=limit)
    for row, same in zip(table(a), table(b), strict=True):
        for key, value in row.items():
            if value:
                assert float(value) == pytest.approx(float(same[key]), rel=limit, abs=limit), key


@pytest.fixture(scope="session")
def two_ranks(run_ranks) -> Callable[..., list[tuple[int, str, str]]]:
    """Run `norm-matters train` with these settings on two ranks."""

    def run(*arguments: str, how: str = "no", world: int = 2) -> list[tuple[int, str, str]]:
        return run_ranks(world, [WORKER, how, "train", *arguments])

    return run


def test_two_ranks_make_one_record_that_equals_one_process(models, tmp_path, two_ranks):
    expected = alone(models / "plain.py", tmp_path / "one")
    first, second = two_ranks(*settings(models / "plain.py", tmp_path / "two"))
    assert (first[0], second[0]) == (0, 0), first[2] + second[2]
    assert second[1:] == ("", "")
    assert first[2] == ""
    assert "2 processes" in first[1]
    assert "accuracy" in first[1]
    folder = only_run(tmp_path / "two")
    assert_close(folder, expected, 1e-9)
    # Evaluation alone, of the same weights, is the same to the last digit; see the test of the engine.
    assert {path.name for path in folder.iterdir()} == {path.name for path in expected.iterdir()}
    provenance = json.loads((folder / "provenance.json").read_text())
    assert provenance["processes"] == {"world": 2, "launcher": "torchrun"}
    state = load_checkpoint((folder / "checkpoints" / "last").resolve()).state
    assert state["training"]["world"] == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "status", "words"),
    [
        ("1:prepare:user", 2, "error: rank 1: an image cannot be read\n"),
        ("1:prepare:bug", 1, "error: rank 1: TypeError: a bug\n"),
        ("0:save:storage", 74, "error: disk full\n"),
    ],
)
def test_what_goes_wrong_on_one_rank_ends_all_alike(how, status, words, models, tmp_path, two_ranks):
    """These are met where the ranks tell each other: all end at once with the same status, and one speaks."""
    found = two_ranks(*settings(models / "plain.py", tmp_path / "runs"), how=how)
    assert [rank[0] for rank in found] == [status, status]
    assert found[0][2].endswith(words)
    assert "error:" not in found[1][2]  # of a bug the rank that has it shows the traceback
    if "prepare" in how:
        assert not (tmp_path / "runs").exists()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["1:step:user", "0:step:bug", "1:step:kill", "1:step:exit"])
def test_a_rank_that_falls_away_takes_the_other_with_it(how, models, tmp_path, two_ranks):
    start = time.monotonic()
    found = two_ranks(*settings(models / "plain.py", tmp_path / "runs"), how=how)
    assert time.monotonic() - start < 60
    number, _, what = how.split(":")
    culprit, survivor = found[int(number)], found[1 - int(number)]
    assert survivor[0] == 75
    assert survivor[2] == f"error: rank {1 - int(number)}: lost another rank, whose own message says why\n"
    assert culprit[0] == {"user": 2, "bug": 1, "kill": -9, "exit": 0}[what]
    if what in ("user", "bug"):
        assert ("Traceback" in culprit[2]) == (what == "bug")
        assert culprit[2].endswith(
            f"error: rank {number}: {'an image' if what == 'user' else 'TypeError: a bug'}"
            + (" cannot be read\n" if what == "user" else "\n")
        )


@pytest.mark.slow
def test_wrong_settings_are_told_once(tmp_path, two_ranks):
    found = two_ranks("--norm", "l9", "--output", str(tmp_path / "runs"))
    assert [rank[0] for rank in found] == [2, 2]
    assert found[0][2].startswith("error: model.norm: unknown norm 'l9'")
    assert found[1][2] == ""


@pytest.mark.slow
def test_a_batch_must_have_an_image_for_every_rank(models, tmp_path, two_ranks):
    more = ("data.batch_size=9", "train.accumulate=5")
    found = two_ranks(*settings(models / "plain.py", tmp_path / "runs", *more))
    assert [rank[0] for rank in found] == [2, 2]
    assert "data.batch_size: 9 images per batch taken in chunks of 1 at least" in found[0][2]


@pytest.mark.slow
def test_statistics_of_the_ranks_are_brought_together_and_the_difference_is_told(models, tmp_path, two_ranks):
    found = two_ranks(*settings(models / "plain.py", tmp_path / "runs", "model.sync_norm=false"))
    assert found[0][0] == 0, found[0][2]
    log = (only_run(tmp_path / "runs") / "log.txt").read_text()
    assert log.count("running statistics: those of the ranks differed by up to") == 2


def test_a_launch_with_a_name_continues_what_it_began(models, tmp_path, monkeypatch):
    monkeypatch.setenv("NORM_MATTERS_LAUNCH", "night")
    first = alone(models / "plain.py", tmp_path / "runs", "train.instruments=none")
    assert alone(models / "plain.py", tmp_path / "runs", "train.instruments=none") == first
    (event,) = json.loads((first / "provenance.json").read_text())["events"]
    assert (event["event"], event["epoch"]) == ("restarted", 2)
    assert alone(models / "plain.py", tmp_path / "runs", "train.instruments=none", "seed=1") != first
    monkeypatch.setenv("NORM_MATTERS_LAUNCH", "day")
    assert alone(models / "plain.py", tmp_path / "runs", "train.instruments=none") != first


@pytest.mark.slow
def test_all_instruments_measure_on_ranks(models, tmp_path, two_ranks):
    """Some of them run the network by themselves, synchronised norms included: on every rank, equally often."""
    found = two_ranks(*settings(models / "plain.py", tmp_path / "two", "train.instruments=all"))
    assert found[0][0] == 0, found[0][2]
    expected = read_measurements(alone(models / "plain.py", tmp_path / "one", "train.instruments=all")).columns
    measured = read_measurements(only_run(tmp_path / "two")).columns
    assert measured.keys() == expected.keys()
    for name in ("weight_norm", "angle"):
        for layer, values in expected[name].items():
            np.testing.assert_allclose(measured[name][layer], values, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (2, 3), (2, 2)])
def test_a_run_goes_on_with_another_number_of_ranks(before, after, models, tmp_path, two_ranks):
    """Without dropout: to rounding. With as many ranks as before: to the bit."""
    expected = alone(models / "plain.py", tmp_path / "whole", epochs=4)
    (tmp_path / "cut").mkdir()
    if before == 1:
        folder = alone(models / "plain.py", tmp_path / "cut", "train.instruments=none")
    else:
        found = two_ranks(*settings(models / "plain.py", tmp_path / "cut", "train.instruments=none"))
        assert found[0][0] == 0, found[0][2]
        folder = only_run(tmp_path / "cut")
    if after == 1:
        resume(folder, options={"train.epochs": 4})
    else:
        for status, _, errors in two_ranks("--resume", str(folder), "--epochs", "4", world=after):
            assert status == 0, errors
    assert_close(folder, expected, 1e-6)
    said = "continued on" in (folder / "log.txt").read_text()
    assert said == (before != after)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("more", [(), ("train.shard_optimizer=true",)])
def test_a_resumed_run_with_dropout_equals_the_whole_one_to_the_bit(world, more, models, tmp_path, two_ranks):
    """Each rank's random streams go on; its norms' statistics, and the optimizer's state, are those that were saved."""
    more = ("model.sync_norm=false", "regime.name=adamw", *more)
    arguments = settings(models / "dropout.py", tmp_path / "whole", *more, epochs=4)
    assert [rank[0] for rank in two_ranks(*arguments, world=world)] == [0] * world
    halted = settings(models / "dropout.py", tmp_path / "cut", *more, epochs=4)
    found = two_ranks(*halted, how="0:save:storage", world=world)
    assert {rank[0] for rank in found} == {74}
    folder = only_run(tmp_path / "cut")
    found = two_ranks("--resume", str(folder), world=world)
    assert [rank[0] for rank in found] == [0] * world, found[0][2]
    whole = only_run(tmp_path / "whole")
    for part in ("model", "training"):
        own, other = (load_file(path / "checkpoints" / "last" / f"{part}.safetensors") for path in (folder, whole))
        assert own.keys() == other.keys()
        assert all(torch.equal(tensor, other[name]) for name, tensor in own.items())
    assert table(folder) == table(whole)


@pytest.mark.slow
def test_a_sharded_optimizer_is_saved_whole(models, tmp_path, two_ranks):
    """One process goes on from it, without the option."""
    adam = "regime.name=adamw"
    expected = alone(models / "plain.py", tmp_path / "whole", adam, "regime.lr=0.001", epochs=4)
    arguments = settings(
        models / "plain.py", tmp_path / "cut", adam, "regime.lr=0.001", "train.shard_optimizer=true", epochs=4
    )
    found = two_ranks(*arguments, how="0:save:storage")
    assert {rank[0] for rank in found} == {74}
    folder = only_run(tmp_path / "cut")
    resume(folder, overrides=["train.shard_optimizer=false"])
    assert_close(folder, expected, 1e-6)


def unlike_ranks(models: Path, output: Path) -> list[str]:
    # Norms that differ between the ranks, and an optimizer of which each has a part.
    own = ["model.sync_norm=false", "train.shard_optimizer=true", "train.accumulate=2", "train.instruments=all"]
    return settings(models / "dropout.py", output, *own)


def assert_same_bits(a: Path, b: Path) -> None:
    assert table(a) == table(b)
    first, second = (load_checkpoint(find_checkpoint(run, "last")) for run in (a, b))
    for part in ("model", "training"):
        tensors, others = getattr(first, part), getattr(second, part)
        assert tensors.keys() == others.keys()
        assert [name for name in tensors if not torch.equal(tensors[name], others[name])] == []
    assert first.state["training"] == second.state["training"]
    assert (a / "instruments.f32").read_bytes() == (b / "instruments.f32").read_bytes()
    assert (a / "trace.csv").read_bytes() == (b / "trace.csv").read_bytes()
    spreads = [re.findall(r"running statistics.*", (run / "log.txt").read_text()) for run in (a, b)]
    assert spreads[0] == spreads[1] != []


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_one_rank_is_asked_and_all_stop_alike(models, tmp_path, two_ranks, monkeypatch) -> None:
    found = two_ranks(*unlike_ranks(models, tmp_path / "whole"))
    assert [rank[0] for rank in found] == [0, 0], found
    whole = only_run(tmp_path / "whole")
    monkeypatch.setenv("NORM_MATTERS_FAULTS", "step:1:5:term")
    found = two_ranks(*unlike_ranks(models, tmp_path / "left"))
    assert [rank[0] for rank in found] == [75, 75], found
    run = only_run(tmp_path / "left")
    # Told after step 5, known to all after step 6; the first rank speaks.
    assert found[0][2].startswith("preempted by SIGTERM after step 6 of 30; continue with: norm-matters train --resume")
    assert found[1][2] == ""
    assert json.loads((run / "status.json").read_text())["state"] == "preempted"
    monkeypatch.setenv("NORM_MATTERS_FAULTS", "eval:1:1:term")
    found = two_ranks("--resume", str(run))
    assert [rank[0] for rank in found] == [75, 75], found
    assert "after step 15 of 30" in found[0][2]
    assert not (run / "results.csv").exists()
    monkeypatch.delenv("NORM_MATTERS_FAULTS")
    found = two_ranks("--resume", str(run))
    assert [rank[0] for rank in found] == [0, 0], found
    assert_same_bits(run, whole)
