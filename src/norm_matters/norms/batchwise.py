"""What all batch norms share: running statistics, evaluation, freezing, synchronisation, checkpoints.

A batch norm computes `y = (x - mean) / sqrt(sigma^2 + eps) * weight + bias` per channel; which statistic estimates
sigma is the only thing the norms differ in. `running_var` holds the estimate of sigma squared, so that in evaluation
every batch norm here is a batch norm: its checkpoints, its absorption and its export are those of `nn.BatchNorm2d`.
"""

import abc
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor

from norm_matters.norms.base import AFFINE_OPTIONS, AffineNorm, Capability, activate
from norm_matters.norms.memory import is_remaking
from norm_matters.norms.reduce import Reducer, accumulator, channel_count
from norm_matters.norms.spec import Option
from norm_matters.norms.spread import spread_of_draws
from norm_matters.norms.statistic import Statistic, normalise_by

BATCH_OPTIONS: Mapping[str, Option] = {
    "momentum": Option("float", 0.1, minimum=0, maximum=1, words=("none",)),
    "track_running_stats": Option("bool", True),
    "sync": Option("bool", False),
    **AFFINE_OPTIONS,
    "frozen": Option("word", None, words=("none", "stats", "affine", "all")),
}
SCALE_OPTIONS: Mapping[str, Option] = {
    "constant": Option("float", "calibrated", minimum=0, above=True, words=("calibrated", "paper")),
    **BATCH_OPTIONS,
}


