"""Where a run stands, and lengths of training in the user's words: `30ep`, `500st`, `10%`."""

import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

Unit = Literal["ep", "st", "%"]


@dataclass(frozen=True)
class Clock:
    """A position in a run. Everything that depends on time is a function of this alone.

    Attributes:
        step: optimizer steps done so far (a step skipped after an overflow counts: its data was used).
        steps_per_epoch: optimizer steps in one pass over the training images.
        epochs: planned length of the run.
        batch_size: images per optimizer step.
    """

    step: int
    steps_per_epoch: int
    epochs: int
    batch_size: int = 1

    @property
    def epoch(self) -> int:
        """Whole epochs done, from 0."""
        return self.step // self.steps_per_epoch

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.epochs * self.steps_per_epoch

    @property
    def samples(self) -> int:
        """Images seen so far."""
        return self.step * self.batch_size

    def at_step(self, step: int) -> "Clock":
        """The same run at another step."""
        return Clock(step, self.steps_per_epoch, self.epochs, self.batch_size)


@dataclass(frozen=True)
class Duration:
    """A length of training: epochs, optimizer steps, or a share of the run in percent.

    Raises:
        ValueError: from `parse`, for text that is none of `30ep`, `500st`, `10%` or a bare number of epochs.
    """

    amount: Fraction
    unit: Unit

    @classmethod
    def parse(cls, value: "Duration | str | int | float") -> "Duration":
        """Read `30ep`, `500st`, `10%`; a bare number counts epochs."""
        if isinstance(value, Duration):
            return value
        text = str(value).strip()
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(ep|st|%)?", text)
        if not match:
            raise ValueError(f"'{value}' is no duration; write 30ep (epochs), 500st (steps) or 10%")
        unit: Unit = match[2] or "ep"  # type: ignore[assignment]
        return cls(Fraction(match[1]), unit)

    def steps(self, clock: Clock) -> int:
        """The duration in optimizer steps of that run, rounded to the nearest."""
        scale = {
            "st": Fraction(1),
            "ep": Fraction(clock.steps_per_epoch),
            "%": Fraction(clock.total_steps, 100),
        }
        return round(self.amount * scale[self.unit])

    def __str__(self) -> str:
        return f"{float(self.amount):g}{self.unit}"


_SECONDS = {"s": 1, "min": 60, "h": 3600}


def parse_seconds(text: str) -> float:
    """Read a time such as `30s`, `5min` or `1.5h`.

    Raises:
        ValueError: it is none, or not above zero.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|min|h)", text.strip())
    seconds = float(match[1]) * _SECONDS[match[2]] if match else 0.0
    if not 0 < seconds < float("inf"):
        raise ValueError(f"'{text}' is no time above zero; write 30s, 5min or 2h")
    return seconds


def parse_interval(text: str) -> Duration | float:
    """Read what lies between two events: a length of training (`1ep`, `500st`, `10%`), or a time in seconds (`5min`).

    Raises:
        ValueError: it is none, or not above zero.
    """
    for parse in (Duration.parse, parse_seconds):
        try:
            found = parse(text)
        except ValueError:
            continue
        if not isinstance(found, Duration) or found.amount > 0:
            return found
    raise ValueError(f"'{text}' is no interval above zero; write 1ep (epochs), 500st (steps), 10%, 30s, 5min or 2h")
