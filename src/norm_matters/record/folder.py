"""The run folder: how it gets its name, and how a checkpoint is found in it. Imports no torch."""

import os
import re
import stat
from pathlib import Path, PurePath
from typing import Any

from norm_matters.core.errors import UserError
from norm_matters.core.json import MAX_BYTES, parse_json
from norm_matters.core.names import RULE, is_plain_name
from norm_matters.core.reading import kind_of, read_regular
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
        if name is not None and again and not kind_of(folder / PROVENANCE_FILE):
            break
        if name is not None:
            hint = "or continue it with --resume" if is_run(folder) else "or remove it: no run is recorded in it"
            raise UserError(f"name: '{name}' is taken ({folder}); choose another, {hint}")
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
    return max(_begun(output, launch, settings), default=(0, "", None))[2]


def launch_entry(output: Path, launch: str, settings: str) -> dict[str, Any]:
    """What a new run records of its launch, so that `find_begun` finds it: a number orders the runs of one launch.

    Args: as in `find_begun`.
    """
    number = 1 + max((number for number, _, _ in _begun(output, launch, settings)), default=0)
    return {"id": launch, "settings": settings, "number": number}


def _begun(output: Path, launch: str, settings: str) -> list[tuple[int, str, Path]]:
    """Number, start and folder of the runs of a launch; runs from before these were numbered have 0."""
    begun: list[tuple[int, str, Path]] = []
    try:
        paths = list(output.glob(f"*/{PROVENANCE_FILE}"))
    except OSError:
        return []  # to write there fails, and says why
    for path in paths:
        try:
            found = parse_json(read_regular(path, limit=MAX_BYTES))
            of = found["launch"]
            if (of["id"], of["settings"]) == (launch, settings) and is_run(path.parent):
                begun.append((int(of.get("number", 0)), str(found["started"]), path.parent))
        except (OSError, ValueError, LookupError, TypeError, OverflowError, UserError):
            continue  # another run's, from before, or damaged
    return begun


def is_run(path: Path) -> bool:
    """Whether a folder is a run's: it has the two files every run starts with.

    Raises:
        UserError: one may not look into it.
    """
    return all(kind_of(path / name) == stat.S_IFREG for name in ("config.yaml", PROVENANCE_FILE))


def check_links(run: Path) -> None:
    """Raise UserError where an entry of a run's folder is a link, which could lead a resumed run to write elsewhere.

    `last` and `best` may be, see `link_target`; and what a kill has left, which is removed without being followed.
    """
    checkpoints = run / CHECKPOINTS
    entries = [*_entries(run), *(path for path in _entries(checkpoints) if path.name not in (LAST, BEST))]
    for path in entries:
        if path.is_symlink() and not path.name.startswith(TEMPORARY):
            raise UserError(f"{path} is a link; a run's files are its own: put what it leads to in its place")


def _entries(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir()) if kind_of(folder) == stat.S_IFDIR else []
    except OSError as error:
        raise UserError(f"'{folder}' cannot be read: {error.strerror}") from error


def find_checkpoint(target: Path, prefer: str = BEST) -> Path:
    """Return the checkpoint folder that a user's path means.

    Args:
        target: a run folder, or a checkpoint folder, or a link to one. One that looks like a checkpoint's is returned
            even if its files are damaged: `load_checkpoint` says which.
        prefer: `best` or `last`: which one of a run.

    Raises:
        UserError: it is neither, or a run without a checkpoint, or one may not look into it.
    """
    if is_run(target):
        folder = latest_checkpoint(target, prefer)
        if folder is None:
            raise UserError(f"'{target}' has no checkpoint yet: the run ended before its first epoch did")
        return folder
    if kind_of(target / STATE_FILE) == stat.S_IFREG or STEP_FOLDER.fullmatch(target.name):
        return target.resolve()
    what = "is neither a run folder nor a checkpoint" if kind_of(target) else "does not exist"
    raise UserError(f"'{target}' {what}")


def latest_checkpoint(run: Path, prefer: str = LAST) -> Path | None:
    """Return the folder of a run's `last` or `best` checkpoint; None where nothing was saved yet.

    The folder may be damaged or even missing (a link to nothing): reading it says so, and a run that has lost its
    checkpoint is never taken for one that had none.
    """
    assert prefer in (LAST, BEST)
    checkpoints = run / CHECKPOINTS
    # Runs may have been copied without their links.
    last = link_target(checkpoints / LAST) or next(iter(checkpoint_folders(checkpoints)), None)
    if last is None or prefer == LAST or marked_best(last):
        return last
    return link_target(checkpoints / BEST) or last


def checkpoint_folders(checkpoints: Path) -> list[Path]:
    """The folders of checkpoints, the newest first."""
    folders = [folder for folder in checkpoints.glob("step-*") if STEP_FOLDER.fullmatch(folder.name)]
    return sorted(folders, key=checkpoint_age, reverse=True)


def checkpoint_age(folder: Path) -> tuple[int, int]:
    """The step of a checkpoint's folder, and how often that step has been saved by then."""
    _, step, *again = folder.name.split("-")
    return int(step), int(again[0]) if again else 1


def link_target(link: Path) -> Path | None:
    """Where `last` or `best` leads; itself if it is a folder (a copy made with `cp -L`); None if there is nothing.

    Raises:
        UserError: it leads out of the folder that it is in, or one may not look.
    """
    if os.path.islink(link):
        target = os.readlink(link)
        if not STEP_FOLDER.fullmatch(target):
            raise UserError(f"{link} leads to {target!r:.80}, which is no checkpoint beside it; remove the link")
        return link.parent / target
    return link if kind_of(link) == stat.S_IFDIR else None


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
