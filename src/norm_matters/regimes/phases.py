"""The regime language: a list of phases, each a mapping from settings to values, read and checked here.

    - {epoch: 0, optimizer: SGD, lr: 0.1, momentum: 0.9, weight_decay: 5e-4}
    - {epoch: 80, lr: 0.01}
    - {epoch: 75%, lr: 0.001, groups: {norm: {weight_decay: 0}}}

| key | meaning |
|---|---|
| `epoch` | the phase starts there: a number of epochs from 0, or a length such as `500st` or `50%` of the run |
| `step` | likewise, but a bare number counts optimizer steps; without either key a phase starts at 0 |
| `optimizer` | a class of torch.optim; a change starts it with an empty state; SGD if never given |
| `lr`, `momentum`, `betas`, ... | any setting of that optimizer: a value or a schedule (`schedules.py`); null: unset |
| `lr_decay_rate`, `lr_decay_steps` | from the phase that last set them or `lr`: LR times the rate every so many steps |
| `step_lambda`, `epoch_lambda` | Python only: a function of the optimizer step, or epoch, to a dict of settings |
| `reset` | true: the optimizer's state (momentum, ...) is emptied as the phase starts |
| `groups` | settings of some parameters instead of those above, by kind: see `groups.py` |
| `instead_of_decay` | what brings about for weights what decay does: see `instead_of_decay.py`; null: unset |

A phase inherits all settings of those before it, in the order of their starts; what a function returns counts as
written in its phase, and it goes on being asked in later phases for what they do not set. A setting of a former
optimizer that the present one does not have rests until it is of use again.
A regime may also be a dict from epoch to phase, or a function of the epoch that returns settings.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from norm_matters.core.clock import Clock, Duration
from norm_matters.core.errors import UserError, nearest
from norm_matters.regimes.instead_of_decay import KEY as INSTEAD_OF_DECAY
from norm_matters.regimes.instead_of_decay import ExponentialLr, parse_instead_of_decay
from norm_matters.regimes.schedules import Schedule, is_number, parse_schedule

KINDS = ("last", "norm", "bias")
LANGUAGE_KEYS = (
    "epoch",
    "step",
    "optimizer",
    "groups",
    "reset",
    "lr_decay_rate",
    "lr_decay_steps",
    "step_lambda",
    "epoch_lambda",
    INSTEAD_OF_DECAY,
)

Source = Sequence[Mapping[str, Any]] | Mapping[Any, Any] | Callable[[int], Mapping[str, Any]]


@dataclass(frozen=True)
class Phase:
    """One phase of a regime.

    Attributes:
        start: when it begins.
        settings: what it sets, `optimizer` and the decay of the LR included; schedules parsed.
        groups: kind of parameters to what is set for them.
        reset: whether the optimizer's state is emptied at its start.
        function: settings as a function of the clock, or None.
        where: its place, for messages ("regime.phases[1]").
    """

    start: Duration
    settings: Mapping[str, Any]
    groups: Mapping[str, Mapping[str, Any]]
    reset: bool
    function: Callable[[Clock], Mapping[str, Any]] | None
    where: str


def parse_phases(source: Source, *, where: str) -> list[Phase]:
    """Read a regime: a list of phases, a dict from epoch to phase, or a function of the epoch.

    The names of an optimizer's settings and their values are left to `settings.check_settings`, which needs torch.

    Args:
        where: what messages call the regime, e.g. `regime.phases`.

    Raises:
        UserError: with all that is wrong.
    """
    if callable(source):
        source = [{"epoch_lambda": source}]
    elif isinstance(source, Mapping):
        source = [source] if any(isinstance(key, str) for key in source) else _by_epoch(source, where)
    if not isinstance(source, Sequence) or isinstance(source, str) or not source:
        raise UserError(f"{where}: {source!r} is no list of phases")
    phases, problems = [], []
    for number, phase in enumerate(source):
        try:
            phases.append(_parse_phase(phase, f"{where}[{number}]"))
        except UserError as error:
            problems += error.problems
    problems = problems or _sequence_problems(phases)
    if problems:
        raise UserError(*problems)
    return phases


def _by_epoch(source: Mapping[Any, Any], where: str) -> list[Mapping[str, Any]]:
    for start, phase in source.items():
        if not isinstance(phase, Mapping):
            raise UserError(f"{where}[{start}]: {phase!r} is no mapping from settings to values")
    return [{"epoch": start, **phase} for start, phase in source.items()]


def resolve_values(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Settings with their schedules parsed.

    Raises:
        UserError: a schedule that cannot be read, or a learning rate that is none.
    """
    resolved: dict[str, Any] = {}
    problems = []
    for key, value in values.items():
        try:
            resolved[key] = parse_schedule(value) if isinstance(value, Mapping) else value
        except ValueError as error:
            problems.append(f"{where}.{key}: {error}")
    if not _is_rate(resolved.get("lr")):
        problems.append(f"{where}.lr: {values['lr']!r} is no number from 0, and no schedule of such numbers")
    if problems:
        raise UserError(*problems)
    return resolved


