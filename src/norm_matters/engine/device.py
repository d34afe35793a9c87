"""Which device a run computes on."""

import torch

from norm_matters.core.errors import UserError
from norm_matters.core.joining import gpu_of
from norm_matters.core.ranks import ONE_PROCESS, Ranks


def resolve_device(name: str, ranks: Ranks = ONE_PROCESS) -> torch.device:
    """The device of that name; `auto` takes CUDA, then Apple's MPS, then the CPU. UserError where there is none.

    Args:
        ranks: of several on a machine, each takes the GPU of its number there; see `core.joining.gpu_of`.
    """
    if ranks.world > 1:
        return _device_of_rank(name, ranks)
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"'{name}' is no device; there are auto, cpu, cuda, cuda:N, mps") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"'{name}' is not to be had here: torch sees {torch.cuda.device_count()} CUDA devices")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError("'mps' is not to be had here: torch sees no Apple GPU")
    return device


def _device_of_rank(name: str, ranks: Ranks) -> torch.device:
    if name not in ("auto", "cpu", "cuda"):
        raise UserError(
            f"device: '{name}' is one device, and there are {ranks.world} processes; take auto, cuda or cpu"
        )
    count = torch.cuda.device_count()
    if name == "cpu" or (name == "auto" and not count):
        return torch.device("cpu")
    number = gpu_of(ranks, count)
    if number >= count:
        raise UserError(
            f"device: process {ranks.local_rank} of this machine has no GPU of its own: torch sees {count} CUDA "
            "devices; start fewer processes, or take device=cpu"
        )
    return torch.device("cuda", number)


def check_device(name: str) -> None:
    """Raise UserError when this machine has no such device."""
    resolve_device(name)


def device_name(device: torch.device) -> str:
    """What to call it in a sentence: a GPU's own name, else its kind."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
