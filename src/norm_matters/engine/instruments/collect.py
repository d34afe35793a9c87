"""The instruments of one run: which, at which steps, and the row of numbers that each epoch gives."""

import contextlib
from collections.abc import Iterator
from typing import Literal

import numpy as np
from torch import Tensor

from norm_matters.engine.instruments.instrument import Column, Instrument
from norm_matters.engine.instruments.invariance import ScaleInvariance
from norm_matters.engine.instruments.norms import NormInputs, NormSigma
from norm_matters.engine.instruments.weights import WeightMotion
from norm_matters.engine.state import TrainingState

SAMPLES_PER_EPOCH = 16
"""How many steps of an epoch are measured at most."""

STEPS_PER_SAMPLE = 20
"""How many steps there are for one that is measured, at least: what bounds the cost in short epochs."""


class Instruments:
    """Measures a training that is driven elsewhere; it changes no bit of it.

    Args:
        state: the training; read only.
        level: `default` for what costs next to nothing, `all` for the range of the norms' inputs and the
            scale-invariance check too.
    """

    def __init__(self, state: TrainingState, *, level: Literal["default", "all"] = "default") -> None:
        self._state = state
        self._parts: list[Instrument] = [WeightMotion(state), NormSigma(state.module)]
        if level == "all":
            self._parts += [NormInputs(state.module), ScaleInvariance(state)]
        self.columns: list[Column] = [column for part in self._parts for column in part.columns]
        self.row = np.array([])
        self._measured = measured_steps(state.clock.steps_per_epoch)

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around the step of that number (from 1) of an epoch: measure it if it is one of those to be measured."""
        if number not in self._measured:
            yield
            return
        self._state.settle()
        for part in self._parts:
            part.before_step()
        skipped, made = self._state.skipped_steps, False
        try:
            yield
            self._state.settle()
            made = self._state.skipped_steps == skipped
        finally:
            for part in self._parts:
                part.after_step(made=made)

    def end_epoch(self, images: Tensor) -> None:
        """Bring the epoch's numbers into `row`: float64, in the order of `columns`.

        Args:
            images: the epoch's last batch.
        """
        values = [value for part in self._parts for value in part.end_epoch(images)]
        self.row = np.concatenate(values) if values else np.array([])
        assert len(self.row) == sum(column.size for column in self.columns)

    def values(self) -> dict[tuple[str, str], np.ndarray]:
        """The numbers of the last epoch by (instrument, layer)."""
        ends = np.cumsum([column.size for column in self.columns])
        parts = np.split(self.row, ends[:-1]) if len(ends) else []
        return {(column.instrument, column.layer): part for column, part in zip(self.columns, parts, strict=True)}


def measured_steps(steps: int) -> frozenset[int]:
    """Which steps (from 1) of an epoch of that many are measured: spread evenly, always the last."""
    samples = max(1, min(SAMPLES_PER_EPOCH, steps // STEPS_PER_SAMPLE))
    return frozenset(steps * sample // samples for sample in range(1, samples + 1))
