"""A number that changes over the run: constant, linear, cosine or in steps, with a warm-up.

Written in a phase in place of a number:

    lr: {schedule: cosine, from: 0.1, to: 0, warmup: 5ep}

| key | for | meaning |
|---|---|---|
| `schedule` | all | `constant`, `linear`, `cosine` or `step` |
| `from` | all | the value at the start (after the warm-up) |
| `to` | linear, cosine | the value at the end, and after it; 0 if left out |
| `over` | linear, cosine | how long it takes, counted from the start of the phase |
| `until` | linear, cosine | where it ends, counted from the start of the run; `100%` if neither is given |
| `every` | step | how far the drops lie apart |
| `at` | step | or a list of where they are, counted from the start of the phase |
| `factor` | step | what the value is multiplied with at a drop; 0.1 if left out |
| `warmup` | all | the value first rises on a line from 0 to `from` for so long, in equal steps, never 0 itself |

Lengths are `30ep` (epochs), `500st` (optimizer steps), `10%` (of the run), or a bare number of epochs.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any

from norm_matters.core.clock import Clock, Duration
from norm_matters.core.errors import nearest

_COMMON = ("schedule", "from", "warmup")
_KEYS = {
    "constant": _COMMON,
    "linear": (*_COMMON, "to", "over", "until"),
    "cosine": (*_COMMON, "to", "over", "until"),
    "step": (*_COMMON, "factor", "every", "at"),
}
_WHOLE_RUN = Duration.parse("100%")


def is_number(value: Any) -> bool:
    """Whether `value` is a finite real number (a bool is none)."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def parse_schedule(spec: Mapping[str, Any]) -> "Schedule":
    """Read the mapping described above.

    Raises:
        ValueError: says what is wrong, without naming the setting it stands for.
    """
    shape = spec.get("schedule")
    if shape not in _KEYS:
        hint = nearest(str(shape), _KEYS) or f"; there are: {', '.join(_KEYS)}"
        raise ValueError(f"unknown schedule '{shape}'{hint}" if "schedule" in spec else "a mapping needs `schedule`")
    for key in spec:
        if key not in _KEYS[shape]:
            raise ValueError(f"unknown key '{key}' of a {shape} schedule{nearest(str(key), _KEYS[shape])}")
    numbers = {"from": spec.get("from"), "to": spec.get("to", 0.0), "factor": spec.get("factor", 0.1)}
    for key, value in numbers.items():
        if not is_number(value):
            raise ValueError(f"`{key}` of a {shape} schedule must be a number, not {value!r}")
    if "over" in spec and "until" in spec:
        raise ValueError("`over` and `until` exclude each other")
    if shape == "step" and ("every" in spec) == ("at" in spec):
        raise ValueError("a step schedule needs one of `every` and `at`")
    drops = spec.get("at", [])
    if not isinstance(drops, list | tuple):
        raise ValueError(f"`at` must be a list, not {drops!r}")
    schedule = Schedule(
        shape=shape,
        first=float(numbers["from"]),
        last=float(numbers["to"]),
        factor=float(numbers["factor"]),
        warmup=_length(spec, "warmup"),
        over=_length(spec, "over"),
        until=_length(spec, "until"),
        every=_length(spec, "every"),
        drops=tuple(Duration.parse(drop) for drop in drops),
    )
    if schedule.every is not None and schedule.every.amount == 0:
        raise ValueError("`every` must be longer than 0")
    return schedule


def _length(spec: Mapping[str, Any], key: str) -> Duration | None:
    return Duration.parse(spec[key]) if key in spec else None


@dataclass(frozen=True)
class Schedule:
    """A number as a function of the clock; `parse_schedule` documents the attributes."""

    shape: str
    first: float
    last: float = 0.0
    factor: float = 0.1
    warmup: Duration | None = None
    over: Duration | None = None
    until: Duration | None = None
    every: Duration | None = None
    drops: tuple[Duration, ...] = ()

    @property
    def relative(self) -> bool:
        """Whether the values depend on the planned length of the run."""
        lengths = (self.warmup, self.over, self.until, self.every, *self.drops)
        open_end = self.shape in ("linear", "cosine") and self.over is None and self.until is None
        return open_end or any(length is not None and length.unit == "%" for length in lengths)

    def at(self, clock: Clock, start: int) -> float:
        """The value at `clock`, for a phase that started at optimizer step `start`."""
        done = clock.step - start
        warmup = self.warmup.steps(clock) if self.warmup else 0
        if done < warmup:
            return self.first * (done + 1) / (warmup + 1)
        if self.shape == "constant":
            return self.first
        if self.shape == "step":
            return self.first * self.factor ** self._drops_done(clock, done)
        length = self.over.steps(clock) if self.over else (self.until or _WHOLE_RUN).steps(clock) - start
        if done >= length:
            return self.last
        progress = (done - warmup) / (length - warmup)
        if self.shape == "cosine":
            progress = (1 - math.cos(math.pi * progress)) / 2
        return self.first + (self.last - self.first) * progress

    def _drops_done(self, clock: Clock, done: int) -> int:
        if self.every is not None:
            return done // max(1, self.every.steps(clock))
        return sum(done >= drop.steps(clock) for drop in self.drops)
