"""A regime as a function of the clock: inheritance, order, decay, functions, and independence of earlier calls."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from norm_matters.core.clock import Clock
from norm_matters.core.errors import UserError
from norm_matters.regimes import Regime

SEED_README = [
    {"epoch": 0, "optimizer": "SGD", "lr": 1e-2, "weight_decay": 5e-4, "momentum": 0.9},
    {"epoch": 15, "lr": 1e-3, "weight_decay": 0},
]
CLOCK = Clock(0, steps_per_epoch=10, epochs=90)


def rates(source, steps, clock=CLOCK):
    regime = Regime(source)
    return [regime.at(clock.at_step(step))["lr"] for step in steps]


def test_the_readme_example_inherits_what_a_phase_does_not_set():
    regime = Regime(SEED_README)
    assert regime.at(CLOCK.at_step(149)) == {
        "optimizer": "SGD",
        "lr": 1e-2,
        "weight_decay": 5e-4,
        "momentum": 0.9,
        "groups": {},
    }
    assert regime.at(CLOCK.at_step(150)) == {
        "optimizer": "SGD",
        "lr": 1e-3,
        "weight_decay": 0,
        "momentum": 0.9,
        "groups": {},
    }


def test_a_run_that_starts_late_has_the_settings_of_all_earlier_phases():
    """The released code moved one phase per call, so a resume at epoch 90 began with the LR of epoch 0."""
    source = [{"epoch": 0, "lr": 0.1, "momentum": 0.9}, {"epoch": 30, "lr": 0.01}, {"epoch": 60, "lr": 0.001}]
    late = Regime(source).at(CLOCK.at_step(899))
    assert (late["lr"], late["momentum"]) == (0.001, 0.9)


def test_starts_in_epochs_steps_and_percent_mix():
    source = [{"lr": 4.0}, {"step": 25, "lr": 3.0}, {"epoch": 5, "lr": 2.0}, {"epoch": "50%", "lr": 1.0}]
    assert rates(source, [0, 24, 25, 49, 50, 449, 450]) == [4.0, 4.0, 3.0, 3.0, 2.0, 2.0, 1.0]
    assert rates([{"lr": 2.0}, {"step": "2ep", "lr": 1.0}], [19, 20]) == [2.0, 1.0]
    assert rates([{"lr": 2.0}, {"epoch": "7st", "lr": 1.0}], [6, 7]) == [2.0, 1.0]
    assert rates([{"lr": 2.0}, {"epoch": 1.5, "lr": 1.0}], [14, 15]) == [2.0, 1.0]


def test_of_two_units_the_later_start_wins_whatever_the_order_of_writing():
    source = [{"lr": 3.0}, {"step": 100, "lr": 2.0}, {"epoch": 5, "lr": 1.0}]
    assert rates(source, [0, 50, 99, 100]) == [3.0, 1.0, 1.0, 2.0]


def test_null_unsets_a_setting():
    regime = Regime([{"lr": 0.1, "momentum": 0.9}, {"epoch": 1, "momentum": None}])
    assert "momentum" in regime.at(CLOCK)
    assert "momentum" not in regime.at(CLOCK.at_step(10))


def test_exponential_decay_counts_from_the_phase_that_last_set_the_rate():
    source = [
        {"lr": 1.0, "lr_decay_rate": 0.5, "lr_decay_steps": 4},
        {"step": 10, "weight_decay": 0.1},
        {"step": 20, "lr": 8.0},
        {"step": 30, "lr_decay_rate": None},
    ]
    assert rates(source, [0, 3, 4, 8, 11, 12, 20, 23, 24, 30]) == [1.0, 1.0, 0.5, 0.25, 0.25, 0.125, 8.0, 8.0, 4.0, 8.0]
    assert rates([{"lr": 1.0, "lr_decay_rate": 0.5, "lr_decay_steps": "1ep"}], [9, 10, 20]) == [1.0, 0.5, 0.25]
    assert "lr_decay_rate" not in Regime(source).at(CLOCK)


def test_functions_of_step_and_epoch_and_what_later_phases_override():
    source = [
        {"lr": 1.0, "step_lambda": lambda step: {"momentum": step / 1000, "weight_decay": 0.5}},
        {"epoch": 2, "weight_decay": 0.25},
        {"epoch": 4, "epoch_lambda": lambda epoch: {"lr": 1 / epoch}},
    ]
    regime = Regime(source)
    at = [regime.at(CLOCK.at_step(step)) for step in (0, 7, 25, 49)]
    assert [one["lr"] for one in at] == [1.0, 1.0, 1.0, 0.25]
    assert [one["momentum"] for one in at] == [0.0, 0.007, 0.025, 0.049]
    assert [one["weight_decay"] for one in at] == [0.5, 0.5, 0.25, 0.25]


def test_a_function_of_the_epoch_is_a_regime():
    regime = Regime(lambda epoch: {"optimizer": "Adam", "lr": 0.1 / (epoch + 1)})
    assert regime.at(CLOCK.at_step(19)) == {"optimizer": "Adam", "lr": 0.05, "groups": {}}


def test_a_dict_from_epoch_to_phase_is_a_regime():
    assert rates({0: {"lr": 0.5}, 3: {"lr": 0.25}}, [29, 30]) == [0.5, 0.25]


def test_a_schedule_starts_with_its_phase():
    source = [{"lr": 1.0}, {"epoch": 40, "lr": {"schedule": "linear", "from": 1.0, "to": 0.0, "over": "50ep"}}]
    assert rates(source, [399, 400, 650, 899]) == pytest.approx([1.0, 1.0, 0.5, 0.002])


def test_settings_of_groups_are_inherited_separately():
    source = [
        {"lr": 0.1, "groups": {"norm": {"weight_decay": 0}, "last": {"lr": 0.01}}},
        {"epoch": 1, "lr": 0.2, "groups": {"norm": {"lr": {"schedule": "constant", "from": 0.3}}}},
        {"epoch": 2, "groups": {"last": {"lr": None}}},
    ]
    regime = Regime(source)
    assert regime.kinds == ["norm", "last"]
    assert regime.at(CLOCK.at_step(10))["groups"] == {"norm": {"weight_decay": 0, "lr": 0.3}, "last": {"lr": 0.01}}
    assert regime.at(CLOCK.at_step(20))["groups"]["last"] == {}


def test_phases_that_are_never_reached_are_named():
    regime = Regime([{"lr": 1}, {"epoch": 30, "lr": 0.1}, {"step": 899, "lr": 0.01}, {"epoch": 90, "lr": 0.001}])
    assert regime.unreached(CLOCK) == ["regime[3] starts at 90ep and is never reached: the run ends after 90ep"]
    assert len(regime.unreached(Clock(0, 10, 30))) == 3
    assert regime.unreached(Clock(0, 10, 91)) == []


@pytest.mark.parametrize(
    ("source", "relative"),
    [
        (SEED_README, False),
        ([{"lr": 1}, {"epoch": "50%", "lr": 0.1}], True),
        ([{"lr": {"schedule": "cosine", "from": 1}}], True),
        ([{"lr": {"schedule": "cosine", "from": 1, "over": "50ep"}}], False),
        ([{"lr": 1, "lr_decay_rate": 0.5, "lr_decay_steps": "10%"}], True),
        ([{"lr": 1, "groups": {"bias": {"lr": {"schedule": "linear", "from": 1}}}}], True),
    ],
)
def test_relative(source, relative):
    assert Regime(source).relative is relative


def test_lr_curve_spreads_its_points_over_the_run():
    curve = Regime([{"lr": 1.0}, {"epoch": "50%", "lr": 0.5}]).lr_curve(Clock(37, 10, 4), 4)
    assert curve == [(0.0, 1.0), (1.0, 1.0), (2.0, 0.5), (3.0, 0.5)]


def walk(source, clock, last):
    """Settings at step `last` in the stateful way: phases are taken up one by one while the steps go by."""
    settings, since = {"optimizer": "SGD"}, {}
    for step in range(last + 1):
        for phase in source:
            start = phase["step"] if "step" in phase else phase["epoch"] * clock.steps_per_epoch
            if start == step:
                settings.update(phase)
                since.update(dict.fromkeys(phase, step))
    for key, value in settings.items():
        if isinstance(value, dict):
            done = min((last - since[key]) / (2 * clock.steps_per_epoch), 1)
            settings[key] = value["from"] * (1 - done)
    return {key: value for key, value in settings.items() if key not in ("epoch", "step")}


number = st.floats(0.001, 1, allow_nan=False)
change = st.fixed_dictionaries(
    {},
    optional={
        "lr": number | st.builds(lambda first: {"schedule": "linear", "from": first, "over": "2ep"}, number),
        "momentum": number,
        "weight_decay": number,
        "optimizer": st.sampled_from(["SGD", "RMSprop"]),
    },
)


@given(
    first=number,
    by_epoch=st.dictionaries(st.integers(1, 6), change, max_size=4),
    by_step=st.dictionaries(st.integers(1, 30), change, max_size=4),
    visits=st.lists(st.integers(0, 34), min_size=1, max_size=8),
)
@settings(deadline=None, max_examples=80)
def test_settings_depend_on_the_clock_alone(first, by_epoch, by_step, visits):
    clock = Clock(0, steps_per_epoch=5, epochs=7)
    source = [{"epoch": 0, "lr": first}]
    source += [{"step": step, **by_step[step]} for step in sorted(by_step) if step % 5]
    source += [{"epoch": epoch, **by_epoch[epoch]} for epoch in sorted(by_epoch)]
    regime = Regime(source)
    for step in visits:
        found = regime.at(clock.at_step(step))
        assert found == Regime(source).at(clock.at_step(step))
        expected = walk(source, clock, step)
        assert {key: found[key] for key in expected} == pytest.approx(expected)


def test_the_regime_does_not_change_with_the_list_it_was_made_from():
    source = [{"lr": 1.0, "betas": [0.9, 0.99]}]
    regime = Regime(source)
    source[0]["lr"] = 2.0
    assert regime.at(CLOCK)["lr"] == 1.0


def test_a_failing_function_is_the_users_mistake():
    regime = Regime([{"lr": 1, "epoch_lambda": lambda epoch: {"lr": [3.0, 2.0][epoch]}}], name="my regime")
    assert regime.at(CLOCK.at_step(19))["lr"] == 2.0
    with pytest.raises(UserError, match=r"my regime\[0\].epoch_lambda failed at step 20: IndexError"):
        regime.at(CLOCK.at_step(20))


@pytest.mark.parametrize(
    ("result", "words"),
    [
        (None, "returned None, not a dict"),
        ({"lr": -1.0}, "-1.0 is no number from 0"),
        ({"reset": True}, "`reset`, which only a phase can set"),
        ({"lr": None}, "no learning rate at step 0"),
    ],
)
def test_what_a_function_must_not_return(result, words):
    with pytest.raises(UserError, match=words):
        Regime(lambda epoch: result).at(CLOCK)
