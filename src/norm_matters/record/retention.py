"""Which checkpoints of a run stay: the newest, the best, and the newest that is all finite. Imports no torch."""

from pathlib import Path

from norm_matters.core.errors import StorageError, UserError
from norm_matters.record import files
from norm_matters.record.folder import (
    BEST,
    CHECKPOINTS,
    LAST,
    STEP_FOLDER,
    checkpoint_age,
    checkpoint_folders,
    latest_checkpoint,
    link_target,
    marked_best,
)
from norm_matters.record.state import read_state

FEWEST = 2
"""Checkpoints that are kept at least: a damaged one has one before it."""


def free_folder(checkpoints: Path, step: int) -> Path:
    """Where to save a step: what was saved at this step before is newer than nothing, and gets no new contents."""
    ages = map(checkpoint_age, checkpoint_folders(checkpoints))
    same = [count for saved, count in ages if saved == step]
    name = f"step-{step:09d}"
    return checkpoints / (f"{name}-{max(same) + 1}" if same else name)


def remove_leftovers(checkpoints: Path) -> None:
    """Remove what is newer than `last`: a process died before it linked to it, or the run was taken back."""
    last = link_target(checkpoints / LAST)
    if last is None or not STEP_FOLDER.fullmatch(last.name):
        return
    best = link_target(checkpoints / BEST)
    for folder in checkpoint_folders(checkpoints):
        if checkpoint_age(folder) > checkpoint_age(last) and folder != best:
            files.remove_folder(folder)


def mend_best(run: Path) -> None:
    """Finish what a kill between the replacements of `last` and `best` left undone, before `last` moves on."""
    last, best = latest_checkpoint(run, LAST), run / CHECKPOINTS / BEST
    # A copy that followed the links has a folder named `last`, and one named `best` that is right.
    if last is not None and STEP_FOLDER.fullmatch(last.name) and last != link_target(best) and marked_best(last):
        files.replace_link(best, last.name)


def retire(checkpoints: Path, *, keep: int) -> list[Path]:
    """Remove checkpoints that are no longer needed; the newest must have been verified.

    Args:
        keep: how many of the newest stay, besides the best and the newest that is finite.

    Returns:
        Those that could not be removed, which costs only space.
    """
    folders = checkpoint_folders(checkpoints)
    stay = {folder.name for folder in folders[: max(keep, FEWEST)]}
    stay |= {target.name for name in (LAST, BEST) if (target := link_target(checkpoints / name)) is not None}
    finite = next((folder.name for folder in folders if is_finite(folder)), None)
    return [
        folder
        for folder in folders
        if folder.name not in stay and folder.name != finite and not files.remove_folder(folder)
    ]


def is_finite(folder: Path) -> bool:
    """Whether all numbers of the network were finite when it was saved; not so where that cannot be read."""
    try:
        return read_state(folder).get("finite", True)
    except (UserError, StorageError):
        return False
