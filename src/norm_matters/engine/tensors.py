"""The tensors of a network: how they lie in memory, and how saved ones are loaded into it."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from norm_matters.core.errors import UserError


def lay_out(module: nn.Module, memory_format: torch.memory_format) -> nn.Module:
    """Bring the tensors of four dimensions into a memory format, in place; others have no such format."""
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.ndim == 4:
            tensor.data = tensor.data.contiguous(memory_format=memory_format)
    return module


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
