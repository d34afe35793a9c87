"""`state.json` of a checkpoint: what is in it, and a seal that shows any changed byte. Imports no torch."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from norm_matters.core.errors import StorageError, UserError
from norm_matters.core.json import parse_json
from norm_matters.core.reading import read_regular

STATE_FILE = "state.json"
FORMAT_VERSION = 2
"""2: a checkpoint may stand in the middle of an epoch. Those of version 1 stand between two."""
# A state is kilobytes. A file beyond this was not written here, and would be parsed into many times its size.
_LARGEST = 64 * 2**20
_SEAL = re.compile(rb'\A\{\n "sha256": "([0-9a-f]{64})",\n')
_BLANK = b"0" * 64
_ENTRIES: dict[str, type] = {"step": int, "best": bool, "parts": dict, "state": dict}


class VersionError(UserError):
    """A newer norm-matters wrote the checkpoint: it is whole, and not for this one."""


def seal_state(document: dict[str, Any]) -> bytes:
    """Return the text of `state.json`.

    Args:
        document: `step`, `best`, `parts`, `state` (see `read_state`): JSON types only, text keys.

    Returns:
        JSON whose first entry is the SHA-256 of the whole text, taken with 64 zeros in its own place.
    """
    entries = {"sha256": _BLANK.decode(), "format_version": FORMAT_VERSION, **document}
    text = json.dumps(entries, indent=1).encode()
    return text.replace(_BLANK, hashlib.sha256(text).hexdigest().encode(), 1)


def read_state(folder: Path) -> dict[str, Any]:
    """Read and verify the `state.json` of a checkpoint folder.

    Returns:
        `step`: optimizer steps done; `best`: whether it was the best so far when saved; `parts`: file name ->
        `{sha256, size, channels_last}`; `state`: what the run gave to `save_checkpoint`.

    Raises:
        VersionError: of a newer version.
        UserError: missing, cut short or changed; names the file.
        StorageError: the file is there and cannot be read.
    """
    path = folder / STATE_FILE
    data = read_part(path, limit=_LARGEST)
    seal = _SEAL.match(data)
    if not seal:
        raise UserError(f"{path} is damaged: it is cut short, or no state of a norm-matters checkpoint")
    blank = data[: seal.start(1)] + _BLANK + data[seal.end(1) :]
    if hashlib.sha256(blank).hexdigest().encode() != seal[1]:
        raise UserError(f"{path} is damaged: its contents do not match their SHA-256")
    try:
        # NaN: a loss may be one.
        document = parse_json(data, max_bytes=_LARGEST, nan=True)
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}") from error
    version = document.get("format_version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise VersionError(
            f"{path} has format version {version}; this norm-matters reads 1 to {FORMAT_VERSION}: a newer one wrote it"
        )
    if version not in range(1, FORMAT_VERSION + 1):
        raise UserError(f"{path} has format version {version!r}; this norm-matters reads 1 to {FORMAT_VERSION}")
    if not all(isinstance(document.get(key), kind) for key, kind in _ENTRIES.items()):
        raise UserError(f"{path} is no state of a norm-matters checkpoint: it lacks one of {', '.join(_ENTRIES)}")
    return document


def read_part(path: Path, *, limit: int) -> bytes:
    """Read one file of a checkpoint.

    Raises:
        UserError: it is missing, no file, or longer than `limit` bytes.
        StorageError: it is there and cannot be read.
    """
    try:
        return read_regular(path, limit=limit)
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}") from error
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(f"{path} is missing") from error
    except IsADirectoryError as error:
        raise UserError(f"{path} is a folder; a file was expected") from error
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror or error}") from error
