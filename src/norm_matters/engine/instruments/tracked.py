"""The weights of a network that are followed: which there are, by which name, and their channels as vectors."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd
from torch.nn.utils import parametrize

from norm_matters.engine.evaluate import evaluation_mode
from norm_matters.norms import is_norm


@dataclass(frozen=True)
class TrackedWeight:
    """A weight of two or more dimensions.

    Attributes:
        layer: dotted path of the layer; with the weight's own name behind it where that is not `weight`.
        module, name: the effective weight is `getattr(module, name)`.
        parameter: full name of the parameter that the optimizer moves: the weight itself, or behind a parametrization
            the tensor of the weight's shape (the direction v of a weight norm); None where there is no such tensor.
        path: the module's dotted path.
    """

    layer: str
    module: nn.Module
    name: str
    parameter: str | None
    path: str

    @property
    def parametrized(self) -> bool:
        """Whether the effective weight is computed from other tensors."""
        return parametrize.is_parametrized(self.module, self.name)

    def effective(self, masters: Mapping[str, Tensor]) -> Tensor:
        """The weight that the layer applies, in full precision where there are masters.

        A parametrization is computed in evaluation mode: in training some (spectral norm) change their state.
        """
        prefix = _join(self.path, f"parametrizations.{self.name}.")
        if not self.parametrized:
            return masters.get(_join(self.path, self.name), getattr(self.module, self.name))
        transform = _transform(self.module, self.name)
        own = {name.removeprefix(prefix): tensor for name, tensor in masters.items() if name.startswith(prefix)}
        with evaluation_mode(transform):
            return torch.func.functional_call(transform, own, ())

    def channels(self, masters: Mapping[str, Tensor]) -> Tensor:
        """The effective weight as a matrix (output channels, values of a channel); it may be a view."""
        return channel_rows(self.module, self.effective(masters).detach())


def channel_rows(module: nn.Module, weight: Tensor) -> Tensor:
    """A layer's weight (out, in, *) as (out, values); a transposed convolution has its output channels second."""
    if isinstance(module, _ConvTransposeNd):
        groups = weight.unflatten(0, (module.groups, -1)).transpose(1, 2)
        return groups.reshape(module.out_channels, -1)
    # Values in the order of a channels-last weight, so that those of the engine need no copy.
    return weight.movedim(1, -1).reshape(len(weight), -1)


def tracked_weights(module: nn.Module) -> list[TrackedWeight]:
    """All parameters called weights that hold more than one value per channel, outside norms; each tensor once.

    Position embeddings and per-channel scales are no weights in this sense.
    """
    found: list[TrackedWeight] = []
    seen: set[tuple[int, ...]] = set()
    for path, layer in module.named_modules():
        if is_norm(layer) or "parametrizations" in path.split("."):
            continue
        for name in _own_weights(layer):
            parametrized = parametrize.is_parametrized(layer, name)
            with torch.no_grad():
                tensor = TrackedWeight("", layer, name, None, path).effective({})
            made_of = _made_of(layer, name) if parametrized else (id(tensor),)
            if tensor.ndim < 2 or made_of in seen or channel_rows(layer, tensor).shape[1] < 2:
                continue
            seen.add(made_of)
            full = _join(path, name)
            parameter = _moved(layer, name, path, tensor.shape) if parametrized else full
            found.append(TrackedWeight(path if name == "weight" and path else full, layer, name, parameter, path))
    return found


def _own_weights(layer: nn.Module) -> list[str]:
    names = [name for name, _ in layer.named_parameters(recurse=False)]
    if parametrize.is_parametrized(layer):
        names += list(layer.parametrizations)  # type: ignore[arg-type]
    return [name for name in names if "weight" in name]


def _transform(layer: nn.Module, name: str) -> nn.Module:
    """The module that computes a parametrized tensor."""
    return layer.get_submodule(f"parametrizations.{name}")


def _made_of(layer: nn.Module, name: str) -> tuple[int, ...]:
    """What a parametrized tensor is computed from and by. Its own identity says nothing: it is made anew each time,
    where another may just have been.
    """
    transform = _transform(layer, name)
    steps = (step for step in transform.modules() if step is not transform)
    return tuple(map(id, (*transform.parameters(), *transform.buffers(), *steps)))


def _moved(layer: nn.Module, name: str, path: str, shape: torch.Size) -> str | None:
    """The parameter behind a parametrized weight that has its shape."""
    originals = _transform(layer, name).named_parameters(recurse=False)
    same = [original for original, tensor in originals if tensor.shape == shape]
    return _join(path, f"parametrizations.{name}.{same[0]}") if len(same) == 1 else None


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
