"""Every mistake in a regime is found before training, in one line with the place and the nearest valid word."""

import pytest

from norm_matters.core.clock import Clock
from norm_matters.core.config import RegimeConfig
from norm_matters.core.errors import UserError
from norm_matters.regimes import build_regime, check_regime


def problems_of(source):
    with pytest.raises(UserError) as caught:
        build_regime(RegimeConfig(), default="digits", own=source)
    for problem in caught.value.problems:
        assert "\n" not in problem
        assert problem.startswith("the model's regime")
    return [problem.removeprefix("the model's regime") for problem in caught.value.problems]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ([], ": [] is no list of phases"),
        ("SGD", ": 'SGD' is no list of phases"),
        ([3], "[0]: 3 is no mapping"),
        ({0: {"lr": 1}, 1: 0.1}, "[1]: 0.1 is no mapping"),
        ([{"optimizer": "SGD"}], "[0].lr: missing"),
        ([{"epoch": 1, "lr": 1}], "[0]: the first phase must start at 0, not at 1ep"),
        ([{"epoch": 0, "step": 0, "lr": 1}], "not at both"),
        ([{"epoch": "soon", "lr": 1}], "[0].epoch: 'soon' is no length"),
        ([{"epoch": -1, "lr": 1}], "[0].epoch: '-1' is no length"),
        ([{"epoch": True, "lr": 1}], "[0].epoch: 'True' is no length"),
        ([{"lr": 1}, {"epoch": 9}, {"epoch": 5}], "[2]: starts at 5ep, not after the one before it (9ep)"),
        ([{"lr": 1}, {"lr": 2}], "[1]: starts at 0ep, not after"),
        ([{"lr": "0.1"}], "[0].lr: '0.1' is no number"),
        ([{"lr": -0.1}], "[0].lr: -0.1 is no number from 0"),
        ([{"lr": float("nan")}], "[0].lr: nan is no number"),
        ([{"lr": {"schedule": "linear", "from": 1, "to": -1}}], "[0].lr: "),
        ([{"lr": {"schedule": "cosin", "from": 1}}], "[0].lr: unknown schedule 'cosin'; did you mean 'cosine'?"),
        ([{"lr": 1, "optimizer": "adam"}], "[0].optimizer: unknown optimizer 'adam'; did you mean 'Adam'?"),
        ([{"lr": 1, "optimizer": "LBFGS"}], "[0].optimizer: unknown optimizer 'LBFGS'"),
        ([{"lr": 1, "optimizer": 3}], "[0].optimizer: 3 is no name"),
        ([{"lr": 1, "momentun": 0.9}], "[0].momentun: unknown setting of SGD; did you mean 'momentum'?"),
        ([{"lr": 1, "optimiser": "SGD"}], "[0].optimiser: unknown setting of SGD; did you mean 'optimizer'?"),
        ([{"lr": 1, "betas": [0.9, 0.99]}], "[0].betas: unknown setting of SGD"),
        ([{"lr": 1, "lr_scheduler": {"schedule": "constant", "from": 1}}], "[0].lr_scheduler: unknown setting"),
        ([{"lr": 1, "regularizer": {"name": "L2"}}], "[0].regularizer: a mapping needs `schedule`"),
        ([{"lr": 1, "execute": print}], "[0].execute: unknown setting of SGD"),
        ([{"lr": 1, "momentum": "0.9"}], "[0].momentum: '0.9' is not a finite number"),
        ([{"lr": 1, "momentum": True}], "[0].momentum: True is not a finite number"),
        ([{"lr": 1, "momentum": 0.9, "nesterov": 1}], "[0].nesterov: 1 is not true or false"),
        ([{"lr": 1, "nesterov": True}], "[0]: torch refuses these settings of SGD: Nesterov"),
        ([{"lr": 1, "weight_decay": -1}], "[0]: torch refuses these settings of SGD"),
        ([{"lr": 1, "optimizer": "Adam", "betas": [0.9]}], "[0].betas: [0.9] is not a list of 2 numbers"),
        ([{"lr": 1, "optimizer": "Adam", "betas": "ab"}], "[0].betas: 'ab' is not a list of 2 numbers"),
        ([{"lr": 1, "reset": "yes"}], "[0].reset: 'yes' is neither true nor false"),
        ([{"lr": 1, "step_lambda": "lambda t: {'lr': t}"}], "[0].step_lambda: text is never run as code"),
        ([{"lr": 1, "epoch_lambda": 3}], "[0].epoch_lambda: give a Python function"),
        ([{"lr": 1, "step_lambda": abs, "epoch_lambda": abs}], "exclude each other"),
        ([{"lr": 1, "lr_decay_rate": 0.5}], "[0].lr_decay_rate: needs `lr_decay_steps`"),
        ([{"lr": 1, "lr_decay_rate": 0, "lr_decay_steps": 5}], "[0].lr_decay_rate: 0 is no number above 0"),
        ([{"lr": 1, "lr_decay_rate": 0.5, "lr_decay_steps": 0}], "[0].lr_decay_steps: must be longer than 0"),
        ([{"lr": 1, "groups": ["norm"]}], "[0].groups: ['norm'] is no mapping"),
        ([{"lr": 1, "groups": {"norms": {}}}], "[0].groups: unknown kind 'norms'; did you mean 'norm'?"),
        ([{"lr": 1, "groups": {"name:(": {}}}], "[0].groups: 'name:(' is no regular expression"),
        ([{"lr": 1, "groups": {"norm": {"optimizer": "Adam"}}}], "[0].groups.norm: `optimizer` belongs to the phase"),
        ([{"lr": 1, "groups": {"norm": {"weight_decai": 0}}}], "[0].groups.norm.weight_decai: unknown setting of SGD"),
        ([{"lr": 1, "groups": {"norm": {"lr": "x"}}}], "[0].groups.norm.lr: 'x' is no number"),
        ([{"lr": 1, "groups": {"norm": {"momentum": -1}}}], "[0].groups.norm: torch refuses"),
        (lambda epoch: {"lr": 1, "momentun": 0.9}, "[0].momentun: unknown setting of SGD; did you mean 'momentum'?"),
        (lambda epoch: {"lr": 1, "optimizer": "Adm"}, "[0].optimizer: unknown optimizer 'Adm'; did you mean 'Adam'?"),
    ],
)
def test_a_mistake_is_named_with_its_place(source, expected):
    found = problems_of(source)
    assert len(found) == 1
    assert expected in found[0]


