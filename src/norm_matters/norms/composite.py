"""Batch norms made of another one's statistic: `smooth:base=(topk:k=10)`, `renorm:base=l1`."""

import abc
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from norm_matters.norms.base import activate
from norm_matters.norms.batchwise import BATCH_OPTIONS, BatchwiseNorm, recomputing
from norm_matters.norms.memory import is_saving
from norm_matters.norms.reduce import Reducer, accumulator
from norm_matters.norms.spec import Option
from norm_matters.norms.statistic import Measure, Statistic, measure_by, normalise_measured, offer_measured
from norm_matters.norms.which import canonical_statistic, statistic_norm

BASE = Option("text", "l2", shown=True, canonical=canonical_statistic)
COMPOSITE_OPTIONS: Mapping[str, Option] = {"base": BASE, **BATCH_OPTIONS}


@torch.library.custom_op("norm_matters::snapshot", mutates_args=())
def snapshot(buffer: Tensor) -> Tensor:
    """A copy that torch.compile keeps.

    It would take another one anew in the backward pass, to save memory, and by then the buffer has moved.
    """
    return buffer.clone()


@snapshot.register_fake
def _(buffer: Tensor) -> Tensor:
    return torch.empty_like(buffer)


class CompositeNorm(BatchwiseNorm):
    """A batch norm that takes its estimate of sigma from another one, its base, and does something with it.

    Args:
        num_features: channels C.
        base: spec of a batch norm with none but its own options: `l1`, `topk:k=10`.
        options: those of `BatchwiseNorm`.
    """

    OPTIONS: ClassVar[Mapping[str, Option]] = COMPOSITE_OPTIONS
    composite = True
    base: str

    def __init__(self, num_features: int, **options: Any) -> None:
        super().__init__(num_features, **options)
        base = statistic_norm(self.base)
        # Not the base itself: it would be a layer of the model, and counted as a norm.
        self._base_statistic_for, self._base_tracked = base.statistic_for, base.tracked

    def statistic_for(self, n: int) -> Statistic:
        """See `BatchwiseNorm`; the base's."""
        return self._base_statistic_for(n)

    def tracked(self, var: Tensor, n: int) -> Tensor:
        """See `BatchwiseNorm`; as the base does."""
        return self._base_tracked(var, n)


class AdjustedNorm(CompositeNorm):
    """A composite that changes what was measured of a batch before it normalises by it.

    Nothing is changed while an observer looks on (calibration wants the base's own statistics), nor in evaluation.
    """

    _found: dict[str, Tensor]

    @abc.abstractmethod
    def adjust(
        self, mean: Tensor, measure: Measure, weight: Tensor, bias: Tensor, n: int, reducer: Reducer
    ) -> tuple[Measure, Tensor, Tensor]:
        """Change the measure, or weight and bias, in training.

        Args:
            mean: of the batch (C,), without gradient, as the measure.
            measure: the base's.
            weight, bias: (C,); ones and zeros where the norm has none.
            n: values per channel.
            reducer: over the ranks that share the batch.
        """

    def normalise_batch(
        self, x: Tensor, residual: Tensor | None = None, *, relu: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `BatchwiseNorm`."""
        reducer = self.reducer()
        n = self.count(x, reducer)
        measured: dict[str, Any] = {
            "statistic": self.statistic_for(n),
            "dtype": self.compute_dtype(x),
            "n": n,
            "reducer": reducer,
        }
        mean, measure = measure_by(x, **measured)
        weight, bias = self.affine_in(accumulator(x))
        if self.training and self.observer is None:
            weight = torch.ones_like(mean) if weight is None else weight
            bias = torch.zeros_like(mean) if bias is None else bias
            measure, weight, bias = self.adjust(mean, measure, weight, bias, n, reducer)
        y = normalise_measured(x, weight, bias, mean, measure, eps=self.eps, **measured)
        y = activate(y, residual, relu=relu)
        if is_saving():
            offer_measured(y, x, weight, bias, mean, measure.sigma, eps=self.eps, residual=residual, relu=relu)
        return y, mean, self.tracked(measure.sigma.square(), n)

    def as_found(self, *keys: str) -> tuple[Tensor, ...]:
        """Buffers as this forward pass found them, though activation checkpointing repeats it after they moved.

        They are remembered from the last pass: a layer that is called more than once before a backward pass, under
        activation checkpointing, repeats all calls with the last one's.
        """
        if not recomputing():
            found = {key: snapshot(self.get_buffer(key)) for key in keys}
            if torch.compiler.is_compiling():
                return tuple(found.values())
            self._found = found
        return tuple(self._found[key] for key in keys)


def scale_sigma(measure: Measure, factor: Tensor) -> Measure:
    """Sigma times a factor (C,) without gradient, the derivative with it."""
    gain = None if measure.gain is None else measure.gain * factor
    return measure._replace(sigma=measure.sigma * factor, gain=gain)
