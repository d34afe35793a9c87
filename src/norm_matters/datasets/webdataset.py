"""Shards in the WebDataset layout: plain tar archives, whose images are read where they lie."""

import glob
import math
import re
from collections.abc import Mapping, Sequence
from itertools import product, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

from norm_matters.core.errors import UserError
from norm_matters.datasets.entry import DatasetEntry, Source, numbered_classes
from norm_matters.datasets.manifest import PackedShard, packed_classes, packed_shards, read_manifest
from norm_matters.datasets.shards import Shard, known_shard
from norm_matters.datasets.stored import StoredImages, stored_images
from norm_matters.datasets.tars import scan_tar

if TYPE_CHECKING:
    from norm_matters.core.config import DataConfig

# How the files to evaluate on begin, the first kind that exists; and what to call them.
VAL_NAMES = {"val": "validation", "test": "test"}
MAX_SHARDS = 100_000


def read_webdataset(data: "DataConfig", argument: str) -> Source:
    """Read tar shards, those to train on and those to evaluate on.

    Their headers are read once (see `shards.known_shard`), or not at all where `data pack` left an index beside them.
    Names of classes come from `dataset.json` or `classes.txt` beside the shards; otherwise they are numbers.

    Args:
        argument: a folder; or a pattern with `{000..146}`, `{train,val}` or `*`. Relative to `data.dir` where that is
            given. Shards whose name begins with val (validation) or test are evaluated on; where a pattern names shards
            train* only, those of that kind beside them.
    """
    train, val, val_name = find_shards(Path(data.dir or "").expanduser(), argument)
    folders = list(dict.fromkeys(file.parent for file in (*train, *val)))
    packed: dict[Path, PackedShard] = {}
    for folder in folders:
        manifest = read_manifest(folder)
        if manifest and manifest.format == "webdataset":
            packed |= {folder / name: shard for name, shard in packed_shards(folder, manifest).items()}
    images = [read_shards(files, packed) for files in (train, val) if files]
    classes = _named_classes(folders)
    if classes is None:
        classes = numbered_classes(max(int(part.labels.max()) for part in images))
    return Source(train=images[0], val=images[1] if val else None, classes=classes, val_name=val_name)


def _named_classes(folders: Sequence[Path]) -> tuple[str, ...] | None:
    """Names of the classes, which must be the same in every folder that has them; None where none has."""
    named = [(folder, classes) for folder in folders if (classes := packed_classes(folder)) is not None]
    for folder, classes in named[1:]:
        first, expected = named[0]
        if classes != expected:
            pairs = enumerate(zip_longest(expected, classes))
            label, (one, other) = next((label, pair) for label, pair in pairs if pair[0] != pair[1])
            raise UserError(f"the classes of {first} and {folder} differ: label {label} is {one!r} and {other!r}")
    return named[0][1] if named else None


def read_shards(files: Sequence[Path], packed: Mapping[Path, PackedShard]) -> StoredImages:
    """The images of tar shards.

    Args:
        packed: file -> what an index beside it says of it.
    """
    facts, shards = [], list[Shard]()
    for file in files:
        known = packed.get(file)
        shards.append(known.shard if known else known_shard(file, scan_tar))
        facts.append(f"{file.name} {file.stat().st_size} {known.sha256 if known else ''}")
    return stored_images(files, shards, facts)


def find_shards(base: Path, pattern: str) -> tuple[list[Path], list[Path], str]:
    """The files to train on, those to evaluate on (or none), and what these are.

    Raises:
        UserError: there are none, or one that the pattern names is missing.
    """
    title = f"dataset 'webdataset:{pattern}'"
    place = base / Path(pattern).expanduser()
    if place.is_dir():
        files = sorted(place.glob("*.tar"))
        if not files:
            raise UserError(f"{title}: {place / '*.tar'} is missing")
    else:
        files = _expand(str(place), title)
    kinds: dict[str, list[Path]] = {"train": [], **{kind: [] for kind in VAL_NAMES}}
    for file in files:
        kinds[_kind(file)[1]].append(file)
    train = kinds["train"]
    if not train:
        raise UserError(f"{title}: it has shards to evaluate on only, such as {files[0].name}; none to train on")
    if not any(kinds[kind] for kind in VAL_NAMES):
        beside, wanted = sorted(train[0].parent.glob("*.tar")), {_kind(file) for file in train}
        for file in beside if wanted == {(_kind(train[0])[0], "train")} else ():
            prefix, kind = _kind(file)
            if kind in VAL_NAMES and prefix == _kind(train[0])[0]:
                kinds[kind].append(file)
    kind = next((kind for kind in VAL_NAMES if kinds[kind]), None)
    return (train, kinds[kind], VAL_NAMES[kind]) if kind else (train, [], "")


def _kind(file: Path) -> tuple[str | None, str]:
    """What a shard is for, by a name such as set-train-00.tar, and what stands before that; None where it is silent."""
    match = re.match(r"(|.*?[^a-z])(train|val|test)", file.name)
    return (match[1], match[2]) if match else (None, "train")


def _expand(pattern: str, title: str) -> list[Path]:
    """The files of a pattern, each of which must exist."""
    files: list[Path] = []
    for name in _braces(pattern, title):
        found = sorted(map(Path, glob.glob(name))) if any(char in name for char in "*?[") else [Path(name)]
        if not found or not found[0].is_file():
            raise UserError(f"{title}: {name} is missing")
        files += found
        if len(files) > MAX_SHARDS:
            raise UserError(f"{title}: more than {MAX_SHARDS:,} shards")
    if len(set(files)) < len(files):
        raise UserError(f"{title}: it names a shard twice")
    return files


def _braces(pattern: str, title: str) -> list[str]:
    """The names that `{a,b}` and `{00..12}` in a pattern stand for."""
    parts: list[Sequence[str]] = []
    for text in re.split(r"(\{[^{}]*\})", pattern):
        if not (text.startswith("{") and text.endswith("}")):
            parts.append([text])
        elif match := re.fullmatch(r"\{(\d{1,9})\.\.(\d{1,9})\}", text):
            first, last = match.groups()
            if int(first) > int(last):
                raise UserError(f"{title}: {text} counts down")
            numbers = range(int(first), int(last) + 1)
            parts.append([str(n).zfill(len(first)) for n in numbers[: MAX_SHARDS + 1]])
        else:
            parts.append(text[1:-1].split(","))
    if math.prod(map(len, parts)) > MAX_SHARDS:
        raise UserError(f"{title}: more than {MAX_SHARDS:,} shards")
    return ["".join(choice) for choice in product(*parts)]


WEBDATASET = DatasetEntry(read_webdataset)
