"""Files that `torch.save` wrote in the paper's code and its successor: read without running what is in them.

Such a file is a pickle. It is read by `torch.load(weights_only=True)` or not at all, and nothing in it is believed
before its size is known: archives that unpack to more than themselves and tensors larger than the file are refused.
"""

import re
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from norm_matters.core.errors import UserError

LARGEST = 4 * 2**30
"""Bytes of the largest file that is read unless another limit is given; a resnet152 with its optimizer has 0.5e9."""

OLDEST = (2, 10)
"""The oldest torch whose `weights_only=True` is known to keep its word."""

_ZIP = b"PK\x03\x04"
_RESAVE = (
    "if you trust whoever wrote it, load it with the code that did and save "
    "{'state_dict': ..., 'epoch': ..., 'best_prec1': ...} alone"
)


@dataclass(frozen=True)
class OldFile:
    """What an old checkpoint holds that is of use.

    Attributes:
        tensors: the network's state by the old names, in the file's order, on the CPU.
        epoch: epochs trained; None where the file does not say.
        best_accuracy: the best validation accuracy so far, in percent; None where the file does not say.
        model: the old name of the network, and `config` the text of its options; empty where the file does not say.
    """

    tensors: dict[str, Tensor]
    epoch: int | None = None
    best_accuracy: float | None = None
    model: str = ""
    config: str = ""


def read_old_file(path: Path, *, limit: int = LARGEST) -> OldFile:
    """Read a checkpoint, or a bare state dict, that `torch.save` wrote.

    Args:
        path: the file, of torch's present format or the one before 1.6.
        limit: bytes of the largest file to read.

    Raises:
        UserError: there is no such file, it is too large, damaged or no checkpoint, or it holds more than tensors
            and plain values, so that reading it would run code.
    """
    document = load_plain(path, limit=limit)
    size = path.stat().st_size
    if not isinstance(document, Mapping):
        raise UserError(f"'{path}' holds a {type(document).__name__}, no checkpoint with a state_dict")
    state = document.get("state_dict", document)
    if not isinstance(state, Mapping) or not any(isinstance(value, Tensor) for value in state.values()):
        keys = ", ".join(str(key) for key in list(document)[:5])
        raise UserError(f"'{path}' is no checkpoint: it has no state_dict and is none; its keys are: {keys}")
    described = document if state is not document else {}
    return OldFile(
        _checked_tensors(path, state, size),
        epoch=_read_epoch(described.get("epoch")),
        best_accuracy=_read_accuracy(described.get("best_prec1")),
        model=_read_text(described.get("model")),
        config=_read_text(described.get("config")),
    )


def load_plain(path: Path, *, limit: int = LARGEST) -> Any:
    """What `torch.save` wrote, of tensors and plain values alone: the only place where such a file is opened.

    Raises:
        UserError: there is no such file, it is too large or damaged, or reading it would run code; or torch is older
            than `OLDEST`, which reads such files without harm.
    """
    _check_torch()
    if not path.is_file():
        raise UserError(f"there is no file '{path}'")
    size = path.stat().st_size
    if size > limit:
        raise UserError(f"'{path}' has {size} bytes, more than the limit of {limit}")
    _check_archive(path, size)
    return _load(path)


def _check_torch() -> None:
    """CVE-2025-32434 and CVE-2026-24747: older versions could be made to run code all the same."""
    version = tuple(int(part) for part in re.findall(r"\d+", torch.__version__)[:2])
    if version < OLDEST:
        raise UserError(
            f"torch {torch.__version__} is not safe with files of torch.save; it takes "
            f"{'.'.join(map(str, OLDEST))} or later"
        )


def _check_archive(path: Path, size: int) -> None:
    """Refuse an archive with compressed or overlapping entries: torch writes none, and they may unpack to anything."""
    try:
        with path.open("rb") as file:
            if file.read(len(_ZIP)) != _ZIP:
                return  # the format before torch 1.6, where every tensor takes its own bytes of the file
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise UserError(f"'{path}' is cut short or damaged: {error}") from error
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise UserError(f"'{path}' has compressed entries, which torch.save does not write; it is not read")
    if sum(entry.file_size for entry in entries) > size:
        raise UserError(f"'{path}' has entries larger than the file itself; it is not read")


def _load(path: Path) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about formats and storages, of which the user can change nothing
            return torch.load(path, map_location="cpu", weights_only=True)
    # Of what a broken file makes torch raise there is no list.
    except Exception as error:
        text = str(error)
        forbidden = re.search(r"GLOBAL (\S+) (?:was not an allowed|whose module)", text)
        if forbidden:
            raise UserError(
                f"'{path}' holds more than tensors and plain values ({forbidden[1]}) and is not read, since that could "
                f"run code; {_RESAVE}"
            ) from error
        reason = re.search(r"Unpickler error:\s*(.+)", text) or re.search(r"(.+)", text)
        why = reason[1] if reason else type(error).__name__
        raise UserError(f"'{path}' is cut short, damaged, or no checkpoint of torch.save: {why}") from error


def _checked_tensors(path: Path, state: Mapping[Any, Any], size: int) -> dict[str, Tensor]:
    """The state dict, known to hold plain tensors under text keys that are no larger together than the file."""
    tensors: dict[str, Tensor] = {}
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise UserError(f"'{path}': entry '{key}' of the state_dict is a {type(value).__name__}, no tensor")
        if value.layout != torch.strided or value.is_quantized or value.is_complex() or value.device.type != "cpu":
            raise UserError(f"'{path}': entry '{key}' of the state_dict is no plain tensor of numbers")
        tensors[key] = value.detach()
    if sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) > size:
        raise UserError(f"'{path}' names tensors larger than the file itself; it is not read")
    return tensors


def _read_epoch(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _read_accuracy(value: Any) -> float | None:
    """A number; some versions stored a tensor of one."""
    if isinstance(value, Tensor) and value.numel() == 1:
        return float(value)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _read_text(value: Any) -> str:
    return value if isinstance(value, str) else ""
