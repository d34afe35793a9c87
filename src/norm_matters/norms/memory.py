"""Activations that are computed again instead of being kept.

A convolution keeps its input for the backward pass, and the norm before it keeps its own: with a ReLU between, both are
nearly the same numbers. Within `saving_memory` the norms offer a way to make their output again, and what an operation
would keep of such an output is left out: the backward pass makes it anew, to the same bit, when it is needed. That
halves the activations of a network of convolutions and norms, for about one more pass over each of them.

Where a residual is added, the recomputation needs the residual, which may itself be left out: the chain is followed,
and each output is held until its last use, so that none is made twice. (For norm and activation by themselves, Rota
Bulò et al. 2018, arXiv 1712.02616, invert the activation instead; an addition cannot be inverted.)
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor


class _Offer(NamedTuple):
    """An output that can be made again: the tensor itself, its version then, and how."""

    output: "weakref.ref[Tensor]"
    version: int
    remake: "_Remake"


class _Remake:
    """Makes an output, and holds it as long as others are going to ask for it.

    Args:
        make: gives the output, to the bit.
        needs: what it is made of, as it must still be then.
    """

    def __init__(self, make: Callable[[], Tensor], needs: "tuple[Kept, ...]" = ()) -> None:
        self._make = make
        self._needs = needs
        self._held: Tensor | None = None
        self.uses = 0

    def take(self) -> Tensor:
        """The output."""
        global _remaking
        y = self._held
        if y is None:
            for kept in self._needs:
                fetch(kept)
            before, _remaking = _remaking, True
            try:
                with torch.no_grad():
                    y = self._make()
            finally:
                _remaking = before
        self.uses -= 1
        self._held = y if self.uses > 0 else None
        return y


class Kept(NamedTuple):
    """A tensor that is kept as it is, and its version then: where hooks are, autograd does not look whether something
    has overwritten what it saved."""

    tensor: Tensor
    version: int


class _Omitted(NamedTuple):
    """What stands for a tensor that was not kept: how to make the output it is a view of, and which view."""

    remake: _Remake
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


# Address of the memory -> the output that lies there; None outside `saving_memory`.
_offers: dict[int, _Offer] | None = None
_remaking = False


@contextmanager
def saving_memory() -> Iterator[None]:
    """Within it, the outputs of norms are not kept for the backward pass but made again there.

    Gradients are equal to the bit to those without. To be put around a forward pass in eager mode; the backward pass
    may come later. An output that something overwrites is kept as usual.
    """
    global _offers
    before, _offers = _offers, {}
    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, fetch):
            yield
    finally:
        _offers = before


def is_saving(*, recorded: bool | None = None) -> bool:
    """Whether offers are taken now.

    Args:
        recorded: whether autograd records the operation; None to ask torch.
    """
    if _offers is None or _remaking or torch.compiler.is_compiling():
        return False
    return torch.is_grad_enabled() if recorded is None else recorded


def is_remaking() -> bool:
    """Whether the present forward pass makes an output again, so that nothing is to be counted or drawn anew."""
    return _remaking


def offer(output: Tensor, make: Callable[[], Tensor], *needs: Tensor | None) -> None:
    """Say how to make an output again; called where `is_saving`, for what `is_offered` not yet.

    Args:
        output: a tensor of its own, no view.
        make: gives it again, to the bit. What it closes over is held instead of the output: residuals, which may be
            outputs themselves, should go through `keep` and `fetch`, once for each time that they will be fetched.
        needs: what else it closes over, and nothing may overwrite; without history.
    """
    assert _offers is not None
    offers, storage = _offers, output.untyped_storage()
    address = storage.data_ptr()
    if address == 0 or storage.nbytes() != output.numel() * output.itemsize:
        return
    present = (tensor for tensor in needs if tensor is not None)
    reference = weakref.ref(output, lambda _: offers.pop(address, None))
    offers[address] = _Offer(reference, output._version, _Remake(make, tuple(map(_as_it_is, present))))


def is_offered(output: Tensor) -> bool:
    """Whether somebody said how to make an output again."""
    return _offered(output.untyped_storage().data_ptr()) is not None


def keep(tensor: Tensor | None) -> Any:
    """What to hold of a tensor that the backward pass needs: the tensor, or the way to make it again."""
    if tensor is None:
        return None
    offered = None if _offers is None else _offered(tensor.untyped_storage().data_ptr())
    output = None if offered is None else offered.output()
    if offered is None or output is None or output._version != offered.version or output.dtype != tensor.dtype:
        return _as_it_is(tensor)
    offered.remake.uses += 1
    return _Omitted(offered.remake, tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()))


def fetch(held: Any) -> Any:
    """The tensor that `keep` was given.

    Raises:
        RuntimeError: something has overwritten it since, as autograd says it without hooks.
    """
    if isinstance(held, _Omitted):
        return held.remake.take().as_strided(held.size, held.stride, held.offset)
    if held is None:
        return None
    tensor, version = held
    if _version(tensor) != version:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace operation: "
            f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)} is at version {_version(tensor)}; "
            f"expected version {version} instead"
        )
    return tensor


def _as_it_is(tensor: Tensor) -> Kept:
    return Kept(tensor, _version(tensor))


def _version(tensor: Tensor) -> int:
    # Nothing counts what is done to a tensor of inference mode.
    return 0 if tensor.is_inference() else tensor._version


def _offered(address: int) -> _Offer | None:
    assert _offers is not None
    found = _offers.get(address)
    return None if found is None or found.output() is None else found
