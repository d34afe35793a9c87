"""A network's forward pass (and with it the backward pass) as compiled code, with errors in words."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from norm_matters.core.errors import UserError
from norm_matters.engine.tensors import spoils_memory

Forward = Callable[[Tensor], Tensor]


def compiled_forward(module: nn.Module, *, cuda_graphs: bool = False) -> Forward:
    """A function that does what the network does, compiled at its first call; the network itself stays as it was.

    Args:
        module: its weights are used where they lie, whatever they are by then.
        cuda_graphs: record the kernels of a call and replay them: for small batches, whose kernels take less time than
            their launch. An output is overwritten by the next call. CUDA only.
    """
    if any(map(spoils_memory, module.modules())):
        # The compiler would lay their input out as channels_last.
        compiled = torch.compile(module, options={"layout_optimization": False})
    else:
        compiled = torch.compile(module, mode="reduce-overhead" if cuda_graphs else None)
    if not cuda_graphs:
        return compiled

    def forward(images: Tensor) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return compiled(images)

    return forward


@contextmanager
def compilation_explained() -> Iterator[None]:
    """Turn what torch's compiler raises, at the first forward or backward pass, into a UserError of one line."""
    try:
        yield
    except Exception as error:
        if not _is_of_the_compiler(error):
            raise
        reason = _reason(error)
        raise UserError(
            f"train.compile: torch cannot compile this network here ({reason}); leave train.compile and --compile out"
        ) from error


def _reason(error: Exception) -> str:
    """The first line of the compiler's message, and of a C++ compiler's pages its first error."""
    lines = str(error).splitlines() or [type(error).__name__]
    first_error = [line.strip() for line in lines[1:] if "error: " in line][:1]
    return ": ".join([lines[0].rstrip(":. "), *first_error])


def _is_of_the_compiler(error: BaseException) -> bool:
    """Known by where its class is from: importing the compiler takes seconds, and it raises a dozen kinds."""
    homes = tuple(kind.__module__.split(".")[:2] for kind in type(error).__mro__)
    return ["torch", "_dynamo"] in homes or ["torch", "_inductor"] in homes