class BatchwiseNorm(AffineNorm):
    """A norm whose statistics are taken per channel over the batch, with running estimates for evaluation.

    A batch whose statistics are not finite shows in the output, and changes neither the running statistics nor
    `num_batches_tracked`; it is counted in `num_batches_rejected`. The decision is taken on the device: nothing waits
    for it. A forward pass that activation checkpointing repeats in the backward pass is not counted again.

    Attributes of the class:
        estimates_sigma: whether `running_var` holds an estimate; where not, it stays 1.
        composite: whether the norm is made of another one's statistic.

    Args:
        num_features: channels C.
        device, dtype: of the parameters; the running statistics are float32 or wider.
        momentum: weight of the new batch in the running statistics, as in torch; None averages over all batches.
        track_running_stats: without it, evaluation uses the batch's statistics too.
        sync: in a distributed run, take the statistics over the batches of all ranks.
        frozen: "stats": normalise by the running statistics in training too, and leave them; "affine": do not train
            weight and bias; "all": both.
        options: `eps`, `affine`, `bias`, `stats_dtype` ... of `AffineNorm`.
    """

    OPTIONS = BATCH_OPTIONS
    estimates_sigma: ClassVar[bool] = True
    composite: ClassVar[bool] = False
    momentum: float | None
    track_running_stats: bool
    sync: bool
    frozen: Literal["stats", "affine", "all"] | None  # type: ignore[assignment]
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None
    num_batches_rejected: Tensor | None
    # Version 2 is nn.BatchNorm2d's: the first with num_batches_tracked.
    _version = 2

    def __init__(
        self,
        num_features: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__(num_features, device=device, dtype=dtype, **options)
        wide = torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)
        new = partial(torch.empty, device=device)
        track = self.track_running_stats
        self.register_buffer("running_mean", new(num_features, dtype=wide) if track else None)
        self.register_buffer("running_var", new(num_features, dtype=wide) if track else None)
        self.register_buffer("num_batches_tracked", new((), dtype=torch.long) if track else None)
        # Not of nn.BatchNorm2d's state: it says what happened, not what the layer computes.
        self.register_buffer("num_batches_rejected", new((), dtype=torch.long) if track else None, persistent=False)
        # Called with (mean, sigma squared, values per channel on all ranks) of a batch in place of tracking it.
        self.observer: Callable[[Tensor, Tensor, int], None] | None = None
        # Not the subclass's: what else that resets does not exist yet.
        BatchwiseNorm.reset_running_stats(self)

    @abc.abstractmethod
    def statistic_for(self, n: int) -> Statistic:
        """The estimate of sigma for n values per channel."""

    def normalise_batch(
        self, x: Tensor, residual: Tensor | None = None, *, relu: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Normalise x (N, C, *) by its own statistics, add the residual (as x), apply a ReLU.

        Returns:
            The output (dtype and layout of x), the mean (C,) and the estimate of sigma squared (C,), both detached.
        """
        reducer = self.reducer()
        n = self.count(x, reducer)
        weight, bias = self.affine_in(accumulator(x))
        y, mean, var = normalise_by(
            x,
            weight,
            bias,
            eps=self.eps,
            statistic=self.statistic_for(n),
            dtype=self.compute_dtype(x),
            n=n,
            reducer=reducer,
            residual=residual,
            relu=relu,
        )
        return y, mean, self.tracked(var, n)

    def count(self, x: Tensor, reducer: Reducer) -> int:
        """The values per channel of x, over all ranks that share the batch.

        Raises:
            ValueError: there is one only; on all of these ranks.
        """
        n = reducer.count(x)
        if n < 2:
            raise ValueError(f"{self.label()} needs more than one value per channel in training, got {tuple(x.shape)}")
        return n

    def tracked(self, var: Tensor, n: int) -> Tensor:
        """What `running_var` takes of sigma squared, estimated from n values per channel."""
        return var

    def spread(self, n: int) -> float:
        """The standard deviation over the mean of the estimate of sigma, from batch to batch of n Gaussian values."""
        return spread_of_draws(self.statistic_for(n), n)

    def normalise(self, x: Tensor) -> Tensor:
        """By the batch in training (and where nothing is tracked), else by the running estimates."""
        return self.normalise_and_activate(x, None, relu=False)

    def normalise_and_activate(self, x: Tensor, residual: Tensor | None, *, relu: bool) -> Tensor:
        """See the base class."""
        if self.running_mean is not None and (self.stats_frozen or not self.training):
            return activate(self._normalise_by_running_stats(x), residual, relu=relu)
        if channel_count(x) < 2 and not self._shares():
            raise ValueError(f"{self.label()} needs more than one value per channel in training, got {tuple(x.shape)}")
        y, mean, var = self.normalise_batch(x, residual, relu=relu)
        if self.training and self.running_mean is not None and not recomputing():
            if self.observer is None:
                self._track(mean, var)
            else:
                self.observer(mean, var, self.reducer().count(x))
        return y

    def capabilities(self) -> frozenset[Capability]:
        """See the base class."""
        own: set[Capability] = {"sync"} if self.running_mean is None else {"sync", "running_stats"}
        return super().capabilities() | own

    @property
    def stats_frozen(self) -> bool:
        """Whether training leaves the running statistics and normalises by them."""
        return self.frozen in ("stats", "all")

    def reducer(self) -> Reducer:
        """See the base class; with `sync`, over the ranks."""
        reducer = super().reducer()
        if not self._shares():
            return reducer
        return replace(reducer, group=dist.group.WORLD)

    def _shares(self) -> bool:
        """Whether statistics are shared with other ranks now."""
        # In evaluation the ranks have batches of their own, and not equally many.
        return self.sync and self.training and dist.is_available() and dist.is_initialized()

    def eval_affine(self) -> tuple[Tensor, Tensor]:
        """Scale and shift (C,), float64, of the affine map per channel that the norm is in evaluation.

        Raises:
            ValueError: no running statistics are tracked.
        """
        if self.running_mean is None or self.running_var is None:
            raise ValueError(f"{self.label()} has no running statistics")
        scale = (self.running_var.double() + self.eps).rsqrt()
        scale = scale if self.weight is None else scale * self.weight.detach().double()
        shift = -self.running_mean.double() * scale
        return scale, shift if self.bias is None else shift + self.bias.detach().double()

    def _normalise_by_running_stats(self, x: Tensor) -> Tensor:
        assert self.running_mean is not None
        assert self.running_var is not None
        dtype = torch.promote_types(x.dtype, torch.float32)
        mean, var = self.running_mean.to(dtype), self.running_var.to(dtype)
        return nn.functional.batch_norm(x, mean, var, *self.affine_in(dtype), False, 0.0, self.eps)

    @torch.no_grad()
    def _track(self, mean: Tensor, var: Tensor) -> None:
        """Move the running statistics towards those of a batch, unless one of these is not finite."""
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.num_batches_rejected is not None
        # A finite sum is one of finite numbers. On a CPU the answer costs nothing, and most of what follows is saved.
        share = self.momentum
        if share is not None and _is_at_hand(mean) and math.isfinite((mean.sum() + var.sum()).item()):
            self.num_batches_tracked.add_(1)
            for running, batch in ((self.running_mean, mean), (self.running_var, var)):
                running.mul_(1 - share).add_(share * batch.to(running.dtype))
            return
        accept = torch.isfinite(mean).all() & torch.isfinite(var).all()
        self.num_batches_tracked.add_(accept)
        self.num_batches_rejected.add_(~accept)
        if share is None:
            share = 1 / self.num_batches_tracked.clamp(min=1).to(self.running_mean.dtype)
        for running, batch in ((self.running_mean, mean), (self.running_var, var)):
            moved = (1 - share) * running + share * batch.to(running.dtype)
            running.copy_(torch.where(accept, moved, running))

    def reset_running_stats(self) -> None:
        """Forget all batches: mean 0, variance 1."""
        if self.running_mean is not None and self.running_var is not None:
            self.running_mean.zero_()
            self.running_var.fill_(1)
            for count in (self.num_batches_tracked, self.num_batches_rejected):
                assert count is not None
                count.zero_()

    def reset_parameters(self) -> None:
        """Back to the state of a new layer."""
        super().reset_parameters()
        self.reset_running_stats()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "BatchwiseNorm":
        """Move and cast as any module; but `.half()` and the like leave the running statistics in float32 or wider."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for key, old in before.items():
            new = self._buffers[key]
            narrow = new is not None and new.is_floating_point() and new.itemsize < torch.float32.itemsize
            if old is not None and new is not None and narrow:
                self._buffers[key] = old.to(device=new.device, dtype=torch.float32)
        return self

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """Accept weights saved before there was a `num_batches_tracked`, as nn.BatchNorm2d does."""
        key = prefix + "num_batches_tracked"
        if self.num_batches_tracked is not None and (local_metadata.get("version") or 1) < 2:
            state_dict.setdefault(key, torch.zeros((), dtype=torch.long))
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args, **kwargs)


