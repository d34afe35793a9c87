"""The global random streams as data: read, restored, and kept apart from evaluation."""

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

_WORDS = 624
"""Of the state of numpy's generator, MT19937."""


def rng_state() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the streams of torch (every device), numpy and Python: tensors, and what JSON can hold.

    That of the current GPU is there twice: resumed elsewhere, this process may have one of another number.
    """
    tensors = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors |= {f"cuda:{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
        tensors["cuda"] = torch.cuda.get_rng_state()
    if torch.backends.mps.is_available():
        tensors["mps"] = torch.mps.get_rng_state()
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    tensors["numpy"] = torch.from_numpy(np.asarray(keys).astype(np.int64))
    version, words, next_gauss = random.getstate()
    numbers = {
        "numpy": [str(name), int(position), int(has_gauss), float(gauss)],
        "python": [version, list(words), next_gauss],
    }
    return tensors, numbers


def restore_rng(tensors: dict[str, Tensor], numbers: dict[str, Any]) -> None:
    """Restore what `rng_state` returned. A stream of a device that this machine lacks is left out."""
    torch.set_rng_state(tensors["torch"].clone())
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            if f"cuda:{i}" in tensors:
                torch.cuda.set_rng_state(tensors[f"cuda:{i}"].clone(), i)
        if "cuda" in tensors:
            torch.cuda.set_rng_state(tensors["cuda"].clone())
    if torch.backends.mps.is_available() and "mps" in tensors:
        torch.mps.set_rng_state(tensors["mps"].clone())
    name, position, has_gauss, gauss = numbers["numpy"]
    if not (type(position) is int and 0 <= position <= _WORDS and tensors["numpy"].shape == (_WORDS,)):
        # numpy does not look, and would read words beyond the end of its state.
        raise ValueError(f"numpy's random state has {_WORDS} words, and a position among them")
    np.random.set_state((name, tensors["numpy"].numpy().astype(np.uint32), position, has_gauss, gauss))
    version, words, next_gauss = numbers["python"]
    random.setstate((version, tuple(words), next_gauss))


@contextlib.contextmanager
def preserved_rng() -> Iterator[None]:
    """A context that leaves every stream as it found it."""
    state = rng_state()
    try:
        yield
    finally:
        restore_rng(*state)
