"""The instruments of one run: which, at which steps, and the row of numbers that each epoch gives."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from norm_matters.core.config import TrainConfig
from norm_matters.engine.instruments.instrument import Column, Instrument
from norm_matters.engine.instruments.invariance import ScaleInvariance
from norm_matters.engine.instruments.norms import NormInputs, NormSigma
from norm_matters.engine.instruments.weights import WeightMotion
from norm_matters.engine.state import TrainingState
from norm_matters.engine.tensors import part, with_prefix
from norm_matters.weights.recorded import NormRecorder, channel_weights

SAMPLES_PER_EPOCH = 16
"""How many steps of an epoch are measured at most."""

STEPS_PER_SAMPLE = 20
"""How many steps there are for one that is measured, at least: what bounds the cost in short epochs."""


def instruments_of(config: TrainConfig, state: TrainingState) -> "Instruments | None":
    """What a run measures; None where it measures nothing."""
    if config.instruments == "none" and config.record_norms == "none":
        return None
    norms = None
    # Weights are the same on all ranks; the first writes.
    if config.record_norms != "none" and state.group.first:
        weights = channel_weights(state.module, state.masters)
        norms = NormRecorder(weights, every=config.record_norms, steps=state.clock.steps_per_epoch)
    return Instruments(state, level=config.instruments, norms=norms)


class Instruments:
    """Measures a training that is driven elsewhere; it changes no bit of it.

    Args:
        state: the training; read only.
        level: `default` for what costs next to nothing, `all` for the range of the norms' inputs and the
            scale-invariance check too; `none` where there are only norms to take down.
        norms: takes the norms of channels down beside, at every epoch or step.
    """

    def __init__(
        self,
        state: TrainingState,
        *,
        level: Literal["none", "default", "all"] = "default",
        norms: NormRecorder | None = None,
    ) -> None:
        self._state = state
        self.norms = norms
        self._parts: list[Instrument] = [] if level == "none" else [WeightMotion(state), NormSigma(state.module)]
        if level == "all":
            self._parts += [NormInputs(state.module), ScaleInvariance(state)]
        self.columns: list[Column] = [column for each in self._parts for column in each.columns]
        self.row = np.array([])
        self._measured = measured_steps(state.clock.steps_per_epoch)

    @contextlib.contextmanager
    def step(self, number: int) -> Iterator[None]:
        """Around the step of that number (from 1) of an epoch: measure it if it is one of those to be measured."""
        if self.norms:
            self.norms.before_step()
        if number not in self._measured or not self._parts:
            yield
            return
        self._state.settle()
        for each in self._parts:
            each.before_step()
        skipped, made = self._state.skipped_steps, False
        try:
            yield
            self._state.settle()
            made = self._state.skipped_steps == skipped
        finally:
            for each in self._parts:
                each.after_step(made=made)

    def end_epoch(self, images: Tensor) -> None:
        """Bring the epoch's numbers into `row`: float64, in the order of `columns`.

        Args:
            images: the epoch's last batch.
        """
        values = [value for each in self._parts for value in each.end_epoch(images)]
        self.row = np.concatenate(values) if values else np.array([])
        assert len(self.row) == sum(column.size for column in self.columns)
        if self.norms:
            self.norms.end_epoch()

    def tensors(self) -> dict[str, Tensor]:
        """What has been measured in an epoch that is not over, or not evaluated yet: `instruments/...`."""
        found = {"instruments/row": torch.from_numpy(self.row)}
        for each in self._parts:
            found |= with_prefix(f"instruments/{type(each).__name__}/", each.tensors())
        return found | (self.norms.tensors() if self.norms else {})

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from what `tensors` gave; from nothing at the beginning of an epoch."""
        if "instruments/row" in tensors:
            self.row = tensors["instruments/row"].numpy()
            for each in self._parts:
                each.load(part(tensors, f"instruments/{type(each).__name__}/"))
        if self.norms:
            self.norms.load(tensors)

    def values(self) -> dict[tuple[str, str], np.ndarray]:
        """The numbers of the last epoch by (instrument, layer)."""
        ends = np.cumsum([column.size for column in self.columns])
        values = np.split(self.row, ends[:-1]) if len(ends) else []
        return {(column.instrument, column.layer): value for column, value in zip(self.columns, values, strict=True)}


def measured_steps(steps: int) -> frozenset[int]:
    """Which steps (from 1) of an epoch of that many are measured: spread evenly, always the last."""
    samples = max(1, min(SAMPLES_PER_EPOCH, steps // STEPS_PER_SAMPLE))
    return frozenset(steps * sample // samples for sample in range(1, samples + 1))
