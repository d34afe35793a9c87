"""The norm of every output channel of a network's convolutions and linear layers: recorded, and found again.

What is measured is the tensor that the optimizer moves: the float32 master of a weight in low precision, and the vector
v behind a weight norm.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from norm_matters.core.errors import UserError
from norm_matters.weights.base import wide_dtype
from norm_matters.weights.layers import WEIGHTED, ChannelLayout, channel_layout


class ChannelWeight(NamedTuple):
    """The weight of a layer, with output channels.

    Attributes:
        layer: dotted path of the layer.
        parameter: full name of the tensor.
        tensor: what the optimizer moves.
        layout: where the output channels are in it.
    """

    layer: str
    parameter: str
    tensor: Tensor
    layout: ChannelLayout

    @property
    def channels(self) -> int:
        """How many there are."""
        return self.layout.channels(self.tensor)

    def norms(self) -> Tensor:
        """The 2-norm of each output channel: (channels,), float32 or wider."""
        split = self.layout.split(self.tensor.detach())
        dtype = wide_dtype(split.dtype)
        return torch.linalg.vector_norm(split, 2, self.layout.reduced(split), dtype=dtype).flatten()


def channel_weights(model: nn.Module, stand_ins: Mapping[str, Tensor] | None = None) -> list[ChannelWeight]:
    """The weights of all convolutions and linear layers, each tensor once, in the model's order.

    A weight that is no parameter, and has none of its shape behind it, is left out.

    Args:
        stand_ins: by parameter name, what an optimizer changes in a parameter's place (float32 masters).
    """
    found: list[ChannelWeight] = []
    seen: set[int] = set()
    for path, layer in model.named_modules():
        name = _moved(layer) if isinstance(layer, WEIGHTED) else None
        if name is None:
            continue
        full = f"{path}.{name}" if path else name
        tensor = (stand_ins or {}).get(full, model.get_parameter(full))
        if id(tensor) not in seen:
            seen.add(id(tensor))
            found.append(ChannelWeight(path, full, tensor, channel_layout(layer)))
    return found


def _moved(layer: nn.Module) -> str | None:
    """Name of the parameter that is trained for a layer's weight."""
    if not parametrize.is_parametrized(layer, "weight"):
        return "weight" if "weight" in layer._parameters else None
    original = "parametrizations.weight.original"
    names = {name for name, _ in layer.named_parameters()}
    return original if original in names else None


class EpochNorms(NamedTuple):
    """The norms of one epoch of a recorded run.

    Attributes:
        layers: layer -> (rows, channels): the norms before each step of the epoch, where steps were recorded, and then
            those at its end.
        digest: of the file.
    """

    layers: Mapping[str, np.ndarray]
    digest: str


@dataclass(frozen=True)
class RecordedNorms:
    """The norms of a recorded run.

    Attributes:
        source: where they come from, for messages.
        epochs: by their numbers, from 1.
    """

    source: str
    epochs: Mapping[int, EpochNorms] = field(default_factory=dict)

    def check(self, weights: Sequence[ChannelWeight], epoch: int, *, steps: int | None = None) -> None:
        """See that all norms that an epoch needs are there.

        Args:
            weights: whose norms are needed.
            epoch: from 1.
            steps: the run's steps per epoch, where the norms before each step are needed.

        Raises:
            UserError: too few epochs, another network, no steps or another number of them.
        """
        if epoch not in self.epochs:
            last = max(self.epochs, default=0)
            raise UserError(
                f"regime.norms: '{self.source}' has the norms of {last} epochs; this run needs those of epoch {epoch}"
            )
        for weight in weights:
            self._check_layer(weight, epoch, steps)

    def _check_layer(self, weight: ChannelWeight, epoch: int, steps: int | None) -> None:
        found = self.epochs[epoch].layers.get(weight.layer)
        if found is None:
            raise UserError(f"regime.norms: '{self.source}' is of another network: it has no layer '{weight.layer}'")
        rows, channels = found.shape
        if channels != weight.channels:
            raise UserError(
                f"regime.norms: '{self.source}' is of another network: its layer '{weight.layer}' has {channels} "
                f"channels, not {weight.channels}"
            )
        if steps is not None and rows != steps + 1:
            what = f"norms of {rows - 1} steps" if rows > 1 else "no norms of steps (train.record_norms=step)"
            raise UserError(f"regime.norms: '{self.source}' has {what} in epoch {epoch}; this run has {steps} steps")

    def table(self, weights: Sequence[ChannelWeight], epoch: int) -> Tensor:
        """The norms of all channels of some weights, in their order: (rows, channels) where the first weight is."""
        layers = self.epochs[epoch].layers
        joined = np.concatenate([layers[weight.layer] for weight in weights], axis=1)
        dtype = wide_dtype(weights[0].tensor.dtype)
        return torch.from_numpy(joined).to(dtype).to(weights[0].tensor.device)

    def digest(self, epochs: int) -> str:
        """What tells the norms of the first epochs from others."""
        known = [self.epochs[number].digest for number in range(1, epochs + 1) if number in self.epochs]
        return hashlib.sha256(" ".join(known).encode()).hexdigest()


class NormRecorder:
    """Takes the norms of all channels down while a network trains; it changes no bit of that.

    Args:
        weights: as `channel_weights` found them.
        every: `epoch`: at its end only; `step`: before every step too.
        steps: steps per epoch.
    """

    def __init__(self, weights: Sequence[ChannelWeight], *, every: Literal["epoch", "step"], steps: int) -> None:
        self._weights = weights
        self._steps = steps if every == "step" else 0
        self._rows: list[Tensor] = []

    def before_step(self) -> None:
        """Take down the norms before a step, if that is asked for; nothing waits for the device."""
        if self._steps:
            self._rows.append(self._measured())

    def end_epoch(self) -> None:
        """Take down the norms at the end of an epoch."""
        self._rows.append(self._measured())

    def take(self) -> dict[str, np.ndarray]:
        """The norms of the epoch that has ended by layer, (rows, channels) as in `EpochNorms`; the next begins."""
        rows = torch.stack(self._rows).cpu().numpy()
        assert len(rows) == self._steps + 1, f"{len(rows) - 1} of {self._steps} steps were taken down"
        self._rows = []
        ends = np.cumsum([weight.channels for weight in self._weights])
        parts = np.split(rows, ends[:-1], axis=1)
        return {weight.layer: part for weight, part in zip(self._weights, parts, strict=True)}

    def tensors(self) -> dict[str, Tensor]:
        """What has been taken down since the last `take`, for a checkpoint: `instruments/norms/...`."""
        return {"instruments/norms/rows": torch.stack(self._rows)} if self._rows else {}

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from what `tensors` gave."""
        saved = tensors.get("instruments/norms/rows")
        self._rows = [] if saved is None else list(saved.to(self._weights[0].tensor.device))

    @torch.no_grad()
    def _measured(self) -> Tensor:
        return torch.cat([weight.norms() for weight in self._weights])
