"""The learning rate of a named regime over the epochs, drawn with text."""

import math
from typing import Any

from norm_matters.core.clock import Clock
from norm_matters.regimes import REGIMES
from norm_matters.regimes.regime import Regime

_WIDTH = 60
_STEPS_PER_EPOCH = 100
_LINES_PER_DECADE = 3
_LINES = 8


def plot_lr(name: str, *, epochs: int = 100) -> str:
    """Draw the learning rate of a named regime.

    The axis is logarithmic for a regime that goes down in a few steps, and starts at 0 otherwise.

    Args:
        epochs: length of the run.

    Returns:
        About ten lines of ASCII text: the settings at the start, and the plot.
    """
    regime = Regime(REGIMES.get(name)(), name=name)
    clock = Clock(0, _STEPS_PER_EPOCH, epochs)
    rates = [rate for _, rate in regime.lr_curve(clock, _WIDTH)]
    lines = _stepped(rates) if min(rates) > 0 and 1 < len(set(rates)) <= _LINES else _smooth(rates)
    ruler = [f"{'':>8} +{'-' * _WIDTH}", f"{'':>10}{'0':<{_WIDTH - 10}}{f'{epochs} epochs':>10}"]
    return "\n".join([_headline(regime, clock), *lines, *ruler])


def _stepped(rates: list[float]) -> list[str]:
    """Lines on a logarithmic axis, labelled with the rates that occur."""
    depths = [round(_LINES_PER_DECADE * math.log10(max(rates) / rate)) for rate in rates]
    labels = dict(zip(depths, rates, strict=True))
    return [_line(labels.get(depth), [own == depth for own in depths]) for depth in range(max(depths) + 1)]


def _smooth(rates: list[float]) -> list[str]:
    """Lines on an axis from the largest rate down to 0, each labelled with its height."""
    last = _LINES - 1
    depths = [round(last * (1 - rate / max(rates))) for rate in rates]
    return [_line(max(rates) * (1 - depth / last), [own == depth for own in depths]) for depth in range(_LINES)]


def _line(label: float | None, dots: list[bool]) -> str:
    text = "" if label is None else f"{label:.2g}"
    return f"{text:>8} |{''.join(' *'[dot] for dot in dots)}".rstrip()


def _headline(regime: Regime, clock: Clock) -> str:
    settings = regime.at(clock)
    shown = {key: value for key, value in settings.items() if key not in ("optimizer", "lr", "groups")}
    parts = [settings["optimizer"], *(f"{key} {_shown(value)}" for key, value in shown.items())]
    parts += [f"{kind} {key} {_shown(value)}" for kind, own in settings["groups"].items() for key, value in own.items()]
    return f"{regime.name}: {', '.join(parts)}"


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, (int, float)) and not isinstance(value, bool) else str(value)
