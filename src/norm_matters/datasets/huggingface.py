"""Datasets of the Hugging Face hub that lie in its local cache: parquet files, or what the `datasets` library made."""

import hashlib
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import numpy as np

from norm_matters.core.errors import UserError
from norm_matters.datasets.entry import DatasetEntry, Source, numbered_classes
from norm_matters.datasets.manifest import read_json
from norm_matters.datasets.order import WINDOW
from norm_matters.datasets.parquet import LABEL_COLUMNS, find_files, read_files
from norm_matters.datasets.stored import LARGE, Store, StoredImages

if TYPE_CHECKING:
    from norm_matters.core.config import DataConfig

VAL_NAMES = ("validation", "test")


def read_huggingface(data: "DataConfig", argument: str, *, decode: bool = True) -> Source:
    """Read a dataset of images from the local cache of the Hugging Face hub; no network without `data.download`.

    The parquet files of its newest snapshot are read as those of `parquet:` are; where there are none, the arrow files
    that `datasets.load_dataset` left.

    Args:
        argument: ORG/NAME, or NAME alone; and `:CONFIG` where it has several configurations.
        decode: whether small images are held in memory decoded.

    Raises:
        UserError: it is not in the cache, or has no part "train" of images with labels.
    """
    name, _, config = argument.partition(":")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or ".." in name:
        raise UserError(f"dataset 'hf:{argument}': '{name}' is no name of a dataset such as uoft-cs/cifar10")
    if data.download:
        _fetch(name)
    hub = _home("HF_HUB_CACHE", "hub") / f"datasets--{name.replace('/', '--')}"
    snapshot = _snapshot(hub)
    folders = _parquet_folders(snapshot, config) if snapshot else []
    if len(folders) > 1:
        known = ", ".join(sorted(os.path.relpath(folder, snapshot) for folder in folders))
        raise UserError(f"dataset 'hf:{argument}': it has several configurations ({known}); name one: hf:{name}:CONFIG")
    if folders:
        return read_files(*find_files(folders[0]), decode=decode)
    prepared = _home("HF_DATASETS_CACHE", "datasets") / _prepared_name(name)
    if folder := _prepared_folder(prepared, config, argument):
        return _read_arrow(folder, argument)
    raise UserError(
        f"dataset 'hf:{argument}': there is none with train*.parquet in {hub}, nor arrow files in {prepared}; "
        "--download fetches it, HF_HOME names another cache"
    )


def _home(variable: str, folder: str) -> Path:
    """A cache's folder, where the Hugging Face libraries look for it."""
    if place := os.environ.get(variable):
        return Path(place).expanduser()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    return Path(os.environ.get("HF_HOME") or cache / "huggingface").expanduser() / folder


def _fetch(name: str) -> None:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise UserError("--download: hf: needs huggingface_hub: pip install huggingface_hub") from None
    try:
        snapshot_download(name, repo_type="dataset", allow_patterns=["*.parquet", "*.md"])
    except Exception as error:  # its errors, and those of three libraries below it
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"--download: hf:{name} could not be fetched: {reason[:300]}") from None


def _snapshot(hub: Path) -> Path | None:
    """The snapshot that `main` stands for, or else the newest."""
    try:
        commit = (hub / "refs" / "main").read_text().strip()
    except (OSError, ValueError):
        commit = ""
    if re.fullmatch(r"[0-9a-f]{7,64}", commit) and (hub / "snapshots" / commit).is_dir():
        return hub / "snapshots" / commit
    return max((hub / "snapshots").glob("*"), key=lambda folder: folder.stat().st_mtime_ns, default=None)


def _parquet_folders(snapshot: Path, config: str) -> list[Path]:
    """The folders of a snapshot that have train*.parquet; with a configuration, the one of that name."""
    found = sorted({file.parent for file in snapshot.rglob("train*.parquet")})
    if config:
        return [folder for folder in found if folder.name == config][:1]
    return found


def _prepared_name(name: str) -> str:
    """How the `datasets` library calls a dataset's folder: some-org/TinyPhotos is some-org___tiny_photos."""
    organisation, slash, own = name.rpartition("/")
    own = re.sub(r"([a-z\d])([A-Z])", r"\1_\2", re.sub(r"([A-Z]+)([A-Z][a-z])", r"\1_\2", own)).lower()
    return f"{organisation}___{own}" if slash else own


def _prepared_folder(prepared: Path, config: str, argument: str) -> Path | None:
    """The folder of arrow files, CONFIG/VERSION/HASH, that was written last."""
    found = [file.parent for file in prepared.glob("*/*/*/dataset_info.json")]
    configs = sorted({folder.parent.parent.name for folder in found})
    if config:
        found = [folder for folder in found if folder.parent.parent.name == config]
    elif len(configs) > 1:
        raise UserError(f"dataset 'hf:{argument}': it has several configurations ({', '.join(configs)}); name one")
    return max(found, key=lambda folder: folder.stat().st_mtime_ns, default=None)