def _is_rate(value: Any) -> bool:
    if isinstance(value, Schedule):
        return min(value.first, value.last, value.factor) >= 0
    return value is None or (is_number(value) and value >= 0)


def _parse_phase(phase: Any, where: str) -> Phase:
    if not isinstance(phase, Mapping) or not all(isinstance(key, str) for key in phase):
        raise UserError(f"{where}: {phase!r} is no mapping from settings to values")
    problems: list[str] = []
    parts: dict[str, Any] = {}
    readers = {"start": _start, "groups": _groups, "reset": _reset, "function": _function, "settings": _settings}
    for part, read in readers.items():
        try:
            parts[part] = read(phase, where)
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(*problems)
    return Phase(**parts, where=where)


def _start(phase: Mapping[str, Any], where: str) -> Duration:
    if "epoch" in phase and "step" in phase:
        raise UserError(f"{where}: a phase starts at an `epoch` or at a `step`, not at both")
    key = "step" if "step" in phase else "epoch"
    return _length(phase.get(key, 0), f"{where}.{key}", bare="st" if key == "step" else "ep")


def _length(value: Any, where: str, *, bare: str) -> Duration:
    """A duration; a bare number counts in the unit `bare`."""
    if isinstance(value, Duration):
        return value
    try:
        text = str(int(value) if is_number(value) and value == int(value) else value)
        return Duration.parse(text if text.rstrip().endswith(("ep", "st", "%")) else text + bare)
    except ValueError:
        raise UserError(f"{where}: '{value}' is no length; write a number, 30ep, 500st or 10%") from None


def _groups(phase: Mapping[str, Any], where: str) -> dict[str, dict[str, Any]]:
    groups = phase.get("groups", {})
    if not isinstance(groups, Mapping) or not all(isinstance(settings, Mapping) for settings in groups.values()):
        raise UserError(f"{where}.groups: {groups!r} is no mapping from kinds to settings")
    for kind, settings in groups.items():
        _check_kind(kind, f"{where}.groups")
        for key in settings:
            if key in LANGUAGE_KEYS:
                raise UserError(f"{where}.groups.{kind}: `{key}` belongs to the phase, not to a group")
    return {kind: resolve_values(settings, f"{where}.groups.{kind}") for kind, settings in groups.items()}


def _check_kind(kind: Any, where: str) -> None:
    if isinstance(kind, str) and kind.startswith("name:"):
        try:
            re.compile(kind.removeprefix("name:"))
        except re.error as error:
            raise UserError(f"{where}: '{kind}' is no regular expression: {error}") from None
    elif kind not in KINDS:
        hint = nearest(str(kind), KINDS)
        raise UserError(f"{where}: unknown kind '{kind}'{hint}; there are: {', '.join(KINDS)}, name:REGEX")


def _reset(phase: Mapping[str, Any], where: str) -> bool:
    reset = phase.get("reset", False)
    if not isinstance(reset, bool):
        raise UserError(f"{where}.reset: {reset!r} is neither true nor false")
    return reset