def _is_at_hand(x: Tensor) -> bool:
    """Whether the numbers of a tensor can be asked for without waiting, or being traced."""
    return (
        x.device.type == "cpu"
        and type(x) is Tensor
        and not torch.compiler.is_compiling()
        and not is_functorch_wrapped_tensor(x)
    )


def recomputing() -> bool:
    """Whether this forward pass repeats one that was counted: activation checkpointing runs it in the backward pass."""
    return not torch.compiler.is_compiling() and (is_remaking() or torch._C._current_graph_task_id() != -1)


class ScaleNorm(BatchwiseNorm):
    """A batch norm with sigma = constant * (a statistic of the deviations).

    Args:
        num_features: channels C.
        constant: "calibrated": such that the output of Gaussian input has rms 1; "paper": the paper's; or a number.
        options: those of `BatchwiseNorm`.
    """

    OPTIONS: ClassVar[Mapping[str, Option]] = SCALE_OPTIONS
    constant: float | Literal["calibrated", "paper"]

    @abc.abstractmethod
    def calibrated_constant(self, n: int) -> float:
        """The constant that gives Gaussian input, n values per channel, an output of rms 1."""

    def paper_constant(self, n: int) -> float:
        """The paper's constant for n values per channel; the calibrated one where the paper has none."""
        return self.calibrated_constant(n)

    @abc.abstractmethod
    def statistic(self, n: int, constant: float) -> Statistic:
        """The estimate of sigma for n values per channel."""

    def statistic_for(self, n: int) -> Statistic:
        """See `BatchwiseNorm`."""
        if self.constant == "paper":
            return self.statistic(n, self.paper_constant(n))
        return self.statistic(n, self.calibrated_constant(n) if isinstance(self.constant, str) else self.constant)
