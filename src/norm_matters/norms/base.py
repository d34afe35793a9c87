"""The contract of a norm, and what those with a weight and a bias per channel share.

A norm is *where* statistics are taken (over the batch: batchwise.py; within each image: imagewise.py) times *which*
statistic estimates sigma (statistic.py), and says what it can do (`capabilities`), so that tools act or refuse by name.
"""

import abc
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from norm_matters.core.errors import UserError
from norm_matters.norms.memory import Kept, fetch, is_offered, is_saving, keep, offer
from norm_matters.norms.reduce import Accumulator, Reducer, number_format
from norm_matters.norms.spec import Option, canonical_text, complete_options

AFFINE_OPTIONS: Mapping[str, Option] = {
    "eps": Option("float", 1e-5, minimum=0),
    "affine": Option("bool", True),
    "bias": Option("bool", True),
    "gamma": Option("float", 1.0, minimum=0, above=True),
    "frozen": Option("word", None, words=("none", "affine")),
    "stats_dtype": Option("word", "float32", words=("float32", "input")),
    "stats_format": Option("text", None, words=("none",), canonical=number_format),
    "accumulator": Option("word", "fp32", words=("fp32", "pairwise", "sequential")),
    "accumulator_format": Option("text", None, words=("none",), canonical=number_format),
    "rounding": Option("word", "nearest", words=("nearest", "stochastic")),
}

# Submodules that a converted layer had fused to it (timm's BatchNormAct2d) and that the norm takes over by name.
FUSED = ("drop", "act")

Capability = Literal["affine", "running_stats", "sync"]
"""What a tool may ask of a norm: parameters per channel; running statistics, by which it is a fixed affine map per
channel in evaluation; statistics over the batch that ranks can share."""


def per_channel(values: Tensor, x: Tensor) -> Tensor:
    """View (C,) values so that they broadcast over x of shape (N, C, *)."""
    return values.view(1, -1, *[1] * (x.dim() - 2))


def activate(y: Tensor, residual: Tensor | None, *, relu: bool) -> Tensor:
    """What follows a norm: add a residual, then a ReLU; y may be overwritten by the latter."""
    y = y if residual is None else y + residual
    if not relu:
        return y
    return _Rectify.apply(y) if is_saving() else torch.relu_(y)  # type: ignore[return-value]


class _Rectify(Function):
    """The ReLU, where the output that it takes its mask from may be left out (memory.py)."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        out = y.relu()
        # An alias: the output itself would keep its own maker alive. `offer_output` puts less in its place.
        ctx.held = keep(out.detach())
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensor:  # type: ignore[override]
        return torch.ops.aten.threshold_backward(grads[0], fetch(ctx.held), 0)


def offer_output(y: Tensor, make: Callable[[], Tensor], *needs: Tensor | None) -> None:
    """Say how to make the output of a norm again; called where `is_saving`.

    Args:
        y: what `activate` returned.
        make: gives it again, to the bit.
        needs: see `offer`.
    """
    offer(y, make, *needs)
    maker: Any = y.grad_fn
    if isinstance(getattr(maker, "held", None), Kept):
        maker.held = keep(y.detach())


def is_plain_relu(module: nn.Module | None) -> bool:
    """Whether a module is torch's ReLU and nobody listens to its calls."""
    return type(module) is nn.ReLU and not has_listeners(module)


def _does_nothing(module: nn.Module) -> bool:
    return type(module) is nn.Identity and not has_listeners(module)