def _function(phase: Mapping[str, Any], where: str) -> Callable[[Clock], Mapping[str, Any]] | None:
    given = [key for key in ("step_lambda", "epoch_lambda") if key in phase]
    if not given:
        return None
    if len(given) == 2:
        raise UserError(f"{where}: `step_lambda` and `epoch_lambda` exclude each other")
    (key,) = given
    function = phase[key]
    if not callable(function):
        what = "text is never run as code; " if isinstance(function, str) else ""
        raise UserError(f"{where}.{key}: {what}give a Python function (in a model's file) or a schedule")

    def settings_at(clock: Clock) -> Mapping[str, Any]:
        try:
            settings = function(clock.step if key == "step_lambda" else clock.epoch)
        except Exception as error:
            raise UserError(f"{where}.{key} failed at step {clock.step}: {type(error).__name__}: {error}") from error
        if not isinstance(settings, Mapping):
            raise UserError(f"{where}.{key} returned {settings!r}, not a dict of settings")
        for name in settings:
            if name in LANGUAGE_KEYS and name != "optimizer":
                raise UserError(f"{where}.{key} returned `{name}`, which only a phase can set")
        return resolve_values(settings, f"{where}.{key}")

    return settings_at


def _settings(phase: Mapping[str, Any], where: str) -> dict[str, Any]:
    apart = set(LANGUAGE_KEYS) - {"optimizer", "lr_decay_rate", "lr_decay_steps"}
    settings = resolve_values({key: value for key, value in phase.items() if key not in apart}, where)
    if not isinstance(settings.get("optimizer", ""), str):
        raise UserError(f"{where}.optimizer: {settings['optimizer']!r} is no name of an optimizer")
    rate = settings.get("lr_decay_rate")
    if rate is not None and not (is_number(rate) and rate > 0):
        raise UserError(f"{where}.lr_decay_rate: {rate!r} is no number above 0")
    if "lr_decay_steps" in settings:
        length = _length(settings["lr_decay_steps"], f"{where}.lr_decay_steps", bare="st")
        if length.amount == 0:
            raise UserError(f"{where}.lr_decay_steps: must be longer than 0")
        settings["lr_decay_steps"] = length
    if INSTEAD_OF_DECAY in phase:
        settings[INSTEAD_OF_DECAY] = parse_instead_of_decay(phase[INSTEAD_OF_DECAY], f"{where}.{INSTEAD_OF_DECAY}")
    return settings


def _sequence_problems(phases: Sequence[Phase]) -> list[str]:
    """What is wrong with the phases taken together."""
    problems = []
    first = phases[0]
    if first.start.amount:
        problems.append(f"{first.where}: the first phase must start at 0, not at {first.start}")
    if "lr" not in first.settings and first.function is None:
        problems.append(f"{first.where}.lr: missing; the first phase must give a learning rate")
    latest: dict[str, Duration] = {}
    steps_known = False
    for phase in phases:
        before = latest.get(phase.start.unit)
        if before and phase.start.amount <= before.amount:
            problems.append(f"{phase.where}: starts at {phase.start}, not after the one before it ({before})")
        latest[phase.start.unit] = phase.start
        steps_known |= "lr_decay_steps" in phase.settings
        if phase.settings.get("lr_decay_rate") is not None and not steps_known:
            problems.append(f"{phase.where}.lr_decay_rate: needs `lr_decay_steps`")
    return problems + _replacement_problems(phases)


def _replacement_problems(phases: Sequence[Phase]) -> list[str]:
    """What is wrong with what stands in for decay in the phases taken together."""
    problems, before, layers = [], None, None
    for phase in phases:
        if INSTEAD_OF_DECAY not in phase.settings:
            continue
        where, form = f"{phase.where}.{INSTEAD_OF_DECAY}", phase.settings[INSTEAD_OF_DECAY]
        if isinstance(before, ExponentialLr) and not isinstance(form, ExponentialLr):
            # Its weights have another length than their directions know of; the buffers too.
            problems.append(f"{where}: exponential-lr can only be followed by exponential-lr; to end it give decay 0")
        if form is not None:
            if layers is not None and form.layers != layers[0]:
                problems.append(f"{where}.layers: {form.layers!r} is not {layers[0]!r}, as in an earlier phase")
            before, layers = form, layers or (form.layers,)
    return problems
