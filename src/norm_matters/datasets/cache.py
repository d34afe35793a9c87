"""Decoded pixels kept on disk: a set of many small files is decoded once, not at every start.

A file's name is made of what its pixels follow from, so it is never out of date; what is damaged, or was written by
something else, counts as missing. Deleting the folder costs nothing but the time to decode.
"""

import hashlib
import os
import zlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import PIL
import torch
from PIL import features
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from norm_matters.core.errors import StorageError
from norm_matters.record.files import make_folder, write_file

# Of how images become pixels here: raised by whoever changes that.
DECODING = "1"


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/norm-matters/decoded`, by default below `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "norm-matters" / "decoded"


def cache_key(files: Sequence[Path], *facts: str) -> str:
    """What decoded pixels follow from: SHA-256 of the files' contents, of the decoder's version and of the facts.

    Raises:
        OSError: a file cannot be read.
    """
    key = hashlib.sha256("\0".join((DECODING, PIL.__version__, str(features.version("jpg")), *facts)).encode())
    for file in files:
        with file.open("rb") as stream:
            key.update(hashlib.file_digest(stream, "sha256").digest())
    return key.hexdigest()


def read_cached(key: str) -> tuple[Tensor, str] | None:
    """The pixels stored under a key, uint8 (N, C, H, W), channels_last, and the digest that was given with them.

    None where there is nothing, or nothing whole.
    """
    try:
        with safe_open(_file(key), "pt") as tensors:
            # Copied: the file is mapped, and somebody who cuts it short would end a process that reads it later.
            pixels = tensors.get_tensor("nhwc").clone()
            digest = bytes(tensors.get_tensor("digest").tolist()).decode()
            crc32 = int(tensors.get_tensor("crc32"))
        if pixels.dtype == torch.uint8 and pixels.ndim == 4 and crc32 == _crc32(pixels, digest):
            return pixels.permute(0, 3, 1, 2), digest
    except (OSError, SafetensorError, KeyError, ValueError, RuntimeError):
        pass
    return None


def write_cached(key: str, pixels: Tensor, digest: str) -> None:
    """Store pixels, uint8 (N, C, H, W); where that is not possible, they are decoded again the next time."""
    nhwc = pixels.permute(0, 2, 3, 1).contiguous()
    tensors = {
        "nhwc": nhwc,
        "digest": torch.tensor(list(digest.encode()), dtype=torch.uint8),
        "crc32": torch.tensor(_crc32(nhwc, digest)),
    }
    with suppress(StorageError):
        make_folder(cache_folder())
        write_file(_file(key), save(tensors))


def _file(key: str) -> Path:
    return cache_folder() / f"{key}.safetensors"


def _crc32(pixels: Tensor, digest: str) -> int:
    start = zlib.crc32(f"{tuple(pixels.shape)} {digest}".encode())
    return zlib.crc32(np.ascontiguousarray(pixels.numpy()).data, start)
