"""The named regimes: a golden table of their learning rates, their overrides, their plots."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest

from norm_matters.core.clock import Clock
from norm_matters.core.config import RegimeConfig
from norm_matters.regimes import REGIMES, Regime, build_regime, plot_lr

GOLDEN = Path(__file__).parents[1] / "golden" / "schedules.csv"


@pytest.mark.parametrize("name", REGIMES.names())
def test_learning_rates_are_those_of_the_golden_table(name):
    """36 epochs of 10 steps, at the start of each epoch."""
    with GOLDEN.open() as file:
        expected = [float(row[name]) for row in csv.DictReader(file)]
    regime = build_regime(RegimeConfig(), default=name)
    assert len(expected) == 36
    assert [regime.at(Clock(epoch * 10, 10, 36))["lr"] for epoch in range(36)] == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize(
    ("name", "epochs", "drops"),
    [("resnet-imagenet", 90, [30, 60]), ("vgg-cifar", 80, [20, 40, 60]), ("resnet-cifar", 160, [80, 120])],
)
def test_drops_fall_on_the_published_epochs_to_the_step(name, epochs, drops):
    regime, clock = Regime(REGIMES.get(name)()), Clock(0, 5005, epochs)
    for count, epoch in enumerate(drops, start=1):
        before, after = (regime.at(clock.at_step(epoch * 5005 + shift))["lr"] for shift in (-1, 0))
        assert (before, after) == pytest.approx((0.1 / 10 ** (count - 1), 0.1 / 10**count))


@pytest.mark.parametrize("name", REGIMES.names())
def test_lr_scales_the_whole_curve_and_weight_decay_replaces_the_regimes_own(name):
    own = Regime(REGIMES.get(name)())
    changed = Regime(REGIMES.get(name)(lr=0.7, weight_decay=0.0))
    clock = Clock(0, 7, 13)
    top = max(rate for _, rate in own.lr_curve(clock, 91))
    for (_, before), (_, after) in zip(own.lr_curve(clock, 91), changed.lr_curve(clock, 91), strict=True):
        assert after == pytest.approx(before * 0.7 / top)
    assert own.at(clock)["weight_decay"] > 0
    assert changed.at(clock)["weight_decay"] == 0


@pytest.mark.parametrize("name", REGIMES.names())
def test_named_regimes_are_usable_for_a_run_of_any_length(name):
    regime = Regime(REGIMES.get(name)())
    for epochs, steps in ((1, 1), (1, 3), (2, 1), (500, 1)):
        clock = Clock(0, steps, epochs)
        assert all(0 <= regime.at(clock.at_step(step))["lr"] <= 0.1 for step in range(clock.total_steps))


def test_every_named_regime_but_the_constant_one_stretches_with_the_run():
    assert [name for name in REGIMES.names() if not Regime(REGIMES.get(name)()).relative] == ["constant"]


@pytest.mark.parametrize("name", REGIMES.names())
def test_the_plot_is_small_plain_text(name):
    lines = plot_lr(name, epochs=40).splitlines()
    assert len(lines) <= 14
    assert all(len(line) <= 80 and line.isascii() for line in lines)
    assert lines[0].startswith(f"{name}: ")
    assert lines[-1].endswith("40 epochs")
    columns = [line[10:] for line in lines[1:-2]]
    assert all(sum(column[at : at + 1] == "*" for column in columns) == 1 for at in range(60))


def test_the_plot_shows_drops_where_they_are():
    lines = plot_lr("resnet-cifar").splitlines()
    assert lines[1] == "     0.1 |" + "*" * 30
    assert lines[4] == "    0.01 |" + " " * 30 + "*" * 15
    assert lines[7] == "   0.001 |" + " " * 45 + "*" * 15


def test_settings_that_are_no_numbers_are_shown_as_they_are(monkeypatch):
    phases = [{"optimizer": "AdamW", "lr": 0.1, "betas": (0.9, 0.98), "amsgrad": True, "weight_decay": 0.0005}]
    monkeypatch.setattr(REGIMES, "get", lambda name: lambda: phases)
    headline = plot_lr("own", epochs=1).splitlines()[0]
    assert headline.startswith("own: AdamW, ")
    for part in ("betas (0.9, 0.98)", "amsgrad True", "weight_decay 0.0005"):
        assert part in headline


def test_names_and_plots_need_no_torch():
    code = (
        "import sys; from norm_matters.regimes import REGIMES, check_regime, plot_lr; check_regime('cosine');"
        "plot_lr('adamw'); assert not {'torch', 'numpy', 'pandas', 'bokeh', 'timm'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