def test_all_mistakes_are_reported_at_once():
    assert len(problems_of([{"epoch": "x", "lr": "y"}, {"reset": 3, "groups": 4}])) == 4
    assert len(problems_of([{"lr": 1, "momentun": 1, "decay": 2}, {"epoch": 1, "optimizer": "Adm"}])) == 3


def test_a_refused_value_is_reported_once_though_later_phases_inherit_it():
    assert len(problems_of([{"lr": 1, "momentum": -1, "groups": {"bias": {"lr": 2}}}, {"epoch": 1, "lr": 3}])) == 1


def test_a_setting_of_a_former_optimizer_is_no_mistake_but_writing_it_there_is():
    build_regime(RegimeConfig(), default="digits", own=[{"lr": 1, "momentum": 0.9}, {"epoch": 1, "optimizer": "Adam"}])
    assert "unknown setting of Adam" in problems_of([{"lr": 1, "optimizer": "Adam"}, {"epoch": 1, "momentum": 0.9}])[0]


def test_the_regime_of_a_run_comes_from_the_config_the_model_or_the_default():
    own = [{"lr": 0.7}]
    assert build_regime(RegimeConfig(), default="digits").name == "digits"
    assert build_regime(RegimeConfig(), default="digits", own=own).name == "the model's regime"
    assert build_regime(RegimeConfig(name="cosine"), default="digits", own=own).name == "cosine"
    assert build_regime(RegimeConfig(phases=[{"lr": 0.3}]), default="digits", own=own).name == "regime.phases"


def test_lr_and_weight_decay_change_a_named_regime_only():
    settings = build_regime(RegimeConfig(lr=0.5, weight_decay=0.25), default="vgg-cifar").at(Clock(0, 1, 80))
    assert (settings["lr"], settings["weight_decay"]) == (0.5, 0.25)
    with pytest.raises(UserError, match=r"regime\.lr and regime\.weight_decay: can only change a named regime"):
        build_regime(RegimeConfig(lr=0.5, weight_decay=0.0), default="digits", own=[{"lr": 0.1}])


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(UserError, match="unknown regime 'resnet-cifa'; did you mean 'resnet-cifar'"):
        check_regime("resnet-cifa")
    with pytest.raises(UserError, match="unknown regime 'cosin'"):
        build_regime(RegimeConfig(name="cosin"), default="digits")
