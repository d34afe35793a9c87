"""Where downloaded datasets are kept, and how they get there."""

import os
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.error import URLError

from norm_matters.core.errors import StorageError, UserError

if TYPE_CHECKING:
    from norm_matters.core.config import DataConfig


def data_folder(data: "DataConfig") -> Path:
    """The folder that datasets are kept in: `data.dir`, `$NORM_MATTERS_DATA`, or `~/.cache/norm-matters`."""
    return Path(data.dir or os.environ.get("NORM_MATTERS_DATA") or "~/.cache/norm-matters").expanduser()


def missing(path: Path, *, fetched: bool = True) -> UserError:
    """The error for a file that is not there, with the options that help.

    Args:
        fetched: whether `--download` is one of them.
    """
    hint = "--download fetches it, " if fetched else ""
    return UserError(f"data.dir: {path} is missing; {hint}--data-dir names the folder that has it")


def download(class_name: str, folder: Path, **options: str) -> None:
    """Fetch a dataset with torchvision, which checks what it gets against known checksums.

    Args:
        class_name: in torchvision.datasets.
        folder: kept below this one, under torchvision's names.
        options: further arguments of that class.

    Raises:
        UserError: where the network fails or sends something else; StorageError where the folder cannot be written.
    """
    from norm_matters.core.torchvision import torchvision

    try:
        getattr(torchvision.datasets, class_name)(str(folder), download=True, **options)
    except (URLError, ConnectionError, TimeoutError, RuntimeError, EOFError) as error:
        raise UserError(f"--download: {class_name} could not be fetched: {' '.join(str(error).split())}") from error
    except OSError as error:
        raise StorageError(f"--download: {folder} cannot be written: {error.strerror or error}") from error
