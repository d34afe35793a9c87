"""Checkpoints: folders that appear whole, name their own damage, and never hold a pickle.

`checkpoints/step-%09d/` holds `model.safetensors` (loads anywhere), `training.safetensors` (optimizer, random
states) and `state.json` (everything else, and the SHA-256 of the two). `last` and `best` are links to such folders.
"""

import hashlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from norm_matters.core.errors import StorageError, UserError
from norm_matters.core.faults import fault_point
from norm_matters.record import files
from norm_matters.record.folder import BEST, CHECKPOINTS, LAST
from norm_matters.record.retention import FEWEST, free_folder, mend_best, remove_leftovers, retire
from norm_matters.record.state import STATE_FILE, read_part, read_state, seal_state
from norm_matters.record.tensors import most_bytes, unpack_tensors

MODEL_FILE = "model.safetensors"
TRAINING_FILE = "training.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """What was saved.

    Attributes:
        folder: where it was read from.
        step: optimizer steps done.
        model: parameters and buffers by name, on the CPU.
        training: tensors of the training by name, on the CPU.
        state: everything else; JSON types, so that tuples have become lists.
    """

    folder: Path
    step: int
    model: dict[str, Tensor]
    training: dict[str, Tensor]
    state: dict[str, Any]


def save_checkpoint(
    run: Path,
    *,
    step: int,
    model: Mapping[str, Tensor],
    training: Mapping[str, Tensor],
    state: dict[str, Any],
    best: bool,
    keep: int = FEWEST,
    on_note: Callable[[str], None] = lambda note: None,
) -> Path:
    """Save a checkpoint, read it back, point `last` (and `best`) to it, and remove older ones (see `retention`).

    Whenever the process dies, `last` and `best` lead to complete checkpoints, old or new. The row of the epoch
    belongs into the table before this call: on resuming, rows after the checkpoint are dropped.

    Args:
        run: the run folder.
        step: optimizer steps done; names the folder.
        model: parameters and buffers by name; any dtype, device, memory layout; tensors may share memory.
        training: further tensors by name (optimizer state, random states).
        state: JSON types with text keys.
        best: whether this is the best checkpoint so far.
        keep: how many of the newest stay besides the best; `FEWEST` at least.
        on_note: called with what went wrong and does no harm.

    Returns:
        The checkpoint's folder.

    Raises:
        StorageError: it could not be written; the older checkpoints are intact.
    """
    checkpoints = run / CHECKPOINTS
    with files.storing(checkpoints):
        fault_point("save", step=step)
    files.make_own_folder(checkpoints)
    files.remove_temporaries(checkpoints)
    remove_leftovers(checkpoints)
    mend_best(run)
    folder = free_folder(checkpoints, step)
    write_checkpoint(folder, step=step, model=model, training=training, state=state, best=best)
    _read_back(folder)
    with files.storing(folder):
        fault_point("save.renamed")
    files.replace_link(checkpoints / LAST, folder.name)
    if best:
        files.replace_link(checkpoints / BEST, folder.name)
    for stuck in retire(checkpoints, keep=keep):
        on_note(f"the old checkpoint {stuck} could not be removed; it costs only space")
    return folder


def write_checkpoint(
    folder: Path,
    *,
    step: int,
    model: Mapping[str, Tensor],
    training: Mapping[str, Tensor],
    state: dict[str, Any],
    best: bool,
) -> None:
    """Write a checkpoint as a folder of its own, which appears whole; no link and no other checkpoint is touched.

    Args:
        folder: must not exist yet.
        step, model, training, state, best: as in `save_checkpoint`.

    Raises:
        StorageError: it could not be written; nothing is left behind.
    """
    tensors_of = {MODEL_FILE: _plain(model), TRAINING_FILE: _plain(training)}
    parts = {name: save(tensors, metadata={"format": "pt"}) for name, tensors in tensors_of.items()}
    finite = all(bool(x.isfinite().all()) for x in tensors_of[MODEL_FILE].values() if x.is_floating_point())
    entries = {
        name: {
            "sha256": hashlib.sha256(data).hexdigest(),
            "size": len(data),
            "channels_last": _channels_last(tensors),
        }
        for (name, data), tensors in zip(parts.items(), (model, training), strict=True)
    }
    document = {"step": step, "best": best, "finite": finite, "parts": entries, "state": state}
    files.write_folder(folder, {**parts, STATE_FILE: seal_state(document)})


def load_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint and verify every byte of it.

    Args:
        folder: the checkpoint's own folder; `find_checkpoint` finds that of a run.

    Raises:
        VersionError: a newer norm-matters wrote it.
        UserError: something is missing, cut short or changed; names the file and what is wrong.
        StorageError: a file is there and cannot be read.
    """
    document = read_state(folder)
    model, training = (_unpack(folder / name, document["parts"].get(name)) for name in (MODEL_FILE, TRAINING_FILE))
    return Checkpoint(folder, document["step"], model, training, document["state"])


