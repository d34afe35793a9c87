"""Number formats of a run: what the weights are stored in, what the operations use, how the loss is scaled."""

import contextlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from norm_matters.core.errors import NumericalError
from norm_matters.engine.nonfinite import finite_flag
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

    Both numbers of its state live on the device, so that a step need not wait for it.

    Args:
        scale: the first.
        device: of the gradients.
    """

    GROWTH_INTERVAL = 2000
    SMALLEST = 2.0**-14

    def __init__(self, scale: float = 2.0**16, device: torch.device | str = "cpu") -> None:
        self.factor = torch.tensor(scale, dtype=torch.float32, device=device)
        self._good_steps = torch.zeros((), dtype=torch.int64, device=device)

    @property
    def scale(self) -> float:
        """What the loss is multiplied by; reading it waits for the device."""
        return self.factor.item()

    @scale.setter
    def scale(self, value: float) -> None:
        self.factor.fill_(value)

    @property
    def good_steps(self) -> int:
        """Steps since the last overflow or growth; reading it waits for the device."""
        return int(self._good_steps)

    def unscale(self, gradients: list[Tensor]) -> Tensor:
        """Divide the gradients by the scale, in place; a flag (no dimension) that tells whether all are finite."""
        torch._foreach_div_(gradients, self.factor)  # pyright: ignore[reportPrivateImportUsage]
        return finite_flag(gradients, self.factor.device)

    def update(self, finite: Tensor, counted: Tensor | None = None) -> None:
        """Adapt the scale to the outcome of a step.

        Args:
            finite: flag, whether the gradients were.
            counted: flag; where it is false the step says nothing of the scale, which stays.
        """
        good = self._good_steps + 1
        grown = good >= self.GROWTH_INTERVAL
        factor = torch.where(finite, torch.where(grown, self.factor * 2, self.factor), self.factor / 2)
        good = torch.where(finite & ~grown, good, 0)
        if counted is not None:
            factor, good = torch.where(counted, factor, self.factor), torch.where(counted, good, self._good_steps)
        self.factor.copy_(factor)
        self._good_steps.copy_(good)

    def check(self) -> None:
        """Raise NumericalError when gradients overflow at every scale, so that no step can ever be made."""
        if self.scale < self.SMALLEST:
            raise NumericalError(f"gradients are not finite at any loss scale down to {self.SMALLEST:g}")

    def state(self) -> dict[str, float]:
        """What a checkpoint keeps."""
        return {"scale": self.scale, "good_steps": self.good_steps}

    def load(self, state: dict[str, float]) -> None:
        """Restore what `state` gave."""
        self.scale = float(state["scale"])
        self._good_steps.fill_(int(state["good_steps"]))
