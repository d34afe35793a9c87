"""A regime: the optimizer and its settings as a function of the clock, and of nothing else."""

from collections.abc import Iterable
from fractions import Fraction
from typing import Any

from norm_matters.core.clock import Clock
from norm_matters.core.errors import UserError
from norm_matters.regimes.instead_of_decay import KEY as INSTEAD_OF_DECAY
from norm_matters.regimes.instead_of_decay import InsteadOfDecay, NormSchedule
from norm_matters.regimes.phases import Phase, Source, parse_phases
from norm_matters.regimes.schedules import Schedule

DEFAULT_OPTIMIZER = "SGD"


def fold(phases: Iterable[tuple[int, Phase]], clock: Clock) -> dict[str, Any]:
    """Settings at `clock` after these phases, each given with the optimizer step of its start.

    Returns:
        `optimizer`, `lr` and whatever else the phases set; `groups`: kind of parameters to settings of theirs.
    """
    values: dict[str, tuple[Any, int]] = {}
    groups: dict[str, dict[str, tuple[Any, int]]] = {}
    for start, phase in phases:
        settings = {**phase.settings, **(phase.function(clock) if phase.function else {})}
        values |= {key: (value, start) for key, value in settings.items()}
        for kind, own in phase.groups.items():
            groups.setdefault(kind, {}).update({key: (value, start) for key, value in own.items()})
    decay = _lr_decay(values, clock)
    settings = {"optimizer": DEFAULT_OPTIMIZER, **_evaluate(values, clock)}
    if settings.get("lr") is None:
        raise UserError(f"the regime gives no learning rate at step {clock.step}")
    if decay != 1:
        settings["lr"] *= decay
    return {**settings, "groups": {kind: _evaluate(own, clock) for kind, own in groups.items()}}


def _lr_decay(values: dict[str, tuple[Any, int]], clock: Clock) -> float:
    """Pop the decay of the learning rate, and return its factor at `clock`."""
    rate, since_rate = values.pop("lr_decay_rate", (None, 0))
    every, since_every = values.pop("lr_decay_steps", (None, 0))
    if rate is None:
        return 1.0
    since = max(since_rate, since_every, values["lr"][1] if "lr" in values else 0)
    return rate ** ((clock.step - since) // max(1, every.steps(clock)))


def _evaluate(values: dict[str, tuple[Any, int]], clock: Clock) -> dict[str, Any]:
    evaluated = {
        key: value.at(clock, start) if isinstance(value, Schedule) else value for key, (value, start) in values.items()
    }
    return {key: value for key, value in evaluated.items() if value is not None}


class Regime:
    """Optimizer settings over a run.

    A fold over the phases that have started, from the first one on, at every call: no call depends on earlier ones,
    so a resumed run cannot differ.

    Args:
        source: phases in the language of `phases.py`.
        name: what messages and records call it.
        lr_factor: every learning rate is multiplied by it.

    Raises:
        UserError: with all that can be seen to be wrong without torch.
    """

    def __init__(self, source: Source, *, name: str = "regime", lr_factor: float = 1.0) -> None:
        self.name = name
        self.lr_factor = lr_factor
        self.phases = parse_phases(source, where=name)

    def at(self, clock: Clock) -> dict[str, Any]:
        """Settings for the optimizer step that follows `clock`.

        Returns:
            `optimizer` (str), `lr` and whatever else is set; `groups`: kind of parameters to settings of theirs;
            `instead_of_decay`, if there is any.

        Raises:
            UserError: a function of the regime failed or returned no settings.
        """
        settings = fold(self._started(clock), clock)
        if self.lr_factor != 1:
            for own in (settings, *settings["groups"].values()):
                if "lr" in own:
                    own["lr"] *= self.lr_factor
            form = settings.get(INSTEAD_OF_DECAY)
            if isinstance(form, NormSchedule):
                settings[INSTEAD_OF_DECAY] = form.model_copy(update={"lr": form.lr * self.lr_factor})
        return settings

    def resets(self, clock: Clock) -> int:
        """How many phases with `reset` have started by `clock`."""
        return sum(phase.reset for _, phase in self._started(clock))

    def unreached(self, clock: Clock) -> list[str]:
        """A warning for each phase that starts only after the end of the run."""
        return [
            f"{phase.where} starts at {phase.start} and is never reached: the run ends after {clock.epochs}ep"
            for phase in self.phases
            if phase.start.steps(clock) >= clock.total_steps and phase is not self.phases[0]
        ]

    @property
    def relative(self) -> bool:
        """Whether the settings at some step depend on the planned length of the run."""
        for phase in self.phases:
            lengths = [phase.start, phase.settings.get("lr_decay_steps")]
            if any(length is not None and length.unit == "%" for length in lengths):
                return True
            values = [*phase.settings.values(), *(value for own in phase.groups.values() for value in own.values())]
            if any(isinstance(value, Schedule) and value.relative for value in values):
                return True
        return False

    @property
    def kinds(self) -> list[str]:
        """The kinds of parameters that have settings of their own, in the order of first mention."""
        return list(dict.fromkeys(kind for phase in self.phases for kind in phase.groups))

    @property
    def replacements(self) -> list[InsteadOfDecay]:
        """What stands in for weight decay in one phase or another."""
        found = (phase.settings.get(INSTEAD_OF_DECAY) for phase in self.phases)
        return [form for form in found if form is not None]

    def starts(self, clock: Clock) -> list[int]:
        """The optimizer steps at which the phases start in the run of `clock`, as far as they do."""
        starts = {phase.start.steps(clock) for phase in self.phases}
        return sorted(start for start in starts if start < clock.total_steps)

    def lr_curve(self, clock: Clock, points: int) -> list[tuple[float, float]]:
        """The learning rate at `points` steps spread evenly over the run of `clock`, as (epoch, LR)."""
        steps = [int(Fraction(clock.total_steps * point, points)) for point in range(points)]
        return [(step / clock.steps_per_epoch, self.at(clock.at_step(step))["lr"]) for step in steps]

    def _started(self, clock: Clock) -> list[tuple[int, Phase]]:
        """The phases that have started, in the order of their starts (the sort is stable)."""
        started = [(phase.start.steps(clock), phase) for phase in self.phases]
        return sorted((pair for pair in started if pair[0] <= clock.step), key=lambda pair: pair[0])
