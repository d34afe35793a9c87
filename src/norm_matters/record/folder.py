"""The run folder: how it gets its name, and how a checkpoint is found in it. Imports no torch."""

import os
import re
from pathlib import Path, PurePath

from norm_matters.core.errors import UserError
from norm_matters.core.json import MAX_BYTES, parse_json
from norm_matters.core.names import RULE, is_plain_name
from norm_matters.core.reading import read_regular
from norm_matters.record.files import TEMPORARY, claim_folder, make_folder
from norm_matters.record.state import STATE_FILE, read_state

PROVENANCE_FILE = "provenance.json"
CHECKPOINTS = "checkpoints"
LAST = "last"
BEST = "best"
STEP_FOLDER = re.compile(r"step-\d{9,}(-\d+)?")


def claim_run_folder(output: Path, name: str | None, default: str, *, again: bool = False) -> Path:
    """Make a run folder of its own; `mkdir` is the claim, so that runs started together never share one.

    Args:
        output: folder of the runs; made where it is missing.
        name: the user's name for the run, or None.
        default: name to use otherwise, with `-2`, `-3` ... where it is taken.
        again: the user's name may be that of a folder in which no run was recorded yet: an earlier attempt was ended
            right after its claim.

    Returns:
        The new, empty folder.

    Raises:
        UserError: `name` is taken, or no name of a folder inside `output`; nothing was made.
        StorageError: the folder could not be made.
    """
    base = default if name is None else name
    if not is_plain_name(base):
        raise UserError(f"name: {base!r} names no run; use {RULE}")
    make_folder(output)
    folder, count = output / base, 1
    while not claim_folder(folder):
        if name is not None and again and not (folder / PROVENANCE_FILE).exists():
            break
        if name is not None:
            raise UserError(f"name: '{name}' is taken ({folder}); choose another, or continue it with --resume")
        count += 1
        folder = output / f"{base}-{count}"
    return folder


def default_name(model: str, norm: str | None, dataset: str, seed: int) -> str:
    """Name a run after what it does: `resnet20-topk-k10-cifar10-s0`.

    Args:
        model: a name, `timm:NAME` or the path of a user's file, of which the stem is taken.
        norm: a spec, or None for the model's own norm: `default`.
        dataset: a name, or `imagefolder:DIR` and the like, of which the last part of the path is taken.
    """
    if model.endswith(".py"):
        model = PurePath(model).stem
    words = "-".join(_plain(text) for text in (model, norm or "default", dataset))
    # Room for the seed and for a `-2`, within the 128 characters of a name.
    return f"{words[:96]}-s{seed}".lstrip("-._")


def find_begun(output: Path, launch: str, settings: str) -> Path | None:
    """The run that an earlier attempt of a launch has begun, the latest if there are several; None for none.

    Args:
        output: folder of the runs.
        launch: the launch's name.
        settings: a digest of the settings that it was started with.
    """
    begun: list[tuple[str, Path]] = []
    for path in output.glob(f"*/{PROVENANCE_FILE}"):
        try:
            found = parse_json(read_regular(path, limit=MAX_BYTES))
            if found["launch"] == {"id": launch, "settings": settings} and is_run(path.parent):
                begun.append((found["started"], path.parent))
        except (OSError, ValueError, KeyError, TypeError):
            continue  # another run's, from before, or damaged
    return max(begun)[1] if begun else None


def is_run(path: Path) -> bool:
    """Whether a folder is a run's: it has the two files every run starts with."""
    return (path / "config.yaml").is_file() and (path / PROVENANCE_FILE).is_file()


def check_links(run: Path) -> None:
    """Raise UserError where an entry of a run's folder is a link, which could lead a resumed run to write elsewhere.

    `last` and `best` may be, see `link_target`; and what a kill has left, which is removed without being followed.
    """
    checkpoints = run / CHECKPOINTS
    entries = [*run.iterdir(), *(path for path in _entries(checkpoints) if path.name not in (LAST, BEST))]
    for path in entries:
        if path.is_symlink() and not path.name.startswith(TEMPORARY):
            raise UserError(f"{path} is a link; a run's files are its own: put what it leads to in its place")


def _entries(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


def find_checkpoint(target: Path, prefer: str = BEST) -> Path:
    """Return the checkpoint folder that a user's path means.

    Args:
        target: a run folder, or a checkpoint folder, or a link to one. One that looks like a checkpoint's is returned
            even if its files are damaged: `load_checkpoint` says which.
        prefer: `best` or `last`: which one of a run.

    Raises:
        UserError: it is neither, or a run without a checkpoint.
    """
    if is_run(target):
        folder = latest_checkpoint(target, prefer)
        if folder is None:
            raise UserError(f"'{target}' has no checkpoint yet: the run ended before its first epoch did")
        return folder
    if (target / STATE_FILE).is_file() or STEP_FOLDER.fullmatch(target.name):
        return target.resolve()
    what = "is neither a run folder nor a checkpoint" if target.exists() else "does not exist"
    raise UserError(f"'{target}' {what}")


def latest_checkpoint(run: Path, prefer: str = LAST) -> Path | None:
    """Return the folder of a run's `last` or `best` checkpoint; None where nothing was saved yet.

    The folder may be damaged or even missing (a link to nothing): reading it says so, and a run that has lost its
    checkpoint is never taken for one that had none.
    """
    assert prefer in (LAST, BEST)
    checkpoints = run / CHECKPOINTS
    last = link_target(checkpoints / LAST) or _newest(checkpoints)
    if last is None or prefer == LAST or marked_best(last):
        return last
    return link_target(checkpoints / BEST) or last


def link_target(link: Path) -> Path | None:
    """Where `last` or `best` leads; itself if it is a folder (a copy made with `cp -L`); None if there is nothing.

    Raises:
        UserError: it leads out of the folder that it is in.
    """
    if link.is_symlink():
        target = os.readlink(link)
        if not STEP_FOLDER.fullmatch(target):
            raise UserError(f"{link} leads to {target!r:.80}, which is no checkpoint beside it; remove the link")
        return link.parent / target
    return link if link.is_dir() else None


def marked_best(folder: Path) -> bool:
    """Whether a checkpoint was the best so far when it was saved.

    `last` moves before `best`: after a kill in between, this mark is all that tells the best checkpoint.
    """
    try:
        return read_state(folder)["best"]
    except UserError:
        return False


def _plain(text: str) -> str:
    """The text in the letters of a run's name: `topk:k=10` -> `topk-k10`, `imagefolder:/data/cats` -> `...-cats`."""
    kind, _, rest = text.rpartition(":") if "/" in text else ("", "", text)
    text = f"{kind}-{PurePath(rest).name}" if kind else PurePath(rest).name
    return re.sub(r"[^A-Za-z0-9._]+", "-", text.replace("=", "")).strip("-._") or "run"


def _newest(checkpoints: Path) -> Path | None:
    """The checkpoint of the highest step, for runs copied without their links."""
    folders = [folder for folder in checkpoints.glob("step-*") if STEP_FOLDER.fullmatch(folder.name)]
    return max(folders, key=lambda folder: folder.name, default=None)
