"""What `bench norms` compares on one input: our norms in each implementation, and torch's own."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from norm_matters.bench.memory import Form, kept_bytes, peak_bytes
from norm_matters.norms import create_norm
from norm_matters.norms.base import Norm
from norm_matters.norms.batchwise import BatchwiseNorm
from norm_matters.norms.kernels.dispatch import Choice, fast_backend, kernels
from norm_matters.norms.statistic import has_kernel

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
BATCH, GROUP = "nn.BatchNorm2d", "nn.GroupNorm"
REFERENCE, COMPILED = "reference", "compiled"
NATIVE, NATIVE_COMPILED = "native", "native compiled"
_MOST_GROUPS = 32


@dataclass(frozen=True, eq=False)
class Arm:
    """One implementation of one norm.

    Attributes:
        norm, implementation: see `NormRow`.
        layer: a function of input and residual.
        choice: the kernels that it is called under.
    """

    norm: str
    implementation: str
    layer: Any
    choice: Choice = "auto"

    @property
    def name(self) -> str:
        """Unlike that of any other arm of the case."""
        return f"{self.norm}, {self.implementation}"


class Layer(nn.Module):
    """A norm and what follows it, in one call.

    Args:
        norm: one of ours, which does all in one operation where it can, or one of torch's.
        relu: whether a ReLU comes last, in place.
    """

    def __init__(self, norm: nn.Module, *, relu: bool) -> None:
        super().__init__()
        self.norm = norm
        self.relu = relu

    def forward(self, x: Tensor, residual: Tensor | None) -> Tensor:
        """Normalise x (N, C, *), add the residual, apply the ReLU."""
        if isinstance(self.norm, Norm):
            return self.norm(x, residual, relu=self.relu)
        y = self.norm(x)
        if residual is not None:
            y = y + residual
        return torch.relu_(y) if self.relu else y


@dataclass(frozen=True)
class Batch:
    """What the arms work on: the input, its residual (or None), and the gradient of the output."""

    x: Tensor
    residual: Tensor | None
    grad: Tensor

    @staticmethod
    def draw(shape: Sequence[int], form: Form, *, dtype: str, layout: str, device: str) -> "Batch":
        """Standard normal values, always the same."""
        draw = torch.Generator().manual_seed(0)

        def normal() -> Tensor:
            values = torch.randn(*shape, generator=draw).to(device, DTYPES[dtype])
            return values.contiguous(memory_format=LAYOUTS[layout])

        residual = normal().requires_grad_() if form == "add_relu" else None
        return Batch(normal().requires_grad_(), residual, normal())

    def run(self, arm: Arm) -> None:
        """Forward and backward; gradients are new, as in training, not added to old ones."""
        self.clear(arm)
        with kernels(arm.choice):
            arm.layer(self.x, self.residual).backward(self.grad)

    def clear(self, arm: Arm) -> None:
        """Forget all gradients."""
        for tensor in (self.x, self.residual, *arm.layer.parameters()):
            if tensor is not None:
                tensor.grad = None

    def memory(self, arm: Arm) -> tuple[int, int]:
        """Bytes kept, and bytes at the peak; see `NormRow`."""
        with kernels(arm.choice):
            kept = kept_bytes(lambda: arm.layer(self.x, self.residual), arm.layer.parameters())
        self.clear(arm)
        return kept, peak_bytes(lambda: self.run(arm), self.x.device.type)


def norm_arms(norms: Sequence[str], form: Form, x: Tensor, *, compiled: bool) -> list[Arm]:
    """Of each norm our kernels, where there are any for this input, and plain torch; then torch's own norms.

    Args:
        norms: specs.
        form: what follows the norm.
        x: (N, C, H, W).
        compiled: the compiled forms too.
    """
    channels = x.shape[1]

    def layer(norm: nn.Module) -> Layer:
        return Layer(norm, relu=form != "plain").to(x.device)

    def compile(norm: nn.Module) -> Any:
        return torch.compile(layer(norm), fullgraph=True, dynamic=False)

    arms = []
    for spec in norms:
        # Each arm has a norm of its own, with running statistics of its own.
        kernel = kernel_name(create_norm(spec, channels), x)
        if kernel is not None:
            arms.append(Arm(spec, kernel, layer(create_norm(spec, channels))))
        arms.append(Arm(spec, REFERENCE, layer(create_norm(spec, channels)), "reference"))
        if compiled:
            arms.append(Arm(spec, COMPILED, compile(create_norm(spec, channels)), "reference"))
    arms.append(Arm(BATCH, NATIVE, layer(nn.BatchNorm2d(channels))))
    if compiled:
        arms.append(Arm(BATCH, NATIVE_COMPILED, compile(nn.BatchNorm2d(channels))))
    groups = max(count for count in range(1, min(_MOST_GROUPS, channels) + 1) if channels % count == 0)
    # Unlike batch norm, it wants its parameters in the input's dtype.
    return [*arms, Arm(GROUP, NATIVE, layer(nn.GroupNorm(groups, channels, dtype=x.dtype)))]


def kernel_name(norm: nn.Module, x: Tensor) -> str | None:
    """The backend whose kernels a norm uses for this input; None where it computes in plain torch."""
    if not isinstance(norm, BatchwiseNorm) or norm.composite:
        return None
    statistic = norm.statistic_for(x.numel() // x.shape[1])
    if statistic.estimator is None or not has_kernel(x, statistic, norm.compute_dtype(x), norm.reducer()):
        return None
    backend: Any = fast_backend(x, statistic.estimator)
    return backend.__name__.rpartition(".")[2]
