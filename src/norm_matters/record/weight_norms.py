"""`weight_norms/epoch-0001.safetensors` ...: the norms of all output channels of a run's weights. Imports no torch.

One file per epoch that is done. Each tensor bears the name of a layer and has the shape (rows, channels): with
`train.record_norms=step` one row before each step of the epoch, and then in any case one at its end.
"""

import hashlib
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import numpy as np

from norm_matters.core.errors import StorageError, UserError
from norm_matters.record.files import make_folder, remove_temporaries, write_file
from norm_matters.record.state import read_part
from norm_matters.record.tensors import MAX_HEADER, check_header, most_bytes

NORMS_FOLDER = "weight_norms"
_FILE = re.compile(r"epoch-(\d{4,})\.safetensors")


def write_weight_norms(run: Path, epoch: int, layers: Mapping[str, np.ndarray]) -> None:
    """Write the norms of an epoch; a file of that epoch is replaced.

    Args:
        epoch: from 1.
        layers: layer -> (rows, channels), float32 or float64.

    Raises:
        StorageError: it could not be written.
    """
    from safetensors.numpy import save

    folder = run / NORMS_FOLDER
    make_folder(folder)
    data = save({name: np.ascontiguousarray(rows) for name, rows in layers.items()}, metadata={"epoch": str(epoch)})
    write_file(folder / f"epoch-{epoch:04d}.safetensors", data)


def read_weight_norms(run: Path) -> dict[int, tuple[dict[str, np.ndarray], str]]:
    """The norms of all epochs of a run.

    Returns:
        epoch (from 1) -> layer -> (rows, channels); and the SHA-256 of the file.

    Raises:
        UserError: there are none, or a file is damaged; names it.
        StorageError: a file is there and cannot be read.
    """
    files = _files(run)
    if not files:
        raise UserError(
            f"'{run}' has no recorded norms: there is no {NORMS_FOLDER}/; train it with train.record_norms=epoch"
        )
    return {epoch: _read(path) for epoch, path in sorted(files.items())}


def trim_weight_norms(run: Path, epochs: int) -> None:
    """Remove the norms of epochs after the last that counts, and what a killed process left.

    Args:
        epochs: how many are done by the checkpoint from which the run goes on.
    """
    for epoch, path in _files(run).items():
        if epoch > epochs:
            # Harmless where it fails: the epoch is written again.
            with suppress(OSError):
                path.unlink()
    if (run / NORMS_FOLDER).is_dir():
        remove_temporaries(run / NORMS_FOLDER)


def _files(run: Path) -> dict[int, Path]:
    try:
        found = [(path, _FILE.fullmatch(path.name)) for path in (run / NORMS_FOLDER).iterdir()]
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise StorageError(f"cannot read {run / NORMS_FOLDER}: {error.strerror or error}") from error
    return {int(match[1]): path for path, match in found if match}


def _read(path: Path) -> tuple[dict[str, np.ndarray], str]:
    from safetensors import SafetensorError
    from safetensors.numpy import load

    data = read_part(path, limit=most_bytes())
    try:
        check_header(data[: 8 + MAX_HEADER], len(data))
        layers = load(data)
    except (SafetensorError, ValueError, KeyError) as error:
        raise UserError(f"{path} is damaged: {error}") from error
    rows = {len(norms) for norms in layers.values() if norms.ndim == 2}
    for name, norms in layers.items():
        fits = norms.ndim == 2 and len(norms) and len(rows) == 1 and norms.dtype.kind == "f"
        if not (fits and np.all(np.isfinite(norms)) and np.all(norms >= 0)):
            raise UserError(f"{path} is damaged: what it has for layer '{name}' are no norms")
    return layers, hashlib.sha256(data).hexdigest()
