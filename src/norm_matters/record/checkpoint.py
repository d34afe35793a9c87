"""Checkpoints: folders that appear whole, name their own damage, and never hold a pickle.

`checkpoints/step-%09d/` holds `model.safetensors` (loads anywhere), `training.safetensors` (optimizer, random
states) and `state.json` (everything else, and the SHA-256 of the two). `last` and `best` are links to such folders.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from norm_matters.core.errors import UserError
from norm_matters.record import files
from norm_matters.record.folder import BEST, CHECKPOINTS, LAST, STEP_FOLDER, latest_checkpoint, link_target, marked_best
from norm_matters.record.state import STATE_FILE, read_part, read_state, seal_state

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
) -> Path:
    """Save a checkpoint, point `last` (and `best`) to it, and remove those that neither points to.

    Whenever the process dies, `last` and `best` lead to complete checkpoints, old or new. The row of the epoch
    belongs into the table before this call: on resuming, rows after the checkpoint are dropped.

    Args:
        run: the run folder.
        step: optimizer steps done; names the folder.
        model: parameters and buffers by name; any dtype, device, memory layout; tensors may share memory.
        training: further tensors by name (optimizer state, random states).
        state: JSON types with text keys.
        best: whether this is the best checkpoint so far.

    Returns:
        The checkpoint's folder.

    Raises:
        StorageError: it could not be written; the older checkpoints are intact.
    """
    checkpoints = run / CHECKPOINTS
    files.make_folder(checkpoints)
    files.remove_temporaries(checkpoints)
    _mend_best(run)
    folder = _free_folder(checkpoints, step)
    write_checkpoint(folder, step=step, model=model, training=training, state=state, best=best)
    files.replace_link(checkpoints / LAST, folder.name)
    if best:
        files.replace_link(checkpoints / BEST, folder.name)
    _remove_unlinked(checkpoints)
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
    parts = {MODEL_FILE: _pack(model), TRAINING_FILE: _pack(training)}
    entries = {
        name: {
            "sha256": hashlib.sha256(data).hexdigest(),
            "size": len(data),
            "channels_last": _channels_last(tensors),
        }
        for (name, data), tensors in zip(parts.items(), (model, training), strict=True)
    }
    document = {"step": step, "best": best, "parts": entries, "state": state}
    files.write_folder(folder, {**parts, STATE_FILE: seal_state(document)})


def load_checkpoint(folder: Path) -> Checkpoint:
    """Read a checkpoint and verify every byte of it.

    Args:
        folder: the checkpoint's own folder; `find_checkpoint` finds that of a run.

    Raises:
        UserError: something is missing, cut short or changed; names the file and what is wrong.
        StorageError: a file is there and cannot be read.
    """
    document = read_state(folder)
    model, training = (_unpack(folder / name, document["parts"].get(name)) for name in (MODEL_FILE, TRAINING_FILE))
    return Checkpoint(folder, document["step"], model, training, document["state"])


def _pack(tensors: Mapping[str, Tensor]) -> bytes:
    """The tensors as a safetensors file, in plain order in memory; shared memory is written once per name."""
    plain: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        address = tensor.untyped_storage().data_ptr()
        plain[name] = tensor.clone() if address in seen else tensor
        seen.add(address)
    return save(plain, metadata={"format": "pt"})


def _unpack(path: Path, entry: Any) -> dict[str, Tensor]:
    """Read a part back, verified against its entry in the state."""
    try:
        sha256, size, channels_last = entry["sha256"], int(entry["size"]), list(entry["channels_last"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path.parent / STATE_FILE} says nothing valid about {path.name}") from error
    data = read_part(path, limit=size)
    if len(data) != size:
        raise UserError(f"{path} is cut short: {len(data)} of {size} bytes")
    if hashlib.sha256(data).hexdigest() != sha256:
        raise UserError(f"{path} is damaged: its contents do not match the SHA-256 in {STATE_FILE}")
    try:
        tensors = load(data)
    except (SafetensorError, ValueError) as error:
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


def _linked(checkpoints: Path) -> set[str]:
    """Names that `last` and `best` lead to."""
    targets = (link_target(checkpoints / name) for name in (LAST, BEST))
    return {target.name for target in targets if target is not None}


def _mend_best(run: Path) -> None:
    """Finish what a kill between the replacements of `last` and `best` left undone, before `last` moves on."""
    last, best = latest_checkpoint(run, LAST), run / CHECKPOINTS / BEST
    # A copy that followed the links has a folder named `last`, and one named `best` that is right.
    if last is not None and STEP_FOLDER.fullmatch(last.name) and last != link_target(best) and marked_best(last):
        files.replace_link(best, last.name)


def _remove_unlinked(checkpoints: Path) -> None:
    linked = _linked(checkpoints)
    for folder in checkpoints.glob("step-*"):
        if STEP_FOLDER.fullmatch(folder.name) and folder.name not in linked:
            files.remove_folder(folder)


def _free_folder(checkpoints: Path, step: int) -> Path:
    """Where to save this step.

    A folder of that name that no link leads to was left by a kill and is removed. One that a link leads to is kept
    until the new one is complete, which gets `-2` after its name.
    """
    linked = _linked(checkpoints)
    folder, count = checkpoints / f"step-{step:09d}", 1
    while folder.name in linked:
        count += 1
        folder = checkpoints / f"step-{step:09d}-{count}"
    files.remove_folder(folder)
    return folder