def _read_arrow(folder: Path, argument: str) -> Source:
    """Read the arrow files of a folder."""
    info = read_json(folder / "dataset_info.json")
    parts: dict[str, list[Path]] = {}
    for file in sorted(folder.glob("*.arrow")):
        match = re.fullmatch(r"(?:.*-)?(train|validation|test)(?:-\d+-of-\d+)?\.arrow", file.name)
        if match:
            parts.setdefault(match[1], []).append(file)
    if "train" not in parts:
        raise UserError(f"dataset 'hf:{argument}': {folder} has no arrow files of a part 'train'")
    val_name = next((name for name in VAL_NAMES if name in parts), "")
    names = ["train", *([val_name] if val_name else [])]
    images = [_ArrowFiles.images(parts[name]) for name in names]
    classes = None
    try:
        feature = next(info["features"][column] for column in LABEL_COLUMNS if column in info["features"])
        classes = tuple(map(str, feature["names"]))
    except (KeyError, TypeError, StopIteration):
        pass
    classes = classes or numbered_classes(max(int(part.labels.max(initial=-1)) for part in images))
    val = images[1] if val_name else None
    return Source(train=images[0], val=val, classes=classes, val_name=val_name, pad=4)


@final
class _ArrowFiles(Store):
    """Images in arrow files, which are mapped into memory: the system reads what is asked for.

    Args:
        files: in the order of the images.
        column: of {bytes, path}.
        batches: (B, 3): number of the file, of the batch in it, and its rows.
    """

    def __init__(self, files: Sequence[Path], column: str, batches: np.ndarray) -> None:
        self.files, self.column, self.batches = files, column, batches
        self.ends = np.cumsum(batches[:, 2], dtype=np.int64)
        self.blocks, self.window = None, WINDOW
        if sum(file.stat().st_size for file in files) >= LARGE:
            self.blocks = np.repeat(np.arange(len(batches)), batches[:, 2])
        self._tables: dict[int, list[Any]] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tables": {}}

    @classmethod
    def images(cls, files: Sequence[Path]) -> StoredImages:
        """All images of some files."""
        labels, batches, columns = [], list[tuple[int, int, int]](), ("", "")
        for number, file in enumerate(files):
            for place, batch in enumerate(_batches(file)):
                columns = _image_and_label(batch.schema, file)
                _validate(batch, columns, file)
                try:
                    labels.append(
                        batch.column(columns[1]).to_numpy(zero_copy_only=False).astype(np.int64, casting="safe")
                    )
                except (TypeError, ValueError):
                    raise UserError(f"{file}: column '{columns[1]}' holds other than whole numbers") from None
                batches.append((number, place, batch.num_rows))
        if not batches:
            raise UserError(f"{files[0]} has no rows")
        return StoredImages(cls(files, columns[0], np.array(batches)), np.concatenate(labels))

    def read(self, number: int) -> bytes:
        """The bytes of one image."""
        place = int(np.searchsorted(self.ends, number, side="right"))
        file, batch, rows = self.batches[place].tolist()
        if file not in self._tables:
            self._tables[file] = _batches(self.files[file])
        cell = self._tables[file][batch].column(self.column)[number - int(self.ends[place]) + rows].as_py()
        if not cell or not cell["bytes"]:
            raise UserError(f"{self.name(number)} has no bytes in column '{self.column}'")
        return cell["bytes"]

    def name(self, number: int) -> str:
        """The file and the row."""
        place = int(np.searchsorted(self.ends, number, side="right"))
        first = int(np.searchsorted(self.batches[:, 0], self.batches[place, 0]))
        row = number - (int(self.ends[first - 1]) if first else 0)
        return f"{self.files[self.batches[place, 0]]}, row {row}"

    def digest(self) -> str:
        """SHA-256 of the files' names and sizes, and of the rows of their batches."""
        digest = hashlib.sha256(np.ascontiguousarray(self.batches, dtype=np.int64).tobytes())
        for file in self.files:
            digest.update(f"{file.name}\0{file.stat().st_size}\0".encode(errors="surrogateescape"))
        return digest.hexdigest()


def _batches(file: Path) -> list[Any]:
    """The record batches of an arrow file, mapped into memory."""
    try:
        import pyarrow as pa
    except ImportError:
        raise UserError("hf: needs pyarrow: pip install 'norm-matters[parquet]'") from None
    try:
        with pa.ipc.open_stream(pa.memory_map(str(file))) as reader:
            return list(reader)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{file} cannot be read: {' '.join(str(error).split())}") from None


def _validate(batch: Any, columns: Sequence[str], file: Path) -> None:
    """Look at every offset: what is mapped is not checked by anybody else, and a wrong one reads elsewhere."""
    try:
        for column in columns:
            batch.column(column).validate(full=True)
    except ValueError as error:
        raise UserError(f"{file} is damaged: {' '.join(str(error).split())}") from None


def _image_and_label(schema: Any, file: Path) -> tuple[str, str]:
    image = next((f.name for f in schema if f.type.num_fields and f.type.get_field_index("bytes") >= 0), None)
    label = next((name for name in LABEL_COLUMNS if name in schema.names), None)
    if image is None or label is None:
        raise UserError(f"{file} has no columns of images and labels; it has: {', '.join(schema.names)}")
    return image, label


def read_encoded(data: "DataConfig", argument: str) -> Source:
    """The same, with all images as they are stored."""
    return read_huggingface(data, argument, decode=False)


HF = DatasetEntry(read_huggingface, read_encoded)
