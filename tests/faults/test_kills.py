"""Killed at any moment, a run goes on to the same bits, and nobody ever meets a broken file; see `campaign.kills`.

How many: a few here, in `make test`; hundreds in `make test-slow`; as many as one likes by `benchmarks/kill.py`.
"""

from pathlib import Path
from typing import Any

import pytest

from norm_matters.record import read_table

EVERY_THREE_STEPS = "train.checkpoint_every=3st"
# What a broken run of the kind is found out by.
NOTICED = {
    "save-in-place": "a reader met",
    "write-in-place": "a reader met",
    "forget-random-streams": "at the end: other weights",
    "forget-momentum": "at the end: other weights",
}

# The gradient that goes through is as it was, unless it is too large for half precision: the loss scale must halve.
NARROW = """
from torch import nn


class Narrow(nn.Module):
    def forward(self, x):
        if x.requires_grad:
            x.register_hook(lambda gradient: gradient * 4096 / 4096)
        return x


def model(num_classes, in_channels):
    return nn.Sequential(
        nn.Conv2d(in_channels, 16, 3, stride=2), nn.BatchNorm2d(16), nn.ReLU(), nn.Dropout(0.2),
        Narrow(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, num_classes),
    )
"""


def check(found: dict[str, Any], kills: int, ranks: int = 1) -> None:
    """A campaign that did what it was to do, and met nothing wrong."""
    assert found["problems"] == []
    assert found["kills"] == kills
    assert found["early"] < kills / 2, "the kills came before the runs had begun"
    assert found["reads"] > kills
    assert len(found["survivors"]) == kills * (ranks - 1)
    # One that was killed while they met lets the other wait, for its timeout more than once.
    assert max(found["survivors"], default=0) < 45


@pytest.mark.timeout(900)
def test_kills_at_random_moments(zygote, tmp_path: Path) -> None:
    check(zygote.ask("kills", folder=tmp_path, count=40, seed=1, more=[EVERY_THREE_STEPS]), 40)


@pytest.mark.timeout(600)
def test_kills_of_one_of_two_ranks(zygote, tmp_path: Path) -> None:
    found = zygote.ask("kills", folder=tmp_path, count=10, seed=2, ranks=2, more=[EVERY_THREE_STEPS])
    check(found, 10, ranks=2)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "more",
    [
        ["train.checkpoint_every=3st"],
        ["train.checkpoint_every=1ep", "train.accumulate=2"],
        ["train.checkpoint_every=2st", "train.keep=4"],
    ],
    ids=["steps", "epochs", "keep-four"],
)
def test_fifty_kills_each(more: list[str], zygote, tmp_path: Path) -> None:
    check(zygote.ask("kills", folder=tmp_path, count=50, seed=3, more=more), 50)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_fifty_kills_of_a_run_whose_loss_scale_changes(zygote, tmp_path: Path) -> None:
    (tmp_path / "narrow.py").write_text(NARROW)
    more = [f"model.name={tmp_path / 'narrow.py'}", "train.precision=amp-fp16", "train.nonfinite=rollback"]
    found = zygote.ask("kills", folder=tmp_path, count=50, seed=3, more=["train.checkpoint_every=5st", *more])
    check(found, 50)
    skipped = [row["skipped_steps"] for row in read_table(tmp_path / "whole" / "run" / "results.csv")]
    assert skipped[0], "no step overflowed"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_forty_kills_of_one_of_two_ranks(zygote, tmp_path: Path) -> None:
    found = zygote.ask("kills", folder=tmp_path, count=40, seed=4, ranks=2, more=[EVERY_THREE_STEPS])
    check(found, 40, ranks=2)


@pytest.mark.slow
@pytest.mark.parametrize("part", [(0.0, 0.2), (0.8, 1.0)], ids=["start", "end"])
def test_kills_while_it_starts_and_while_it_ends(part: tuple[float, float], zygote, tmp_path: Path) -> None:
    """Restoring, bringing the record back, the last checkpoint, the report."""
    found = zygote.ask(
        "kills", folder=tmp_path, count=30, seed=5, part=part, mutation="draw-pages", more=[EVERY_THREE_STEPS]
    )
    assert found["problems"] == []


def test_a_kill_before_some_calls_that_touch_the_disk(zygote, tmp_path: Path) -> None:
    found = zygote.ask("each_call", folder=tmp_path, every=29, more=[EVERY_THREE_STEPS])
    assert found["problems"] == []
    assert found["kills"] >= 5


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_kill_before_each_call_that_touches_the_disk(zygote, tmp_path: Path) -> None:
    found = zygote.ask("each_call", folder=tmp_path, more=[EVERY_THREE_STEPS])
    assert found["problems"] == []
    assert found["kills"] > 120


@pytest.mark.parametrize(
    "mutation",
    [
        "save-in-place",
        "forget-random-streams",
        pytest.param("write-in-place", marks=pytest.mark.slow),
        pytest.param("forget-momentum", marks=pytest.mark.slow),
    ],
)
def test_the_harness_is_not_blind(mutation: str, zygote, tmp_path: Path) -> None:
    """A run that is broken in this way must be found out by a few kills, a few more where the machine is busy."""
    problems, seed = list[str](), 6
    while not any(NOTICED[mutation] in problem for problem in problems):
        assert seed < 10, problems
        folder = tmp_path / str(seed)
        folder.mkdir()
        broken = {"mutation": mutation, "part": (0.3, 0.9), "more": [EVERY_THREE_STEPS]}
        problems += zygote.ask("kills", folder=folder, count=5, seed=seed, **broken)["problems"]
        seed += 1
    # By what it did: a mutation that fits the code no more ends the run instead, with 99 or 1.
    assert not [problem for problem in problems if "it ended with [99]" in problem or "it ended with [1]" in problem]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mutation", "noticed"),
    [("keep-later-rows", "other table"), ("remove-before-saving", "no checkpoint of")],
)
def test_kills_before_calls_are_not_blind(mutation: str, noticed: str, zygote, tmp_path: Path) -> None:
    """Random kills rarely come in the moment between a row and its checkpoint; these come there every time."""
    found = zygote.ask("each_call", folder=tmp_path, every=7, mutation=mutation, more=[EVERY_THREE_STEPS])
    assert [problem for problem in found["problems"] if noticed in problem]
