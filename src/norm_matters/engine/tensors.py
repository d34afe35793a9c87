"""The tensors of a network: how they lie in memory, and how saved ones are loaded into it."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from norm_matters.core.errors import UserError

# Input channels from which oneDNN's convolutions of one pixel that skip pixels are right on every processor: the widest
# vector holds so many.
_SAFE_CHANNELS = 16


def lay_out(module: nn.Module, memory_format: torch.memory_format) -> nn.Module:
    """Bring the tensors of four dimensions into a memory format, in place; others have no such format.

    Convolutions that oneDNN gets wrong in it (see `spoils_memory`) are left out, and take their input as contiguous.
    """
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.ndim == 4:
            tensor.data = tensor.data.contiguous(memory_format=memory_format)
    if memory_format == torch.channels_last:
        for convolution in filter(spoils_memory, module.modules()):
            for tensor in (*convolution.parameters(), *convolution.buffers()):
                tensor.data = _contiguous(tensor.data)
            if _with_contiguous_input not in convolution._forward_pre_hooks.values():
                convolution.register_forward_pre_hook(_with_contiguous_input, with_kwargs=True)
    return module


def spoils_memory(module: nn.Module) -> bool:
    """Whether a convolution's gradient may be wrong, and written past its end, where its input is channels_last.

    So it is on CPUs, for kernels of one pixel that skip pixels and have fewer input channels than a vector has room
    for; torch 2.13, https://github.com/uxlfoundation/oneDNN/issues/6035.
    """
    return (
        isinstance(module, nn.Conv2d)
        and all(tensor.device.type == "cpu" for tensor in (*module.parameters(), *module.buffers()))
        and module.kernel_size == (1, 1)
        and module.stride != (1, 1)
        and module.in_channels // module.groups < _SAFE_CHANNELS
    )


def _with_contiguous_input(
    convolution: nn.Module, inputs: tuple[Tensor, ...], named: dict[str, Tensor]
) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    return tuple(map(_contiguous, inputs)), {name: _contiguous(tensor) for name, tensor in named.items()}


def _contiguous(tensor: Tensor) -> Tensor:
    """A copy that says so by its strides: with one channel, `contiguous()` is content with those of channels_last."""
    return tensor.clone(memory_format=torch.contiguous_format)


def load_weights(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy a state_dict into a network whose names and shapes must be the same.

    Raises:
        UserError: naming the first five entries that are missing, unexpected or of another shape.
    """
    own = module.state_dict()
    problems = [f"{name} is missing" for name in own if name not in tensors]
    problems += [f"{name} is unexpected" for name in tensors if name not in own]
    problems += [
        f"{name} has shape {tuple(tensors[name].shape)}, not {tuple(own[name].shape)}"
        for name in own
        if name in tensors and tensors[name].shape != own[name].shape
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise UserError(f"the weights are of another network: {', '.join(problems[:5])}{more}")
    module.load_state_dict(dict(tensors))


def with_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under names that begin with a prefix."""
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}


def part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names begin with a prefix, under the rest of their names."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
