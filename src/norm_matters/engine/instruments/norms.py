"""What norms see: sigma from their running statistics, and the range of their input."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from norm_matters.engine.instruments.instrument import Column, Instrument
from norm_matters.engine.instruments.motion import five_numbers
from norm_matters.norms import norms_of


class NormSigma(Instrument):
    """`sigma` (5): five numbers over the channels of the square root of each norm's `running_var`.

    Norms without running statistics have none.
    """

    def __init__(self, module: nn.Module) -> None:
        self._norms = [(name, norm) for name, norm in norms_of(module) if _variance(norm) is not None]
        self.columns = [Column("sigma", name, 5) for name, _ in self._norms]

    @torch.no_grad()
    def end_epoch(self, images: Tensor) -> list[np.ndarray]:
        """See the class."""
        variances = [variance.flatten() for _, norm in self._norms if (variance := _variance(norm)) is not None]
        if not variances:
            return []
        sigmas = torch.cat(variances).sqrt().double().cpu().numpy()
        ends = np.cumsum([len(variance) for variance in variances])
        return [five_numbers(part) for part in np.split(sigmas, ends[:-1])]


class NormInputs(Instrument):
    """The range of what each norm is given in the measured steps.

    One number each, the largest over the steps but for the last, which is their mean:
    - `input_max`: largest absolute value;
    - `input_sum_abs`, `input_sum_squares`: largest sum of absolute values and of squares over the values that share a
      statistic: what L1 and L2 have to accumulate;
    - `input_outside_float16`: share of the values that are not finite as float16, or are zero there and not here.

    Values share a statistic per channel in norms with running statistics, per image in all others.
    """

    def __init__(self, module: nn.Module) -> None:
        self._norms = norms_of(module)
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        # Per norm: one (4,) per call, on the device; and how many values each had.
        self._seen: list[list[tuple[Tensor, int]]] = [[] for _ in self._norms]
        names = ("input_max", "input_sum_abs", "input_sum_squares", "input_outside_float16")
        self.columns = [Column(instrument, name, 1) for instrument in names for name, _ in self._norms]

    def before_step(self) -> None:
        """Start to listen."""
        for (_, norm), seen in zip(self._norms, self._seen, strict=True):

            def listen(module: nn.Module, inputs: tuple[Tensor, ...], seen: list[tuple[Tensor, int]] = seen) -> None:
                # An input that is given by keyword does not come here.
                if inputs and inputs[0].numel():
                    x = inputs[0].detach()
                    seen.append((input_range(x, per_channel=_variance(module) is not None), x.numel()))

            self._hooks.append(norm.register_forward_pre_hook(listen))

    def after_step(self, *, made: bool) -> None:
        """Stop. Steps that overflowed count too: they are what one looks for."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def tensors(self) -> dict[str, Tensor]:
        """See the class above."""
        found = {}
        for number, seen in enumerate(self._seen):
            if seen:
                found[f"{number}/numbers"] = torch.stack([numbers for numbers, _ in seen])
                found[f"{number}/counts"] = torch.tensor([count for _, count in seen])
        return found

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """See the class above."""
        for number, ((_, norm), seen) in enumerate(zip(self._norms, self._seen, strict=True)):
            if f"{number}/numbers" in tensors:
                numbers, counts = tensors[f"{number}/numbers"], tensors[f"{number}/counts"]
                device = next((tensor.device for tensor in norm.state_dict().values()), numbers.device)
                seen[:] = zip(numbers.to(device), counts.tolist(), strict=True)

    def end_epoch(self, images: Tensor) -> list[np.ndarray]:
        """See the class."""
        rows = np.full((len(self._norms), 4), np.nan)
        for row, seen in zip(rows, self._seen, strict=True):
            if seen:
                values = torch.stack([numbers for numbers, _ in seen]).double().cpu().numpy()
                row[:3] = values[:, :3].max(0)
                row[3] = np.average(values[:, 3], weights=[count for _, count in seen])
            seen.clear()
        return [value[None] for value in rows.T.flatten()]


@torch.no_grad()
def input_range(x: Tensor, *, per_channel: bool) -> Tensor:
    """The four numbers of `NormInputs` for one input x (N, C, *): (4,) on its device, in float32 or wider.

    Args:
        per_channel: values share a statistic per channel; else per image.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    magnitude = x.to(wide).abs()
    others = tuple(axis for axis in range(x.ndim) if axis != int(per_channel))
    half = x.to(torch.float16)
    outside = ~half.isfinite() | ((half == 0) & (x != 0))
    numbers = [magnitude.max(), magnitude.sum(others).max(), magnitude.square().sum(others).max()]
    return torch.stack([*numbers, outside.to(wide).mean()])


def _variance(norm: nn.Module) -> Tensor | None:
    variance = getattr(norm, "running_var", None)
    return variance if isinstance(variance, Tensor) else None
