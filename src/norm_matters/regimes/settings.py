"""Which optimizers there are, which settings each has, and whether a regime's settings are any of them."""

import inspect
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import nn

from norm_matters.core.clock import Clock
from norm_matters.core.errors import UserError, nearest
from norm_matters.regimes.implementation import build_optimizer
from norm_matters.regimes.instead_of_decay import KEY as INSTEAD_OF_DECAY
from norm_matters.regimes.phases import LANGUAGE_KEYS, Phase
from norm_matters.regimes.regime import Regime, fold
from norm_matters.regimes.schedules import is_number

# LBFGS calls the network several times per step; SparseAdam takes sparse gradients only, which no network here has.
_UNUSABLE = {"Optimizer", "LBFGS", "SparseAdam"}
# `params` is not a setting; the other two are for differentiating through a step and for CUDA graphs.
_NOT_SETTINGS = {"self", "params", "differentiable", "capturable"}
# A clock to try phases at before the run's length is known.
PROBE = Clock(0, steps_per_epoch=1000, epochs=1000)


@cache
def optimizer_names() -> list[str]:
    """The names of all optimizers of torch.optim that a regime can use."""
    return [
        name
        for name, thing in vars(torch.optim).items()
        if isinstance(thing, type) and issubclass(thing, torch.optim.Optimizer) and name not in _UNUSABLE
    ]


def optimizer_class(name: str) -> type[torch.optim.Optimizer]:
    """The class of that name; UserError with the nearest name otherwise."""
    if name not in optimizer_names():
        raise UserError(_unknown_optimizer(name))
    return getattr(torch.optim, name)


def _unknown_optimizer(name: str) -> str:
    names = optimizer_names()
    hint = nearest(name, names) or f"; there are: {', '.join(names)}"
    return f"optimizer: unknown optimizer '{name}'{hint}"


@cache
def setting_defaults(name: str) -> dict[str, Any]:
    """The settings of an optimizer, with torch's defaults; not to be changed."""
    parameters = inspect.signature(optimizer_class(name).__init__).parameters
    return {key: parameter.default for key, parameter in parameters.items() if key not in _NOT_SETTINGS}


@cache
def _all_settings() -> frozenset[str]:
    """Whatever can be among the settings of a phase, for one optimizer or another."""
    return frozenset(LANGUAGE_KEYS).union(*(setting_defaults(name) for name in optimizer_names()))


def usable_settings(settings: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """All settings of an optimizer: those given that it has, torch's defaults for the rest.

    Raises:
        UserError: a value of the wrong type, or a setting that no optimizer has.
    """
    for key in settings:
        if key not in defaults and key not in _all_settings():
            raise UserError(f"{key}: unknown setting{nearest(key, defaults)}")
    own = {key: value for key, value in settings.items() if key in defaults}
    for key, value in own.items():
        _check_type(key, value, defaults[key])
    # YAML knows lists only, torch compares with tuples.
    return {**defaults, **{key: tuple(value) if isinstance(value, list) else value for key, value in own.items()}}


def _check_type(key: str, value: Any, default: Any) -> None:
    if isinstance(default, bool):
        right, what = isinstance(value, bool), "true or false"
    elif is_number(default):
        right, what = is_number(value), "a finite number"
    elif isinstance(default, tuple):
        right = isinstance(value, list | tuple) and len(value) == len(default)
        what = f"a list of {len(default)} numbers"
    else:
        return
    if not right:
        raise UserError(f"{key}: {value!r} is not {what}")


def check_settings(regime: Regime) -> None:
    """Try each phase of a regime on its optimizer, so that mistakes are found before training.

    Raises:
        UserError: naming all unknown optimizers and settings, with the nearest ones, and all values that torch refuses.
    """
    phases = [_as_it_starts(phase) for phase in regime.phases]
    tried = []
    for count, phase in enumerate(phases, start=1):
        # A phase is tried at its own start, after those written before it.
        starts = [(earlier.start.steps(PROBE), earlier) for earlier in phases[:count]]
        tried.append((phase, fold(starts, PROBE.at_step(max(start for start, _ in starts)))))
    problems = [problem for phase, settings in tried for problem in _unknown(phase, settings["optimizer"])]
    for phase, settings in tried:
        # The first phase with a refused value only: later ones inherit it.
        problems = problems or _refused(phase, settings)
    if problems:
        raise UserError(*problems)


def _as_it_starts(phase: Phase) -> Phase:
    """The phase with its function asked once, if that is at step 0: other steps are unknown before training."""
    values = phase.function(PROBE) if phase.function and not phase.start.amount else {}
    return replace(phase, settings={**phase.settings, **values}, function=None)


def _unknown(phase: Phase, optimizer: str) -> list[str]:
    """The names in a phase that mean nothing there."""
    if optimizer not in optimizer_names():
        # Said once, of the phase that brings it.
        return [f"{phase.where}.{_unknown_optimizer(optimizer)}"] if "optimizer" in phase.settings else []
    defaults = setting_defaults(optimizer)
    problems = []
    for place, settings in {
        "": phase.settings,
        **{f"groups.{kind}.": own for kind, own in phase.groups.items()},
    }.items():
        known = {*defaults, *(() if place else LANGUAGE_KEYS)}
        for key in settings:
            if key not in known:
                hint = nearest(key, known) or f"; there are: {', '.join(defaults)}"
                problems.append(f"{phase.where}.{place}{key}: unknown setting of {optimizer}{hint}")
    return problems


def _refused(phase: Phase, settings: Mapping[str, Any]) -> list[str]:
    """What is wrong with the values in force as a phase starts; torch is asked by building the optimizer."""
    name = settings["optimizer"]
    if INSTEAD_OF_DECAY in settings and name != "SGD":
        return [f"{phase.where}.{INSTEAD_OF_DECAY}: it is for the optimizer SGD, not for {name}"]
    trials = {phase.where: settings}
    trials |= {f"{phase.where}.groups.{kind}": {**settings, **own} for kind, own in settings["groups"].items()}
    for where, trial in trials.items():
        try:
            # A matrix, since Muon takes nothing else.
            one = [{"params": [nn.Parameter(torch.zeros(1, 1))]}]
            build_optimizer(optimizer_class(name), one, usable_settings(trial, setting_defaults(name)))
        except UserError as error:
            return [f"{where}.{problem}" for problem in error.problems]
        except (TypeError, ValueError, RuntimeError) as error:
            return [f"{where}: torch refuses these settings of {name}: {error}"]
    return []
