"""Which layer feeds which norm, seen from one forward pass.

Neither the order of the modules nor a symbolic trace tells that: modules need not be used in their order, and not every
network can be traced. So an example is run, and every operation on a layer's output is noted.
"""

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from norm_matters.norms.fold import LAYERS, scales_with_weight


@dataclass
class LayerUse:
    """How a layer was used.

    Attributes:
        name: in the model.
        calls: how often.
        per_channel: whether the channels of its output are in dimension 1, as norms have them.
        scales: whether its output scales with its weight.
        norms: names of the norms that read its output.
        readers: other operations that read its output (`add`, `relu`).
    """

    name: str
    calls: int = 0
    per_channel: bool = True
    scales: bool = True
    norms: list[str] = field(default_factory=list)
    readers: list[str] = field(default_factory=list)


@dataclass
class NormUse:
    """How a norm was used: how often, and what made its input: a layer, an operation (`relu`), or None of them."""

    calls: int = 0
    source: LayerUse | str | None = None


@dataclass(frozen=True)
class Trace:
    """One forward pass: its output, and the use of each norm by its name."""

    output: Any
    norms: dict[str, NormUse]


def trace(model: nn.Module, norms: Mapping[str, nn.Module], example: Tensor) -> Trace:
    """Run the model on an example and see which layers feed which norms.

    Args:
        model: in evaluation mode; not changed.
        norms: by their names in the model.
        example: the model's input.
    """
    watch = _Watch(norms)
    with contextlib.ExitStack() as stack:
        for name, layer in model.named_modules():
            if isinstance(layer, LAYERS):
                stack.callback(layer.register_forward_hook(watch.after_layer(name)).remove)
        for name, norm in norms.items():
            stack.callback(norm.register_forward_pre_hook(watch.before_norm(name)).remove)
            stack.callback(norm.register_forward_hook(watch.after_norm).remove)
        stack.enter_context(torch.no_grad())
        stack.enter_context(watch)
        output = model(example)
    for tensor in tensors_in(output):
        watch.note_reader(tensor, "the model's output")
    return Trace(output, watch.norm_uses)


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors in lists, tuples and dicts, nested or not."""
    if isinstance(value, Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [tensor for item in items for tensor in tensors_in(item)]


class _Watch(TorchDispatchMode):
    """Sees every operation; hooks tell it which modules they belong to."""

    def __init__(self, norms: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.norm_uses = {name: NormUse() for name in norms}
        self._layer_uses: dict[nn.Module, LayerUse] = {}
        # Tensor -> what made it. Weak, so that no activation is kept longer than the model keeps it.
        self._source = WeakTensorKeyDictionary()
        self._input_of_norm: Tensor | None = None
        self._trying_out = False

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Run an operation, and note what it reads and what it makes; an operation in place makes its input anew."""
        kwargs = kwargs or {}
        operation = func.overloadpacket.__name__
        if not self._trying_out:
            for tensor in tensors_in([*args, kwargs]):
                if tensor is not self._input_of_norm:
                    self.note_reader(tensor, operation)
        result = func(*args, **kwargs)
        for tensor in tensors_in(result):
            self._source[tensor] = operation
        return result

    def note_reader(self, tensor: Tensor, reader: str) -> None:
        """Note who reads a tensor, if a layer made it."""
        source = self._source.get(tensor)
        if isinstance(source, LayerUse) and reader not in source.readers:
            source.readers.append(reader)

    def after_layer(self, name: str) -> Callable[..., None]:
        """A forward hook for that layer."""

        def note(layer: Any, args: tuple, output: Any) -> None:
            if self._trying_out:
                return
            use = self._layer_uses.setdefault(layer, LayerUse(name))
            use.calls += 1
            use.per_channel = output.dim() == layer.weight.dim()
            if type(layer) not in LAYERS and "weight" in layer._parameters and use.per_channel:
                # A class of somebody's own: what it does to its weight is not known.
                self._trying_out = True
                use.scales = scales_with_weight(layer, args[0])
                self._trying_out = False
            self._source[output] = use

        return note

    def before_norm(self, name: str) -> Callable[..., None]:
        """A forward pre-hook for that norm."""

        def note(norm: nn.Module, args: tuple) -> None:
            use = self.norm_uses[name]
            use.calls += 1
            use.source = self._source.get(args[0])
            if isinstance(use.source, LayerUse):
                use.source.norms.append(name)
            self._input_of_norm = args[0]

        return note

    def after_norm(self, norm: nn.Module, args: tuple, output: Any) -> None:
        """A forward hook for every norm."""
        self._input_of_norm = None
