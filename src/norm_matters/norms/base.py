"""The contract of a norm, and what all batch norms share: running statistics, evaluation, dtypes, checkpoints.

A batch norm computes `y = (x - mean) / sqrt(sigma^2 + eps) * weight + bias` per channel; which statistic estimates
sigma is the only thing the norms differ in. `running_var` holds the estimate of sigma squared, so that in evaluation
every batch norm here is a batch norm: its checkpoints, its absorption and its export are those of `nn.BatchNorm2d`.
"""

import abc
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from norm_matters.norms.spec import Option, canonical_text, complete_options

AFFINE_OPTIONS: Mapping[str, Option] = {
    "eps": Option("float", 1e-5, minimum=0),
    "affine": Option("bool", True),
    "bias": Option("bool", True),
    "stats_dtype": Option("word", "float32", words=("float32", "input")),
}
BATCH_OPTIONS: Mapping[str, Option] = {
    "momentum": Option("float", 0.1, minimum=0, maximum=1, words=("none",)),
    "track_running_stats": Option("bool", True),
    **AFFINE_OPTIONS,
}

# Submodules that a converted layer had fused to it (timm's BatchNormAct2d) and that the norm takes over by name.
FUSED = ("drop", "act")


def per_channel(values: Tensor, x: Tensor) -> Tensor:
    """View (C,) values so that they broadcast over x of shape (N, C, *)."""
    return values.view(1, -1, *[1] * (x.dim() - 2))


def all_but_channels(x: Tensor) -> tuple[int, ...]:
    """The dimensions of x (N, C, *) a batch norm reduces over."""
    return (0, *range(2, x.dim()))


