"""Tables that are kept below `$XDG_CACHE_HOME/norm-matters`, so that they are made once. Deleting them costs only time.

A table's file is named after what it follows from; what is damaged, or something else's, counts as missing.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from norm_matters.core.errors import StorageError
from norm_matters.datasets.cache import cache_folder
from norm_matters.record.files import make_folder, write_file

Arrays = Mapping[str, np.ndarray]


def read_kept(kind: str, *identity: object) -> bytes | None:
    """What was kept under that name, or None."""
    with suppress(OSError):
        return _file(kind, identity).read_bytes()
    return None


def write_kept(data: bytes, kind: str, *identity: object) -> None:
    """Keep a table; where that is not possible, it is made again the next time.

    Args:
        kind: the folder it is kept in.
        identity: what it follows from, in JSON types.
    """
    file = _file(kind, identity)
    with suppress(StorageError):
        make_folder(file.parent)
        write_file(file, data)


def pack_arrays(arrays: Arrays) -> bytes:
    """Named arrays in the format of safetensors, with a checksum."""
    return save({**arrays, "checksum": np.frombuffer(_checksum(arrays), dtype=np.uint8)})


def unpack_arrays(data: bytes, names: Sequence[str]) -> list[np.ndarray]:
    """The arrays of those names: bytes for a name that begins with "text", else int64, of one dimension.

    Raises:
        ValueError: it is damaged, or holds something else.
    """
    try:
        arrays = load(data)
        checksum = arrays.pop("checksum").tobytes()
        found = [arrays[name] for name in names]
        dtypes = [np.uint8 if name.startswith("text") else np.int64 for name in names]
        right = all(array.dtype == dtype and array.ndim == 1 for array, dtype in zip(found, dtypes, strict=True))
        if right and checksum == _checksum(arrays):
            return found
    except (SafetensorError, KeyError, TypeError, AttributeError, MemoryError, OverflowError) as error:
        raise ValueError(f"it is no table: {error}") from None
    raise ValueError("it is damaged, or holds another table")


def _file(kind: str, identity: Sequence[object]) -> Path:
    name = hashlib.sha256(json.dumps(identity).encode(errors="surrogateescape")).hexdigest()
    return cache_folder().parent / kind / f"{name}.safetensors"


def _checksum(arrays: Arrays) -> bytes:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(f"{name} {len(arrays[name])}\0".encode())
        digest.update(np.ascontiguousarray(arrays[name]).data)
    return digest.digest()
