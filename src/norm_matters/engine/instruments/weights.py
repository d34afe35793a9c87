"""Weights in motion: norms per channel, turning angles beside their equilibrium, effective learning rate."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from norm_matters.engine.instruments.instrument import Column, Instrument
from norm_matters.engine.instruments.motion import (
    SgdSettings,
    effective_lr,
    equilibrium_angle,
    five_numbers,
    root_mean_square,
    turning_angle,
)
from norm_matters.engine.instruments.tracked import tracked_weights
from norm_matters.engine.state import TrainingState


def _moved_squares(ww: np.ndarray, moved: Tensor | None, factors: np.ndarray | None, *, parametrized: bool) -> float:
    """The squared length of what the optimizer moves, as the effective learning rate of the layer takes it.

    Args:
        ww: (channels,) squared norms of the effective weight.
        moved: of what is behind a parametrization.
        factors: (channels,) of the learning rate: a channel acts as if its square were shorter by that.
    """
    if parametrized:
        return float("nan") if moved is None or factors is not None else moved.item()
    return float(np.sum(ww if factors is None else ww / factors))


class WeightMotion(Instrument):
    """Follows the effective weights of all layers through measured steps.

    For each layer, angles in radians per step and as root mean squares over the measured steps:
    - `weight_norm` (channels): norm of each output channel at the end of the epoch;
    - `effective_lr` (1): of the weight as one vector, in the last measured step, corrections of the LR included;
    - `angle` (5): five numbers over the channels of the angle that each turns by;
    - `layer_angle` (1): the same for the weight as one vector;
    - `equilibrium` (1): the angle that SGD with decay tends to.
    """

    def __init__(self, state: TrainingState) -> None:
        self._state = state
        self._weights = tracked_weights(state.module)
        with torch.no_grad():
            channels = [len(weight.channels(state.masters)) for weight in self._weights]
        self._starts = np.cumsum([0, *channels])
        self._before: list[Tensor] = []
        self._moved: list[Tensor | None] = []
        self._steps: list[Tensor] = []
        self._last: list[Tensor] = []
        self._equilibria: list[list[float]] = []
        # Sums of float32 values in float64; MPS has none.
        self._wide = torch.float32 if state.device.type == "mps" else torch.float64
        layers = [weight.layer for weight in self._weights]
        self.columns = [Column("weight_norm", layer, size) for layer, size in zip(layers, channels, strict=True)]
        for name, size in (("effective_lr", 1), ("angle", 5), ("layer_angle", 1), ("equilibrium", 1)):
            self.columns += [Column(name, layer, size) for layer in layers]

    @torch.no_grad()
    def before_step(self) -> None:
        """Copy the weights."""
        self._before = [weight.channels(self._state.masters).clone() for weight in self._weights]
        # What the optimizer moves, where that is not the weight itself: only its length is needed.
        self._moved = [
            self._squares(self._tensor(weight.parameter)) if weight.parametrized else None for weight in self._weights
        ]

    @torch.no_grad()
    def after_step(self, *, made: bool) -> None:
        """Reduce before and after to four sums per channel; nothing waits for the device."""
        sums = [
            self._sums(before, weight.channels(self._state.masters))
            for before, weight in zip(self._before, self._weights, strict=True)
        ]
        self._last = [torch.cat(sums, 1)] if sums else []
        if made and sums:
            self._steps += self._last
            self._equilibria.append([equilibrium_angle(settings) for settings in self._settings()])
        self._before = []

    def tensors(self) -> dict[str, Tensor]:
        """See the class above; the last step of an epoch is always measured, so that only sums over steps count."""
        if not self._steps:
            return {}
        equilibria = torch.tensor(self._equilibria, dtype=torch.float64)
        return {"steps": torch.stack(self._steps), "equilibria": equilibria}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """See the class above."""
        if "steps" in tensors:
            self._steps = list(tensors["steps"].to(self._state.device))
            self._equilibria = tensors["equilibria"].tolist()

    def _sums(self, before: Tensor, after: Tensor) -> Tensor:
        """(w, w), (w, d), (d, d) and (w', w') of each channel: (4, channels)."""
        w, new = before.to(self._wide), after.to(self._wide)
        d = new - w
        return torch.stack([torch.linalg.vecdot(a, b) for a, b in ((w, w), (w, d), (d, d), (new, new))])

    def _squares(self, tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.detach().to(self._wide).square().sum()

    def _tensor(self, name: str | None) -> Tensor | None:
        """What the optimizer moves under that name: the master where there is one."""
        if name is None:
            return None
        master = self._state.masters.get(name)
        return self._state.module.get_parameter(name) if master is None else master

    def _settings(self) -> list[SgdSettings | None]:
        """Of each weight, in the step just made; None where torch's SGD does not move it."""
        optimizer = self._state.optimizer.optimizer
        if type(optimizer) is not torch.optim.SGD:
            return [None] * len(self._weights)
        groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
        found = [groups.get(id(self._tensor(weight.parameter))) for weight in self._weights]
        names = ("lr", "momentum", "dampening", "nesterov", "weight_decay")
        return [None if group is None else SgdSettings(*(group[name] for name in names)) for group in found]

    def end_epoch(self, images: Tensor) -> list[np.ndarray]:
        """See the class."""
        if not self._last:
            return [np.full(column.size, np.nan) for column in self.columns]
        ww, _, _, new = self._last[0].double().cpu().numpy()
        channels = [slice(*pair) for pair in zip(self._starts[:-1], self._starts[1:], strict=True)]
        factors = {layer: factor.double().cpu().numpy() for layer, factor in self._state.optimizer.lr_factors().items()}
        lengths = [
            _moved_squares(ww[part], moved, factors.get(weight.layer), parametrized=weight.parametrized)
            for weight, moved, part in zip(self._weights, self._moved, channels, strict=True)
        ]
        steps = [step.double().cpu().numpy()[:3] for step in self._steps]
        angles = root_mean_square(np.array([turning_angle(*step) for step in steps]).reshape(-1, len(ww)))
        wholes = [turning_angle(*np.add.reduceat(step, self._starts[:-1], axis=1)) for step in steps]
        layer_angles = root_mean_square(np.array(wholes).reshape(-1, len(channels)))
        equilibria = root_mean_square(np.array(self._equilibria).reshape(-1, len(channels)))
        effective = [effective_lr(settings, length) for settings, length in zip(self._settings(), lengths, strict=True)]
        self._steps, self._last, self._equilibria = [], [], []
        return [
            *(np.sqrt(new[part]) for part in channels),
            *np.array(effective)[:, None],
            *(five_numbers(angles[part]) for part in channels),
            *layer_angles[:, None],
            *equilibria[:, None],
        ]
