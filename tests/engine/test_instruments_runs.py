"""Instruments in whole runs: recorded every epoch, without changing the run, and the same after a kill."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import norm_matters as nm
from norm_matters.core.config import load_config
from norm_matters.core.errors import UserError
from norm_matters.models.trust import trust_file
from norm_matters.record import (
    TIMING_COLUMNS,
    find_checkpoint,
    load_checkpoint,
    read_measurements,
)
from norm_matters.run import CHECKS, RunResult, resume, train

MODEL = """
import torch.nn as nn


def model(num_classes, in_channels):
    model = nn.Sequential(
        nn.Conv2d(in_channels, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.3),
        nn.Conv2d(8, 16, 3, stride=2), nn.BatchNorm2d(16), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, num_classes),
    )
    model.regime = [
        {"epoch": 0, "optimizer": "SGD", "lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4},
        {"epoch": 2, "lr": 0.03},
    ]
    return model
"""
FILES = ("instruments.json", "instruments.f32")


def run(folder: Path, name: str, *overrides: str) -> RunResult:
    (folder / "own.py").write_text(MODEL)
    trust_file(folder / "own.py")
    common = [
        f"model.name={folder / 'own.py'}",
        "model.norm=l1",
        "data.name=digits",
        "data.batch_size=256",
        "device=cpu",
    ]
    place = [f"output={folder}", f"name={name}", "train.epochs=4", "deterministic=true"]
    return train(load_config(overrides=[*common, *place, *overrides], checks=CHECKS))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module", params=["default", "all"])
def measured(request: pytest.FixtureRequest, folder: Path) -> Path:
    return run(folder, request.param, f"train.instruments={request.param}").folder


def table(run: Path) -> list[dict[str, str]]:
    with (run / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [{key: value for key, value in row.items() if key not in TIMING_COLUMNS} for row in rows]


def same_training(a: Path, b: Path) -> bool:
    first, second = (load_checkpoint(find_checkpoint(run, prefer="last")) for run in (a, b))
    return all(
        one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
        for one, other in ((first.model, second.model), (first.training, second.training))
    )


def test_instruments_change_no_bit_of_a_run(folder: Path, measured: Path) -> None:
    none = folder / "none"
    if not none.exists():
        run(folder, "none", "train.instruments=none")
    assert not any((none / file).exists() for file in FILES)
    assert table(measured) == table(none)
    assert same_training(measured, none)


def test_every_epoch_is_recorded(measured: Path) -> None:
    found = read_measurements(measured)
    assert found is not None
    assert found.epochs.tolist() == [1, 2, 3, 4]
    weights, norms = ["0", "4", "9"], ["1", "5"]
    expected = dict.fromkeys(["weight_norm", "effective_lr", "angle", "layer_angle", "equilibrium"], weights)
    expected |= {"sigma": norms}
    if measured.name == "all":
        names = ["input_max", "input_sum_abs", "input_sum_squares", "input_outside_float16"]
        expected |= dict.fromkeys(names, norms) | {"scale_change": weights}
    assert {instrument: list(layers) for instrument, layers in found.columns.items()} == expected
    model = load_checkpoint(find_checkpoint(measured, prefer="last")).model
    last = {(name, layer): values[-1] for name, layers in found.columns.items() for layer, values in layers.items()}
    for layer in weights:
        lengths = model[f"{layer}.weight"].double().flatten(1).norm(dim=1)
        np.testing.assert_array_equal(last["weight_norm", layer], lengths.numpy().astype(np.float32))
    for values in last.values():
        assert np.isfinite(values).all()
    equilibria = found.columns["equilibrium"]["4"][:, 0]
    np.testing.assert_allclose(equilibria, np.sqrt(2 * np.array([0.1, 0.1, 0.03, 0.03]) * 1e-4 / 1.9), rtol=1e-6)
    if measured.name == "all":
        assert last["scale_change", "4"] < 1e-3 < 0.1 < last["scale_change", "9"]
    loaded = nm.load_run(measured, device="cpu").instruments
    assert loaded is not None
    np.testing.assert_array_equal(loaded.columns["sigma"]["5"], found.columns["sigma"]["5"])


def test_an_interrupted_run_has_the_same_bytes_as_an_undisturbed_one(folder: Path, measured: Path) -> None:
    level = measured.name
    half = run(folder, f"half-{level}", f"train.instruments={level}", "train.epochs=2").folder
    # As if it had been killed after the table's next rows, in the middle of writing the instruments'.
    with (half / "instruments.f32").open("ab") as file:
        rows = (measured / "instruments.f32").read_bytes()
        file.write(rows[len(rows) // 2 : -13])
    resume(half, overrides=["train.epochs=4"])
    for file in FILES:
        assert (half / file).read_bytes() == (measured / file).read_bytes()
    assert same_training(half, measured)


def test_a_run_from_before_there_were_instruments_has_them_from_then_on(folder: Path) -> None:
    old = run(folder, "old", "train.epochs=2").folder
    for file in FILES:
        (old / file).unlink()
    config = (old / "config.yaml").read_text().splitlines()
    (old / "config.yaml").write_text("\n".join(line for line in config if "instruments" not in line))
    resume(old, overrides=["train.epochs=3"])
    found = read_measurements(old)
    assert found is not None
    assert found.epochs.tolist() == [3]


def test_damage_stops_a_resume_with_a_remedy_and_does_not_keep_anybody_from_the_network(folder: Path) -> None:
    damaged = folder / "damaged"
    shutil.copytree(run(folder, "short", "train.epochs=2").folder, damaged, symlinks=True)
    layout = json.loads((damaged / "instruments.json").read_text())
    layout["columns"][0]["layer"] = "other"
    (damaged / "instruments.json").write_text(json.dumps(layout))
    with pytest.raises(UserError, match=r"move instruments\.json and instruments\.f32 away"):
        resume(damaged, overrides=["train.epochs=3"])
    (damaged / "instruments.json").write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        _ = nm.load_run(damaged, device="cpu").instruments
    for file in FILES:
        (damaged / file).unlink()
    assert resume(damaged, overrides=["train.epochs=3"]).last["epoch"] == 3
    alone = shutil.copytree(find_checkpoint(damaged, prefer="last"), folder / "alone")
    assert nm.load_run(alone, device="cpu").instruments is None
