"""Safetensors that a stranger may have written: looked at before anything is made of them.

The format runs no code, but says nothing of what is sensible: the header is read with the limits of other JSON, and
only plain tensors of numbers are taken. Imports torch only to make tensors.
"""

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeGuard

from norm_matters.core.json import parse_json

if TYPE_CHECKING:
    from torch import Tensor

MAX_HEADER = 2**24
MAX_TENSORS = 200_000
MAX_DIMENSIONS = 16
# Bits of the types that networks and optimizers have; those of fewer than 8 are not among them.
DTYPES = {"BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8}
DTYPES |= {name: int(name.lstrip("UIBF")) for name in ("U16", "I16", "F16", "BF16", "U32", "I32", "F32", "U64", "I64")}
DTYPES |= {"F64": 64, "C64": 64}


def most_bytes() -> int:
    """Bytes of the largest file that is read into memory: as many as there is memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def unpack_tensors(data: bytes) -> "dict[str, Tensor]":
    """The tensors of a safetensors file by name, on the CPU.

    Raises:
        ValueError: it is cut short or damaged, or its header is larger, nested deeper or says stranger things than any
            that was written here.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    check_header(data[: 8 + MAX_HEADER], len(data))
    try:
        return load(data)
    # Beside its own errors: what torch raises where a shape and its bytes do not agree.
    except (SafetensorError, ValueError, TypeError, KeyError, RuntimeError, OverflowError) as error:
        raise ValueError(" ".join(str(error).split()) or type(error).__name__) from None


def check_header(start: bytes, size: int) -> None:
    """Raise ValueError with what is wrong with the header of a safetensors file.

    Args:
        start: the file's first bytes, the whole header at least.
        size: of the file.
    """
    length = int.from_bytes(start[:8], "little")
    if len(start) < 8 or length > size - 8:
        raise ValueError("it is cut short")
    if length > MAX_HEADER:
        raise ValueError(f"its header has {length:,} bytes; {MAX_HEADER:,} are the limit")
    entries = parse_json(start[8 : 8 + length], max_bytes=MAX_HEADER)
    if not isinstance(entries, dict):
        raise ValueError("its header is no JSON object")
    if len(entries) > MAX_TENSORS:
        raise ValueError(f"it names {len(entries):,} tensors; {MAX_TENSORS:,} are the limit")
    for name, entry in entries.items():
        if name != "__metadata__" and not _is_tensor(entry, size - 8 - length):
            raise ValueError(f"entry {name!r:.80} of its header names no tensor of numbers")


def _is_tensor(entry: Any, room: int) -> bool:
    """Whether an entry says type, shape and place, and these agree."""
    if not isinstance(entry, Mapping) or not isinstance(dtype := entry.get("dtype"), str) or dtype not in DTYPES:
        return False
    shape, place = entry.get("shape"), entry.get("data_offsets")
    if not _are_counts(shape) or not _are_counts(place) or len(shape) > MAX_DIMENSIONS or len(place) != 2:
        return False
    bits = DTYPES[dtype]
    for side in shape:
        bits *= side
        if bits > 8 * room:
            return False
    return place[0] <= place[1] <= room and 8 * (place[1] - place[0]) == bits


def _are_counts(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(number) is int and number >= 0 for number in value)
