"""Number formats of a run: what the weights are stored in, what the operations use, how the loss is scaled."""

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from norm_matters.core.errors import NumericalError
from norm_matters.norms import is_norm


@dataclass(frozen=True)
class Precision:
    """One row of the table of formats.

    Attributes:
        weights: dtype of the network's weights; None leaves them as built. The optimizer then works on float32
            copies of them ("master weights"). Norm layers keep their parameters as built.
        autocast: dtype of the operations that are safe in it; None for no autocast.
        scaled: whether the loss is multiplied by a dynamic scale, so that small gradients do not vanish.
    """

    weights: torch.dtype | None = None
    autocast: torch.dtype | None = None
    scaled: bool = False

    def convert(self, module: nn.Module) -> None:
        """Bring the network's weights to `weights`, in place; norm layers are left alone."""
        if self.weights is None:
            return
        for layer in module.modules():
            if is_norm(layer):
                continue
            for parameter in layer.parameters(recurse=False):
                parameter.data = parameter.data.to(self.weights)

    def context(self, device: torch.device) -> contextlib.AbstractContextManager:
        """The context the forward pass runs in."""
        if self.autocast is None:
            return contextlib.nullcontext()
        return torch.autocast(device.type, dtype=self.autocast)


PRECISIONS = {
    "fp32": Precision(),
    "bf16": Precision(weights=torch.bfloat16),
    "amp-bf16": Precision(autocast=torch.bfloat16),
    "amp-fp16": Precision(autocast=torch.float16, scaled=True),
    "fp16": Precision(weights=torch.float16, scaled=True),
}


def input_dtype(module: nn.Module) -> torch.dtype:
    """What a network's images are cast to: that of its first weight of two or more dimensions (norms have none)."""
    return next((parameter.dtype for parameter in module.parameters() if parameter.ndim > 1), torch.float32)


class LossScale:
    """A loss scale that halves after an overflow and doubles after a long run without one.

    The state is two numbers, so that a checkpoint can hold it (`state`, `load`).
    """

    GROWTH_INTERVAL = 2000
    SMALLEST = 2.0**-14

    def __init__(self, scale: float = 2.0**16) -> None:
        self.scale = scale
        self.good_steps = 0

    def unscale(self, gradients: Iterable[Tensor]) -> bool:
        """Divide the gradients by the scale, in place, and tell whether all of them are finite."""
        gradients = list(gradients)
        torch._foreach_div_(gradients, self.scale)  # pyright: ignore[reportPrivateImportUsage]
        finite = [torch.isfinite(gradient).all() for gradient in gradients]
        return bool(torch.stack(finite).all()) if finite else True

    def update(self, finite: bool) -> None:
        """Adapt the scale to the outcome of a step.

        Raises:
            NumericalError: when gradients overflow at every scale, so that no step can ever be made.
        """
        if not finite:
            self.scale /= 2
            self.good_steps = 0
            if self.scale < self.SMALLEST:
                raise NumericalError(f"gradients are not finite at any loss scale down to {self.SMALLEST:g}")
            return
        self.good_steps += 1
        if self.good_steps == self.GROWTH_INTERVAL:
            self.scale *= 2
            self.good_steps = 0

    def state(self) -> dict[str, float]:
        """What a checkpoint keeps."""
        return {"scale": self.scale, "good_steps": self.good_steps}

    def load(self, state: dict[str, float]) -> None:
        """Restore what `state` gave."""
        self.scale, self.good_steps = float(state["scale"]), int(state["good_steps"])