def check_checkpoint(folder: Path) -> None:
    """Verify every byte of a checkpoint.

    Raises: as `load_checkpoint`.
    """
    document = read_state(folder)
    for name in (MODEL_FILE, TRAINING_FILE):
        _read_verified(folder / name, document["parts"].get(name))


def _read_back(folder: Path) -> None:
    """Verify a checkpoint that has just been written, before any other is given up for it.

    What the disk does to it later, the hashes show when it is read, and then there is the one before.
    """
    try:
        check_checkpoint(folder)
    except UserError as error:
        files.remove_folder(folder)
        raise StorageError(f"cannot write {folder}: what is read back is not what was written: {error}") from error


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU, in plain order in memory; shared memory is copied for each name."""
    plain: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        address = tensor.untyped_storage().data_ptr()
        plain[name] = tensor.clone() if address in seen else tensor
        seen.add(address)
    return plain


def _read_verified(path: Path, entry: Any) -> tuple[bytes, frozenset[str]]:
    """The bytes of a part, verified against its entry in the state; and the names of tensors stored channels last."""
    try:
        sha256, size, channels_last = entry["sha256"], int(entry["size"]), frozenset(entry["channels_last"])
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{path.parent / STATE_FILE} says nothing valid about {path.name}") from error
    with suppress(OSError):  # which reading it tells
        if path.is_file() and (found := path.stat().st_size) > size:
            raise UserError(f"{path} is damaged: it has {found:,} bytes instead of {size:,}")
    data = read_part(path, limit=min(size, most_bytes()))
    if len(data) != size:
        raise UserError(f"{path} is cut short: {len(data)} of {size} bytes")
    if hashlib.sha256(data).hexdigest() != sha256:
        raise UserError(f"{path} is damaged: its contents do not match the SHA-256 in {STATE_FILE}")
    return data, channels_last


def _unpack(path: Path, entry: Any) -> dict[str, Tensor]:
    """The tensors of a part, verified."""
    data, channels_last = _read_verified(path, entry)
    try:
        tensors = unpack_tensors(data)
    except ValueError as error:
        raise UserError(f"{path} is no valid safetensors file: {error}") from error
    for name, tensor in tensors.items():
        if name in channels_last and tensor.ndim in (4, 5):
            tensors[name] = tensor.contiguous(memory_format=_wide_format(tensor))
    return tensors


def _channels_last(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors stored channels last.

    Values do not depend on it, but a resumed run's do: kernels round differently where the layouts of weight,
    gradient and momentum are mixed.
    """
    return [
        name
        for name, tensor in tensors.items()
        if tensor.ndim in (4, 5)
        and not tensor.is_contiguous()
        and tensor.is_contiguous(memory_format=_wide_format(tensor))
    ]


def _wide_format(tensor: Tensor) -> torch.memory_format:
    return torch.channels_last_3d if tensor.ndim == 5 else torch.channels_last
