"""The newest checkpoint of a run that is whole: a damaged one is named, and the one before it is taken."""

import os
import stat
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from norm_matters.core.errors import UserError
from norm_matters.core.reading import kind_of
from norm_matters.record import files
from norm_matters.record.checkpoint import Checkpoint, check_checkpoint, load_checkpoint
from norm_matters.record.folder import BEST, CHECKPOINTS, LAST, checkpoint_folders, link_target
from norm_matters.record.state import VersionError

DAMAGED = "damaged-"
"""What the name of a damaged checkpoint begins with, once it has been set aside."""


class Recovered(NamedTuple):
    """What was found.

    Attributes:
        checkpoint: the newest whole one; None where there is none.
        damaged: names in `checkpoints/` -> what is wrong, one line each, of all that are newer.
        best_lost: whether the best checkpoint is not newer, and damaged or gone.
    """

    checkpoint: Checkpoint | None
    damaged: dict[str, str]
    best_lost: bool = False


def has_checkpoints(run: Path) -> bool:
    """Whether there are checkpoints of a run, or were: a link to one that is gone counts.

    Raises:
        UserError: one may not look.
    """
    checkpoints = run / CHECKPOINTS
    return any(os.path.islink(checkpoints / name) for name in (LAST, BEST)) or (
        kind_of(checkpoints / LAST) == stat.S_IFDIR or bool(checkpoint_folders(checkpoints))
    )


def newest_whole(run: Path) -> Recovered:
    """Read a run's last checkpoint, or where that is damaged the newest that is not. Changes nothing.

    Raises:
        VersionError: a newer norm-matters wrote it; going back to an older one would lose what is whole.
    """
    checkpoints, damaged = run / CHECKPOINTS, dict[str, str]()
    for folder in _candidates(checkpoints, damaged):
        try:
            checkpoint = load_checkpoint(folder)
        except VersionError:
            raise
        except UserError as error:  # StorageError too: what cannot be read is as good as damaged
            damaged[folder.name] = error.problems[0]
            continue
        return Recovered(checkpoint, damaged, _best_is_lost(checkpoints, checkpoint, damaged))
    return Recovered(None, damaged)


def set_aside(run: Path, damaged: Collection[str], taken: Path | None) -> None:
    """Give damaged checkpoints other names, so that the run can go on from the one that was taken.

    Args:
        damaged: names in `checkpoints/`; they may be links to nothing.
        taken: the checkpoint; None for the run's beginning.

    Raises:
        StorageError: the links could not be set.
    """
    checkpoints = run / CHECKPOINTS
    for name in damaged:
        folder = checkpoints / name
        if not folder.is_symlink() and folder.is_dir():
            target, count = checkpoints / f"{DAMAGED}{name}", 1
            while target.exists():
                count += 1
                target = checkpoints / f"{DAMAGED}{name}-{count}"
            with files.storing(target):
                folder.rename(target)
    for name in (LAST, BEST):
        link = checkpoints / name
        if link.is_symlink() and (name in damaged or not link.exists()):
            with files.storing(link):
                link.unlink()
    if taken is not None and taken.name != LAST:
        files.replace_link(checkpoints / LAST, taken.name)


def _candidates(checkpoints: Path, damaged: dict[str, str]) -> list[Path]:
    """The last checkpoint, then all others, the newest first; a link that leads elsewhere is noted as damaged."""
    last = None
    try:
        last = link_target(checkpoints / LAST)
    except UserError as error:
        damaged[LAST] = error.problems[0]
    others = [folder for folder in checkpoint_folders(checkpoints) if folder != last]
    return ([] if last is None else [last]) + others


def _best_is_lost(checkpoints: Path, taken: Checkpoint, damaged: dict[str, str]) -> bool:
    """Whether the best checkpoint cannot be had; a newer one than that taken will be made again."""
    try:
        best = link_target(checkpoints / BEST)
    except UserError as error:
        damaged[BEST] = error.problems[0]
        return True
    if best is None or best == taken.folder or best.name in damaged:
        return False
    with suppress(VersionError):
        try:
            check_checkpoint(best)
        except UserError as error:
            damaged[best.name] = error.problems[0]
            return True
    return False