def has_listeners(module: nn.Module) -> bool:
    """Whether a hook would see the module's output, or its gradient."""
    return bool(module._forward_hooks or module._backward_hooks or module._backward_pre_hooks)


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
    # Where the channels of the input are; -1 for the tokens of a transformer, (N, *, C).
    channel_dim: int = 1

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

    def normalise_and_activate(self, x: Tensor, residual: Tensor | None, *, relu: bool) -> Tensor:
        """Normalise x, add the residual (as x), apply a ReLU: in one pass, where a subclass can."""
        return activate(self.normalise(x), residual, relu=relu)

    def forward(self, x: Tensor, residual: Tensor | None = None, *, relu: bool = False) -> Tensor:
        """Normalise x of shape (N, C, *); then drop and activation, where a conversion brought them along.

        Args:
            x: the input.
            residual: added to the normalised x; as x.
            relu: apply a ReLU last.

        Raises:
            ValueError: x has not `num_features` channels, or statistics are needed from fewer than two values.
        """
        if x.dim() < 2 or x.shape[self.channel_dim] != self.num_features:
            expected = f"(N, {self.num_features}, ...)" if self.channel_dim == 1 else f"(N, ..., {self.num_features})"
            raise ValueError(f"{self.label()} expects {expected}, got {tuple(x.shape)}")
        y = self._normalise_and_finish(x, residual, relu=relu)
        if is_saving() and not is_offered(y) and self._modules.get("drop") is None:
            self._offer_again(x, residual, y, relu=relu)
        return y

    def _offer_again(self, x: Tensor, residual: Tensor | None, y: Tensor, *, relu: bool) -> None:
        """Let the output be made again by another forward pass, where nobody knows a shorter way."""
        x, held, training = x.detach(), keep(residual), self.training

        def make() -> Tensor:
            now, self.training = self.training, training
            try:
                return self._normalise_and_finish(x, fetch(held), relu=relu)
            finally:
                self.training = now

        offer_output(y, make, x, *(None if own is None else own.detach() for own in self._parameters.values()))

    def _normalise_and_finish(self, x: Tensor, residual: Tensor | None, *, relu: bool) -> Tensor:
        """Normalise, then drop and activation."""
        fused = [layer for layer in map(self._modules.get, FUSED) if layer is not None and not _does_nothing(layer)]
        if not fused:
            return self.normalise_and_activate(x, residual, relu=relu)
        if residual is None and len(fused) == 1 and is_plain_relu(fused[0]):
            return self.normalise_and_activate(x, None, relu=True)
        y = self.normalise(x)
        for layer in fused:
            y = layer(y)
        return activate(y, residual, relu=relu)

    def capabilities(self) -> frozenset[Capability]:
        """What a tool can do with this norm as it is set up; it refuses the rest by name."""
        return frozenset()

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
    """A norm with a weight (`gamma` at first) and a bias (zeros at first) per channel.

    Args:
        num_features: channels C.
        device, dtype: of the parameters.
        eps: added to the variance.
        affine: learn weight and bias.
        bias: with `affine`, learn a bias too.
        gamma: what every weight starts at; a norm that is put in the place of another takes over that one's weight.
        frozen: "affine": weight and bias are not trained.
        stats_dtype: "float32": statistics in float32, or in the input's dtype where that is wider; "input": deviations
            and what is made of them element by element are kept in the input's dtype (sums are accumulated, and
            numbers per channel kept, in float32 all the same).
        stats_format: simulate reductions over numbers of that format (`fp16`, `bf16`, `e4m3`, any `eXmY`).
        accumulator: how terms are summed: "fp32" by torch in float32; "pairwise" or "sequential", each partial sum
            rounded to a format. What is rounded, and what is not: arithmetic.py.
        accumulator_format: that of partial sums; `stats_format`, or float32 without one, unless given.
        rounding: to the formats: "nearest" (ties to even) or "stochastic".
    """

    OPTIONS = AFFINE_OPTIONS
    eps: float
    affine: bool
    learn_bias: bool
    gamma: float
    frozen: Literal["affine"] | None
    stats_dtype: Literal["float32", "input"]
    stats_format: str | None
    accumulator: Accumulator
    accumulator_format: str | None
    rounding: Literal["nearest", "stochastic"]

    def __init__(
        self,
        num_features: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__(num_features, device=device, dtype=dtype, **options)
        AffineNorm.reducer(self)  # raises UserError where its options contradict each other
        weight, bias = (learn and self.affine for learn in (self.learns_weight(), self.learn_bias))
        new = partial(torch.empty, num_features, device=device, dtype=dtype)
        trained = self.frozen not in ("affine", "all")
        self.weight = nn.Parameter(new(), requires_grad=trained) if weight else None
        self.bias = nn.Parameter(new(), requires_grad=trained) if bias else None
        if self.weight is None and self.gamma != 1:
            raise UserError(f"norm '{self.spec}': gamma={self.gamma:g} is the start of a weight, and it has none")
        # Not the subclass's: what else that resets does not exist yet.
        AffineNorm.reset_parameters(self)

    def learns_weight(self) -> bool:
        """Whether `affine` includes a weight."""
        return True

    def reset_parameters(self) -> None:
        """Weight to gamma, bias to zeros."""
        if self.weight is not None:
            nn.init.constant_(self.weight, self.gamma)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def capabilities(self) -> frozenset[Capability]:
        """See the base class."""
        return frozenset({"affine"}) if self.weight is not None or self.bias is not None else frozenset()

    def compute_dtype(self, x: Tensor) -> torch.dtype:
        """The dtype that elementwise statistics of x are kept in."""
        return x.dtype if self.stats_dtype == "input" else torch.promote_types(x.dtype, torch.float32)

    def reducer(self) -> Reducer:
        """How the numbers of a channel are brought together."""
        return Reducer.of(self.stats_format, self.accumulator, self.accumulator_format, self.rounding)

    def affine_in(self, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
        """Weight and bias in `dtype`; gradients reach the parameters in theirs."""
        return (
            None if self.weight is None else self.weight.to(dtype),
            None if self.bias is None else self.bias.to(dtype),
        )
