"""Which device a run computes on."""

import torch

from norm_matters.core.errors import UserError


def resolve_device(name: str) -> torch.device:
    """The device of that name; `auto` takes CUDA, then Apple's MPS, then the CPU. UserError where there is none."""
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


def check_device(name: str) -> None:
    """Raise UserError when this machine has no such device."""
    resolve_device(name)


def device_name(device: torch.device) -> str:
    """What to call it in a sentence: a GPU's own name, else its kind."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
