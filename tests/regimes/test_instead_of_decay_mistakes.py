"""What is wrong with what a phase puts in the place of decay: one line that names it, before anything is trained."""

import numpy as np
import pytest
from torch import nn

from norm_matters.core.clock import Clock
from norm_matters.core.config import RegimeConfig, load_config
from norm_matters.core.errors import UserError
from norm_matters.plan import check_phases
from norm_matters.regimes import Regime, RegimeOptimizer, build_regime
from norm_matters.weights.recorded import EpochNorms, RecordedNorms

CLOCK = Clock(0, steps_per_epoch=3, epochs=2)
CORRECTION = {"form": "lr-correction"}
EXPONENTIAL = {"form": "exponential-lr", "decay": 0.02}


def norms(epochs: int = 2, rows: int = 1, channels: int = 4) -> RecordedNorms:
    return RecordedNorms(
        "runs/on", {epoch: EpochNorms({"0": np.ones((rows, channels))}, "x") for epoch in range(1, epochs + 1)}
    )


def build(*phases: dict, given: RecordedNorms | None = None) -> RegimeOptimizer:
    module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    return RegimeOptimizer(module, Regime(list(phases), name="regime.phases"), norms=given, clock=CLOCK)


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ("epoch", r"'epoch' is no mapping such as \{form: lr-correction, every: epoch\}"),
        ({}, "form: missing; there are: lr-correction, norm-schedule, exponential-lr"),
        ({"form": "lr-corection"}, "form: unknown form 'lr-corection'; did you mean 'lr-correction'"),
        ({"form": "lr-correction", "every": "epok"}, "every: value 'epok' is not valid; it takes epoch or step"),
        ({"form": "lr-correction", "evry": "step"}, "evry: unknown key of lr-correction; did you mean 'every'"),
        ({"form": "lr-correction", "decay": -1}, "decay: value -1 is not valid; it takes a number from 0"),
        (
            {"form": "lr-correction", "shuffle": True},
            "shuffle: value True is not valid; it takes a whole number from 0",
        ),
        ({"form": "lr-correction", "layers": "("}, "layers: value '\\(' is not valid; it takes a regular expression"),
        ({"form": "norm-schedule"}, "lr: missing; it takes a number above 0"),
        ({"form": "norm-schedule", "lr": 0}, "lr: value 0 is not valid; it takes a number above 0"),
        ({"form": "norm-schedule", "lr": "0.1"}, "lr: value '0.1' is not valid"),
        ({"form": "exponential-lr", "decay": 0.1, "every": "step"}, "every: unknown key of exponential-lr"),
    ],
)
def test_wrong_forms_are_named(form: object, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        check_phases([{"epoch": 0, "lr": 0.1, "instead_of_decay": form}])
    assert str(error.value).startswith("regime.phases[0].instead_of_decay")


def test_all_mistakes_of_a_form_are_told_at_once() -> None:
    with pytest.raises(UserError) as error:
        Regime([{"lr": 0.1, "instead_of_decay": {"form": "norm-schedule", "lr": -1, "every": "step"}}])
    assert len(error.value.problems) == 2


def test_it_is_for_sgd_and_for_whole_phases() -> None:
    with pytest.raises(UserError, match=r"phases\[1\].instead_of_decay: it is for the optimizer SGD, not for AdamW"):
        check_phases([{"lr": 0.1, "instead_of_decay": EXPONENTIAL}, {"epoch": 1, "optimizer": "AdamW"}])
    with pytest.raises(UserError, match="`instead_of_decay` belongs to the phase, not to a group"):
        check_phases([{"lr": 0.1, "groups": {"last": {"instead_of_decay": EXPONENTIAL}}}])


def test_phases_that_do_not_go_together_are_refused() -> None:
    first = {"lr": 0.1, "instead_of_decay": EXPONENTIAL}
    for later in (CORRECTION, None):
        with pytest.raises(UserError, match="can only be followed by exponential-lr; to end it give decay 0"):
            check_phases([first, {"epoch": 1, "instead_of_decay": later}])
    check_phases([first, {"epoch": 1, "instead_of_decay": {**EXPONENTIAL, "decay": 0}}])
    check_phases([{"lr": 0.1, "instead_of_decay": CORRECTION}, {"epoch": 1, "instead_of_decay": None}])
    with pytest.raises(UserError, match=r"phases\[1\].instead_of_decay.layers: 'fc' is not None, as in an earlier"):
        check_phases([first, {"epoch": 1, "instead_of_decay": {**EXPONENTIAL, "layers": "fc"}}])


def test_null_ends_it() -> None:
    regime = build_regime(
        RegimeConfig(phases=[{"lr": 0.1, "instead_of_decay": CORRECTION}, {"epoch": 1, "instead_of_decay": None}]),
        default="constant",
    )
    assert "instead_of_decay" in regime.at(CLOCK)
    assert "instead_of_decay" not in regime.at(CLOCK.at_step(3))


def test_norms_are_asked_for_and_only_where_they_are_used() -> None:
    with pytest.raises(UserError, match=r"regime.norms: missing; lr-correction follows the norms of a recorded run"):
        build({"lr": 0.1, "instead_of_decay": CORRECTION})
    for phase in ({"lr": 0.1}, {"lr": 0.1, "instead_of_decay": EXPONENTIAL}):
        with pytest.raises(UserError, match=r"regime.norms: 'runs/on' is given, but nothing in the regime follows"):
            build(phase, given=norms())


def test_norms_are_checked_for_every_epoch_that_needs_them() -> None:
    phase = {"lr": 0.1, "instead_of_decay": CORRECTION}
    build(phase, given=norms())
    with pytest.raises(UserError, match="has the norms of 1 epochs; this run needs those of epoch 2"):
        build(phase, given=norms(epochs=1))
    build(phase, {"epoch": 1, "instead_of_decay": None}, given=norms(epochs=1))
    with pytest.raises(UserError, match="needs those of epoch 2"):
        build({"lr": 0.1}, {"step": 4, "instead_of_decay": CORRECTION}, given=norms(epochs=1))
    with pytest.raises(UserError, match="its layer '0' has 5 channels, not 4"):
        build(phase, given=norms(channels=5))
    every_step = {"lr": 0.1, "instead_of_decay": {**CORRECTION, "every": "step"}}
    build(every_step, given=norms(rows=4))
    with pytest.raises(UserError, match="norms of 4 steps in epoch 1; this run has 3 steps"):
        build(every_step, given=norms(rows=5))


@pytest.mark.parametrize(
    ("form", "settings", "message"),
    [
        (CORRECTION, {"weight_decay": 0.1}, "weight_decay: 0.1 in epoch 1 for weights that have instead_of_decay"),
        (CORRECTION, {"maximize": True}, "maximize: True in epoch 1"),
        (EXPONENTIAL, {"momentum": 0.9, "nesterov": True}, "nesterov: True in epoch 1"),
        (EXPONENTIAL, {"momentum": 0.9, "dampening": 0.1}, r"dampening: 0.1 .*\(exponential-lr\); it takes 0 there"),
    ],
)
def test_settings_under_which_a_form_is_not_what_it_says_are_refused(form: dict, settings: dict, message: str) -> None:
    given = norms() if form is CORRECTION else None
    with pytest.raises(UserError, match=message):
        build({"lr": 0.1, "instead_of_decay": form, **settings}, given=given)


def test_decay_that_makes_weights_swing_is_found_before_training() -> None:
    phase = {"lr": 0.1, "momentum": 0.9, "instead_of_decay": EXPONENTIAL}
    build(phase)
    with pytest.raises(UserError, match=r"lr 0\.2, decay 0\.02, momentum 0\.9: weights would swing"):
        build(phase, {"epoch": 1, "lr": 0.2})


def test_a_rate_that_rises_in_the_first_epoch_of_a_phase_is_looked_at_too() -> None:
    rising = {"schedule": "constant", "from": 0.1, "warmup": "2st"}
    phase = {"lr": rising, "momentum": 0.9, "instead_of_decay": {**EXPONENTIAL, "decay": 0.05}}
    with pytest.raises(UserError, match=r"lr 0\.0\d+, decay 0\.05, momentum 0\.9: weights would swing"):
        build(phase, {"epoch": 1, "lr": 0.01})


def test_a_correction_by_a_decay_that_leaves_nothing_is_found_before_training() -> None:
    phase = {"lr": 0.1, "instead_of_decay": {**CORRECTION, "decay": 9.9}}
    build(phase, given=norms())
    with pytest.raises(UserError, match=r"instead_of_decay\.decay: 9\.9 with a learning rate of 0\.2 in epoch 2 .* 5 "):
        build(phase, {"epoch": 1, "lr": 0.2}, given=norms())


def test_decay_of_a_later_phase_is_found_before_training() -> None:
    with pytest.raises(UserError, match=r"weight_decay: 0\.1 in epoch 2"):
        build({"lr": 0.1, "instead_of_decay": CORRECTION}, {"epoch": 1, "weight_decay": 0.1}, given=norms())


def test_no_layer_to_be_moved_is_a_mistake() -> None:
    with pytest.raises(UserError, match="no convolution and no linear layer is there for it"):
        build({"lr": 0.1, "instead_of_decay": {**EXPONENTIAL, "layers": "conv"}})


def test_a_rate_of_zero_has_no_norm() -> None:
    optimizer = build({"lr": 0.0, "instead_of_decay": {"form": "norm-schedule", "lr": 0.1}}, given=norms())
    with pytest.raises(UserError, match="norm-schedule has no norm for a learning rate of 0, at step 0"):
        optimizer.prepare(CLOCK)


def test_the_keys_of_a_config() -> None:
    config = load_config(overrides=["regime.norms=runs/on", "train.record_norms=step"])
    assert (config.regime.norms, config.train.record_norms) == ("runs/on", "step")
    with pytest.raises(
        UserError, match=r"train\.record_norms: value 'batch' is not valid; it takes none, epoch or step"
    ):
        load_config(overrides=["train.record_norms=batch"])
