"""Learning rates that follow the batch size."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from norm_matters.core.clock import Clock
from norm_matters.core.config import RegimeConfig, load_config
from norm_matters.core.errors import UserError
from norm_matters.regimes import REGIMES, build_regime

PHASES = [
    {"epoch": 0, "lr": 0.1, "momentum": 0.9, "groups": {"norm": {"lr": 0.02, "weight_decay": 0}}},
    {"epoch": 5, "lr": {"schedule": "linear", "from": 0.1, "to": 0.01}, "lr_decay_rate": 0.5, "lr_decay_steps": "2ep"},
]
FACTORS = {"none": 1.0, "linear": 4.0, "sqrt": 2.0}


def rates(config: RegimeConfig, batch_size: int, step: int) -> list[float]:
    settings = build_regime(config, default="constant", batch_size=batch_size).at(Clock(step, 10, 20))
    return [settings["lr"], *(own["lr"] for own in settings["groups"].values() if "lr" in own)]


@pytest.mark.parametrize("rule", FACTORS)
@given(step=st.integers(0, 199))
def test_every_rate_is_multiplied_and_nothing_else(rule: str, step: int) -> None:
    given_rule = {} if rule == "none" else {"lr_rule": rule, "lr_batch": 64}
    plain = build_regime(RegimeConfig(phases=PHASES), default="constant").at(Clock(step, 10, 20))
    scaled = build_regime(RegimeConfig(phases=PHASES, **given_rule), default="constant", batch_size=256)
    found = scaled.at(Clock(step, 10, 20))
    assert found["lr"] == pytest.approx(FACTORS[rule] * plain["lr"], rel=1e-12)
    assert found["groups"]["norm"]["lr"] == pytest.approx(FACTORS[rule] * plain["groups"]["norm"]["lr"], rel=1e-12)
    assert {**found, "lr": 0, "groups": 0} == {**plain, "lr": 0, "groups": 0}
    assert found == scaled.at(Clock(step, 10, 20))  # a pure function of the clock


@pytest.mark.parametrize("name", REGIMES.names())
def test_named_regimes_follow_the_rule(name: str) -> None:
    for step in (0, 77, 199):
        (plain,) = rates(RegimeConfig(name=name), 512, step)[:1]
        (scaled,) = rates(RegimeConfig(name=name, lr_rule="linear", lr_batch=256), 512, step)[:1]
        assert scaled == pytest.approx(2 * plain, rel=1e-12)


def test_the_batch_that_rates_are_written_for_changes_nothing() -> None:
    for rule in ("linear", "sqrt"):
        assert rates(RegimeConfig(lr_rule=rule, lr_batch=128), 128, 3) == rates(RegimeConfig(), 128, 3)


@pytest.mark.parametrize("given_rule", [["regime.lr_rule=linear"], ["regime.lr_batch=256"], ["regime.lr_rule=square"]])
def test_a_rule_goes_with_a_batch_size(given_rule: list[str]) -> None:
    with pytest.raises(UserError, match=r"lr_rule|lr_batch"):
        load_config(overrides=given_rule)
