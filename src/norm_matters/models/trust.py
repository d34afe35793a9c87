"""Which Python files may be run: those whose user has vouched for what is in them.

A network of one's own is a file of Python: running it is running a program. So it is run when its user names it, on
the command line or in Python, and the SHA-256 of its content is noted then. From then on that very content is run
wherever else it is named: in a configuration, the folder of a run, a checkpoint, the grid of a sweep. A file that
nobody vouched for is refused there, since whoever wrote the configuration may have written the file.
"""

import hashlib
import os
import shlex
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from norm_matters.core.errors import StorageError, UserError
from norm_matters.core.reading import read_regular
from norm_matters.core.yaml import read_yaml
from norm_matters.record.files import append_file, make_folder

LARGEST = 2**24
"""Bytes of the largest Python file, and of the list of those that are trusted."""

_trusted: set[str] = set()
"""SHA-256 of what this process may run, whether it could be noted or not."""


def trusted_list() -> Path:
    """`$XDG_STATE_HOME/norm-matters/trusted-code`, by default below `~/.local/state`: a SHA-256 and a path a line."""
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "norm-matters" / "trusted-code"


def trust_file(path: Path, *, lasting: bool = True) -> str:
    """Vouch for a Python file as it is now: this process and later ones of this user may run it.

    Args:
        lasting: fail where that cannot be noted for later processes.

    Returns:
        The SHA-256 of its content.

    Raises:
        UserError: there is no such file.
        StorageError: it cannot be noted.
    """
    digest = hashlib.sha256(read_code(path)).hexdigest()
    _trusted.add(digest)
    if digest not in _noted():
        place = trusted_list()
        try:
            make_folder(place.parent)
            append_file(place, f"{digest}  {str(path.absolute())!a}\n".encode())
        except StorageError:
            if lasting:
                raise
    return digest


def trust_named_file(options: Mapping[str, Any], overrides: Sequence[str] = ()) -> None:
    """Vouch for the model file that a user's own words name, if they name one.

    Args:
        options, overrides: as for `load_config`; of the command line or of Python, not of a file.
    """
    names = [options.get("model.name")]
    for text in overrides:
        key, _, value = text.partition("=")
        with suppress(UserError):  # of which `load_config` tells
            names.append(read_yaml(value, key) if key == "model.name" else None)
    for name in names:
        if isinstance(name, str) and name.endswith(".py") and Path(name).is_file():
            trust_file(Path(name), lasting=False)


def check_trusted(path: Path, digest: str) -> None:
    """Raise UserError unless somebody vouched for a content.

    Args:
        path: where it was found, for the message.
        digest: the SHA-256 of the content that is about to be run.
    """
    if digest not in _trusted and digest not in _noted():
        raise UserError(
            f"model.name: '{path}' is a program that a file names and that you have not vouched for; read it, and if "
            f"you trust it, say: norm-matters trust {shlex.quote(str(path))}"
        )


def read_code(path: Path) -> bytes:
    """The bytes of a Python file; UserError where it cannot be read."""
    try:
        return read_regular(path, limit=LARGEST)
    except OSError as error:
        raise UserError(f"model.name: {path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"model.name: {path} cannot be read: {error}") from None


def _noted() -> set[str]:
    """What earlier processes noted."""
    with suppress(OSError, ValueError):
        return {line[:64] for line in read_regular(trusted_list(), limit=LARGEST).decode("ascii").splitlines()}
    return set()
