"""What has been packed so far: a line for each shard that is whole, so that a packing that was cut off goes on."""

import hashlib
import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from norm_matters.core.errors import UserError
from norm_matters.core.json import parse_json
from norm_matters.datasets.manifest import JOURNAL
from norm_matters.record.files import append_file, write_file


class Done(BaseModel):
    """A shard that was written.

    Attributes:
        part: whose images it has.
        name: of the file.
        start: place of its first image in the order of the part.
        taken: images of that order that it covers, with those that were skipped.
        images: that are in it.
        skipped: what was wrong with the others.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    part: str
    name: str
    start: int
    taken: int
    images: int
    bytes: int
    sha256: str
    skipped: list[str]

    def matches(self, folder: Path) -> bool:
        """Whether the file is there, as it was written."""
        file = folder / self.name
        try:
            return file.stat().st_size == self.bytes and file_sha256(file) == self.sha256
        except OSError:
            return False


def file_sha256(file: Path) -> str:
    """SHA-256 of a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def begin_journal(folder: Path, plan: dict[str, Any], command: list[str]) -> tuple[list[Done], list[str]]:
    """Begin a packing in a folder, or go on with one.

    Returns:
        The shards that are done, and the command that began.

    Raises:
        UserError: the folder holds a packing of something else, or anything else.
    """
    file = folder / JOURNAL
    try:
        # The last line is whole, or else without its end: each is written at once.
        lines = file.read_text(encoding="utf-8").split("\n")[:-1]
    except FileNotFoundError:
        strangers = sorted(path.name for path in folder.iterdir() if not path.name.startswith(".tmp-"))
        if strangers:
            raise UserError(f"{folder} is not empty (it has {strangers[0]}); choose a new folder") from None
        lines = []
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read: {error}") from None
    if not lines:
        write_file(file, json.dumps({"plan": plan, "command": command}) + "\n")
        return [], command
    try:
        head = parse_json(lines[0])
        before, command = head["plan"], [str(argument) for argument in head["command"]]
        done = [Done.model_validate_json(line) for line in lines[1:]]
    except (ValueError, KeyError, TypeError, ValidationError):
        raise UserError(f"{file} is damaged; remove {folder} and pack anew") from None
    check_plan(folder, before, plan)
    write_file(file, "".join(f"{line}\n" for line in lines))
    return done, command


def note_done(folder: Path, done: Done) -> None:
    """Add a shard."""
    append_file(folder / JOURNAL, (done.model_dump_json() + "\n").encode())


def check_plan(folder: Path, before: Any, plan: dict[str, Any]) -> None:
    """Raise UserError where a folder was packed from something else, or in another way."""
    for key, value in plan.items():
        old = before.get(key) if isinstance(before, dict) else None
        if old != value:
            raise UserError(f"{folder} holds another packing: its {key} is {old!r}, not {value!r}; choose a new folder")