class Norm(nn.Module, abc.ABC):
    """What every norm of this package is.

    A subclass names itself (`name`), declares in `OPTIONS` what it takes, finds each option in an attribute of that
    name, and computes in `normalise`.

    Args:
        num_features: channels C of the input (N, C, *).
        device, dtype: of the parameters, where there are any.
        options: values for some of `OPTIONS`.

    Raises:
        UserError: an option is unknown or its value invalid.
        ValueError: `num_features` is no integer from 1.
    """

    name: ClassVar[str]
    OPTIONS: ClassVar[Mapping[str, Option]] = {}

    def __init__(
        self,
        num_features: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if isinstance(num_features, bool) or not isinstance(num_features, int) or num_features < 1:
            raise ValueError(f"num_features={num_features!r} must be an integer from 1")
        self.num_features = num_features
        # Set by `name_norms` once the model is built, so that messages can say which layer they mean.
        self.layer_name = ""
        for key, value in complete_options(self.name, options, self.OPTIONS).items():
            # The attribute `bias` is the parameter, as in torch.
            setattr(self, "learn_bias" if key == "bias" else key, value)

    @abc.abstractmethod
    def normalise(self, x: Tensor) -> Tensor:
        """Return the normalised x, of the shape, dtype and memory layout of x (N, C, *)."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x of shape (N, C, *); then drop and activation, where a conversion brought them along.

        Raises:
            ValueError: x has not `num_features` channels, or statistics are needed from fewer than two values.
        """
        if x.dim() < 2 or x.shape[1] != self.num_features:
            raise ValueError(f"{self.label()} expects (N, {self.num_features}, ...), got {tuple(x.shape)}")
        y = self.normalise(x)
        for key in FUSED:
            fused = self._modules.get(key)
            y = y if fused is None else fused(y)
        return y

    def label(self) -> str:
        """The layer's dotted name in its model, or its class where no one named it; for messages."""
        return f"layer '{self.layer_name}' ({self.spec})" if self.layer_name else type(self).__name__

    def settings(self) -> dict[str, Any]:
        """The present value of every option."""
        return {key: getattr(self, "learn_bias" if key == "bias" else key) for key in self.OPTIONS}

    @property
    def spec(self) -> str:
        """Canonical text of the norm and its options."""
        return canonical_text(self.name, self.settings(), self.OPTIONS)

    def extra_repr(self) -> str:
        """`'topk:k=10', 64`."""
        return f"{self.spec!r}, {self.num_features}"


class AffineNorm(Norm):
    """A norm with a weight (ones at first) and a bias (zeros at first) per channel.

    Args:
        num_features: channels C.
        device, dtype: of the parameters.
        eps: added to the variance.
        affine: learn weight and bias.
        bias: with `affine`, learn a bias too.
        stats_dtype: "float32": statistics in float32, or in the input's dtype where that is wider; "input": deviations
            and what is made of them element by element are kept in the input's dtype (sums are accumulated, and
            numbers per channel kept, in float32 all the same).
    """

    OPTIONS = AFFINE_OPTIONS
    eps: float
    affine: bool
    learn_bias: bool
    stats_dtype: Literal["float32", "input"]

    def __init__(
        self,
        num_features: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__(num_features, device=device, dtype=dtype, **options)
        weight, bias = (learn and self.affine for learn in (self.learns_weight(), self.learn_bias))
        new = partial(torch.empty, num_features, device=device, dtype=dtype)
        self.weight = nn.Parameter(new()) if weight else None
        self.bias = nn.Parameter(new()) if bias else None
        # Not the subclass's: what else that resets does not exist yet.
        AffineNorm.reset_parameters(self)

    def learns_weight(self) -> bool:
        """Whether `affine` includes a weight."""
        return True

    def reset_parameters(self) -> None:
        """Weight to ones, bias to zeros."""
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def compute_dtype(self, x: Tensor) -> torch.dtype:
        """The dtype that elementwise statistics of x are kept in."""
        return x.dtype if self.stats_dtype == "input" else torch.promote_types(x.dtype, torch.float32)

    def affine_in(self, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
        """Weight and bias in `dtype`; gradients reach the parameters in theirs."""
        return (
            None if self.weight is None else self.weight.to(dtype),
            None if self.bias is None else self.bias.to(dtype),
        )


class BatchwiseNorm(AffineNorm):
    """A norm whose statistics are taken per channel over the batch, with running estimates for evaluation.

    Attributes of the class:
        estimates_sigma: whether `running_var` holds an estimate; where not, it stays 1.

    A batch whose statistics are not finite shows in the output, and changes neither the running statistics nor
    `num_batches_tracked`. The decision is taken on the device: nothing waits for it.

    Args:
        num_features: channels C.
        device, dtype: of the parameters; the running statistics are float32 or wider.
        momentum: weight of the new batch in the running statistics, as in torch; None averages over all batches.
        track_running_stats: without it, evaluation uses the batch's statistics too.
        options: `eps`, `affine`, `bias`, `stats_dtype` of `AffineNorm`.
    """

    OPTIONS = BATCH_OPTIONS
    estimates_sigma: ClassVar[bool] = True
    momentum: float | None
    track_running_stats: bool
    running_mean: Tensor | None
    running_var: Tensor | None
    num_batches_tracked: Tensor | None
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
        self.reset_running_stats()

    @abc.abstractmethod
    def normalise_batch(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Normalise x (N, C, *) by its own statistics.

        Returns:
            The output (dtype and layout of x), the mean (C,) and the estimate of sigma squared (C,), both detached.
        """

    def normalise(self, x: Tensor) -> Tensor:
        """By the batch in training (and where nothing is tracked), else by the running estimates."""
        if not (self.training or self.running_mean is None):
            return self._normalise_by_running_stats(x)
        if x.numel() // x.shape[1] < 2:
            raise ValueError(f"{self.label()} needs more than one value per channel in training, got {tuple(x.shape)}")
        y, mean, var = self.normalise_batch(x)
        if self.training and self.running_mean is not None:
            self._track(mean, var)
        return y

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
        accept = torch.isfinite(mean).all() & torch.isfinite(var).all()
        self.num_batches_tracked.add_(accept)
        share = self.momentum
        if share is None:
            share = 1 / self.num_batches_tracked.clamp(min=1).to(self.running_mean.dtype)
        for running, batch in ((self.running_mean, mean), (self.running_var, var)):
            moved = (1 - share) * running + share * batch.to(running.dtype)
            running.copy_(torch.where(accept, moved, running))

    def reset_running_stats(self) -> None:
        """Forget all batches: mean 0, variance 1."""
        if self.running_mean is not None and self.running_var is not None and self.num_batches_tracked is not None:
            self.running_mean.zero_()
            self.running_var.fill_(1)
            self.num_batches_tracked.zero_()

    def reset_parameters(self) -> None:
        """Back to the state of a new layer."""
        super().reset_parameters()
        self.reset_running_stats()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "BatchwiseNorm":
        """Move and cast as any module; but `.half()` and the like leave the running statistics in float32 or wider."""
        before = {"running_mean": self.running_mean, "running_var": self.running_var}
        super()._apply(fn, recurse)
        for key, old in before.items():
            new = self._buffers[key]
            if old is not None and new is not None and torch.promote_types(new.dtype, torch.float32) != new.dtype:
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
