"""Recorded norms, and what stands in for decay, on two ranks: what one process gives, to rounding."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from norm_matters.core.config import load_config
from norm_matters.models.trust import trust_file
from norm_matters.record.weight_norms import read_weight_norms
from norm_matters.run import CHECKS, train

WORKER = Path(__file__).with_name("run_worker.py")
MODEL = """
from torch import nn


class Flat(nn.Module):
    def forward(self, x):
        return x.double().flatten(1)[:, ::4]


def model(num_classes, in_channels):
    layers = [Flat(), nn.Linear(16, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, num_classes)]
    return nn.Sequential(*layers).double()
"""
FORMS = [
    {"form": "lr-correction", "every": "step", "decay": 0.01},
    {"form": "norm-schedule", "lr": 0.1},
    {"form": "exponential-lr", "decay": 0.01},
]
COMMON = [
    "model.norm=l1",
    "model.sync_norm=true",
    "data.workers=0",
    "data.batch_size=93",
    "train.epochs=2",
    "device=cpu",
]


def phases(form: dict | None) -> str:
    replaced = {"weight_decay": 0.01} if form is None else {"instead_of_decay": form}
    return json.dumps([{"epoch": 0, "lr": 0.1, "momentum": 0.9, **replaced}, {"epoch": 1, "lr": 0.01}])


@pytest.mark.slow
@pytest.mark.parametrize("shards", ["false", "true"], ids=["whole", "shards"])
@pytest.mark.parametrize("form", FORMS, ids=lambda form: form["form"])
def test_two_ranks_do_what_one_does(tmp_path: Path, run_ranks, form: dict, shards: str) -> None:
    file = tmp_path / "plain.py"
    file.write_text(MODEL)
    trust_file(file)
    shared = [*COMMON, f"model.name={file}", "train.record_norms=step"]

    def settings(name: str, *more: str) -> list[str]:
        return [*shared, f"output={tmp_path}", f"name={name}", *more]

    on = train(load_config(overrides=settings("on", f"regime.phases={phases(None)}"), checks=CHECKS)).folder
    own = [f"regime.phases={phases(form)}", f"train.shard_optimizer={shards}"]
    own += [] if form["form"] == "exponential-lr" else [f"regime.norms={on}"]
    alone = train(load_config(overrides=settings("alone", *own), checks=CHECKS)).folder
    ended = run_ranks(2, [WORKER, "no", "train", *settings("ranks", *own)])
    assert [status for status, _, _ in ended] == [0, 0], ended
    first, second = (load_file(tmp_path / name / "checkpoints/last/model.safetensors") for name in ("alone", "ranks"))
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], rtol=1e-9, atol=1e-11)
    norms, others = read_weight_norms(alone), read_weight_norms(tmp_path / "ranks")
    for epoch, (layers, _) in norms.items():
        for layer, rows in layers.items():
            assert rows.dtype == np.float64
            np.testing.assert_allclose(rows, others[epoch][0][layer], rtol=1e-9)
