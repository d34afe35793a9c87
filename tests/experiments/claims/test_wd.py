"""The experiment on weight decay: its arms as runs, its verdicts on made-up curves, its tables, and a whole one."""

import html
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from norm_matters.core.clock import Clock
from norm_matters.core.config import ModelConfig
from norm_matters.experiments.claims.motion import motion_table
from norm_matters.experiments.claims.performing import reproduce
from norm_matters.experiments.claims.phases import phase_products
from norm_matters.experiments.claims.planning import plan_experiment
from norm_matters.experiments.claims.recipe import LEAST_PRODUCT, Evidence, RunRecord
from norm_matters.experiments.claims.wd import FIRST_PRODUCT, RECIPE
from norm_matters.models import build_model
from norm_matters.record.instruments import append_measurements, write_layout
from norm_matters.regimes import RegimeOptimizer, build_regime

STEPS = {"smoke": 1437 // 16, "small": 50_000 // 128, "paper": 50_000 // 128}


def configs(scale: str, folder: Path) -> dict[str, Any]:
    plan = plan_experiment(RECIPE, scale, output=folder)
    return {member.arm: member for member in plan.comparing() if member.seed == 1}


@pytest.mark.parametrize("scale", STEPS)
def test_decay_has_the_time_that_it_has_in_the_paper(tmp_path: Path, scale: str) -> None:
    products = phase_products(configs(scale, tmp_path)["on"].cell.config, steps_per_epoch=STEPS[scale])
    assert products[0].product == pytest.approx(2.5 if scale == "smoke" else FIRST_PRODUCT, rel=0.01)
    start = 0.02 if scale == "smoke" else 0.1
    assert [each.lr for each in products] == pytest.approx([start / 10**drop for drop in range(4)])
    assert [each.epoch / RECIPE.scales[scale].config["train.epochs"] for each in products] == [0, 0.25, 0.5, 0.75]


def decayed(member: Any) -> dict[str, float]:
    """Decay of every parameter of an arm's network, in its first step."""
    config = member.cell.config
    small = config.model.model_copy(update={"options": {"width": 4}})
    module = build_model(small, num_classes=10, in_channels=3, input_size=32).module
    phases = [
        {key: value for key, value in phase.items() if key != "instead_of_decay"} for phase in config.regime.phases
    ]
    regime = build_regime(config.regime.model_copy(update={"phases": phases}), default="constant")
    optimizer = RegimeOptimizer(module, regime)
    optimizer.prepare(Clock(0, 10, 16))
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    return {
        names[id(parameter)]: group["weight_decay"]
        for group in optimizer.optimizer.param_groups
        for parameter in group["params"]
    }


def test_each_arm_decays_what_it_says(tmp_path: Path) -> None:
    members = configs("small", tmp_path)
    assert list(members) == [arm.name for arm in RECIPE.arms]
    last = {"classifier.weight", "classifier.bias"}
    everything = set(decayed(members["on"]))
    model = ModelConfig(name="vgg11", options={"width": 4})
    module = build_model(model, num_classes=10, in_channels=3, input_size=32).module
    kernels = {name for name, parameter in module.named_parameters() if parameter.ndim == 4}
    assert len(kernels) == 8
    expected = {"on": everything, "conv-decay-only": kernels | last, "off-everywhere": set()}
    for arm, member in members.items():
        found = decayed(member)
        assert {name for name, decay in found.items() if decay} == expected.get(arm, last), arm
        assert set(found.values()) <= {0.0, 2.5e-3}, arm


def test_corrected_arms_follow_the_run_of_their_seed(tmp_path: Path) -> None:
    for arm, member in configs("small", tmp_path).items():
        follows = arm in ("corrected", "corrected-step", "norm-schedule", "shuffled")
        norms = member.cell.config.regime.norms
        assert norms == (str(tmp_path / "runs/wd-small/on-s1") if follows else None)
        assert member.after == (("on-s1",) if follows else ())
        assert member.cell.config.train.record_norms == ("step" if arm == "on" else "none")


def evidence(curves: Mapping[str, Sequence[Sequence[float]]], folder: Path = Path()) -> Evidence:
    """Sixteen epochs of every arm and seed, given as the accuracy of the four windows of a claim."""
    runs = {
        arm: {
            seed: RunRecord(arm, seed, folder / f"{arm}-s{seed}", "done", _rows(windows))
            for seed, windows in enumerate(seeds)
        }
        for arm, seeds in curves.items()
    }
    return Evidence(RECIPE, "small", runs, {}, (7.8, 0.78, 0.078, 0.0078))


def _rows(windows: Sequence[float]) -> list[dict[str, Any]]:
    # The first two epochs are in no window.
    values = [10.0, 10.0, *(windows[0] for _ in range(2)), *(windows[1 + n // 4] for n in range(12))]
    return [{"epoch": n, "val_error1": 100 - value} for n, value in enumerate(values, start=1)]


def seeds(*windows: float, spread: float = 0.1, shift: float = 0.0) -> list[list[float]]:
    """Five seeds around a curve; arms with another shift have other differences from each other."""
    noise = np.random.default_rng(round(1000 * shift)).normal(0, spread, (5, len(windows)))
    return (np.array(windows) + noise).tolist()


PAPER = {
    "on": seeds(76.4, 88.5, 90.3, 90.5, shift=1),
    "off": seeds(82.7, 89.0, 89.2, 89.3, shift=2),
    "corrected": seeds(76.0, 88.6, 90.3, 90.5, shift=3),
    "norm-schedule": seeds(76.3, 88.5, 90.1, 90.2, shift=4),
}


def verdicts(curves: Mapping[str, Sequence[Sequence[float]]]) -> dict[str, Any]:
    found = evidence(curves)
    return {claim.id: claim.judge(found) for claim in RECIPE.claims}


def test_the_papers_curves_give_the_papers_claims() -> None:
    found = verdicts(PAPER)
    assert {claim: verdict.holds for claim, verdict in found.items()} == {"WD-1": True, "WD-2": True, "WD-3": True}
    turns = found["WD-3"].findings[0]
    assert turns.p["ahead early"] < 1e-4
    assert turns.p["behind late"] < 1e-4
    share = found["WD-1"].findings[1]
    assert 0.8 < share.low < 1 < share.high < 1.3


def test_without_a_loss_nothing_is_made_up_for() -> None:
    found = verdicts({**PAPER, "off": seeds(76.4, 88.5, 90.3, 90.5, shift=5)})
    assert found["WD-1"].holds is None
    assert found["WD-3"].holds is not True


def test_a_correction_that_does_nothing_is_seen() -> None:
    found = verdicts({**PAPER, "corrected": seeds(82.7, 89.0, 89.2, 89.3, shift=6)})
    assert found["WD-1"].holds is False
    assert found["WD-2"].holds is True
    assert found["WD-3"].holds is True, "it is of off and on"
    # One that makes up for most, and is still worse by more than the margin.
    found = verdicts({**PAPER, "off": seeds(82.7, 85.0, 85.2, 80.0, shift=2), "corrected": seeds(76, 88, 90, 89.5)})
    assert found["WD-1"].holds is False
    assert found["WD-1"].findings[1].word == "holds"


@pytest.mark.parametrize(
    ("curve", "holds"),
    [
        ((82.7, 89.0, 89.2, 91.0), False),  # ahead all the time
        ((70.0, 80.0, 85.0, 89.0), False),  # behind all the time
        ((76.4, 88.5, 90.3, 89.0), None),  # equal early
    ],
)
def test_the_sign_must_turn_round(curve: tuple[float, ...], holds: bool | None) -> None:
    assert verdicts({**PAPER, "off": seeds(*curve, shift=7)})["WD-3"].holds is holds


def test_early_is_the_second_half_of_the_first_phase() -> None:
    curves = {**PAPER, "off": seeds(76.4, 95.0, 90.3, 89.0, shift=8)}
    assert verdicts(curves)["WD-3"].holds is None, "the second phase does not count"


def test_further_arms_are_compared_where_they_are() -> None:
    plain = verdicts(PAPER)["WD-1"]
    more = verdicts({**PAPER, "shuffled": PAPER["corrected"], "exact-momentum": PAPER["on"]})["WD-1"]
    added = {finding.what for finding in more.findings} - {finding.what for finding in plain.findings}
    assert added == {
        "shuffled less corrected",
        "(shuffled less off) / (on less off)",
        "(exact-momentum less off) / (on less off)",
    }
    assert more.holds == plain.holds


def test_a_run_too_short_for_decay_shows_nothing() -> None:
    short = replace(evidence(PAPER), products=(1.5, 0.15))
    assert all(claim.judge(short).word == "undecided" for claim in RECIPE.claims)


def test_the_tables_have_phases_and_motion(tmp_path: Path) -> None:
    found = evidence({arm: curves[:2] for arm, curves in PAPER.items()}, tmp_path)
    for seed, factor in ((0, 1.0), (1, 4.0)):
        folder = tmp_path / f"on-s{seed}"
        folder.mkdir()
        columns = [("weight_norm", "conv", 2), ("weight_norm", "fc", 1)]
        columns += [
            (name, layer, 1) for name in ("effective_lr", "layer_angle", "equilibrium") for layer in ("conv", "fc")
        ]
        write_layout(folder, columns)
        for epoch in range(1, 17):
            row = [3.0, 4.0, 1.0, factor * epoch, 2.0, 0.5, 0.25, 0.1, np.nan]
            append_measurements(folder, epoch, np.array(row))
    (tmp_path / "off-s0").mkdir()
    (tmp_path / "off-s0" / "instruments.json").write_text("damaged")
    assert RECIPE.look is not None
    phases, motion = RECIPE.look(found)
    assert [row["arm"] for row in phases.rows] == list(PAPER)
    assert phases.rows[0]["last phase"] == pytest.approx(np.mean([curve[3] for curve in PAPER["on"][:2]]), abs=1e-3)
    assert len(motion.rows) == 16 * 2
    assert motion.rows[4] == {
        "arm": "on",
        "epoch": 3,
        "layer": "conv",
        "seeds": 2,
        "effective_lr": 6.0,
        "layer_angle": 0.5,
        "equilibrium": 0.1,
        "weight_norm": 5.0,
    }
    assert np.isnan(motion.rows[5]["equilibrium"])
    assert motion_table(evidence({"off": PAPER["off"][:1]}, tmp_path)).rows == []


@pytest.mark.slow
def test_a_whole_one_at_smoke_scale(tmp_path: Path) -> None:
    result = reproduce("wd", scale="smoke", output=tmp_path)
    assert not result.failed
    assert {verdict.claim for verdict in result.verdicts} == {"WD-1", "WD-2", "WD-3"}
    assert all(verdict.word != "not run" for verdict in result.verdicts)
    assert result.evidence.products[0] > LEAST_PRODUCT
    assert (tmp_path / "wd-smoke" / "motion.csv").stat().st_size > 1000
    text = result.page.read_text()
    assert all(verdict.sentence in html.unescape(text) for verdict in result.verdicts)
