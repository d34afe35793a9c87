"""Tar archives in the WebDataset layout, KEY.jpg beside KEY.cls: where each image lies. Nothing is ever extracted."""

import os
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from norm_matters.core.errors import UserError
from norm_matters.core.json import parse_json
from norm_matters.datasets.listing import ENDINGS
from norm_matters.datasets.names import Names
from norm_matters.datasets.shards import Shard

LABELS = ("cls", "json")
# Labels are read whole: a text of more bytes than this is none.
MAX_LABEL = 2**20
COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7z": "xz", b"(\xb5/\xfd": "zstd"}
RECORD = 512


class _Member(NamedTuple):
    """A file in an archive: what its sample is called, the rest of its name in small letters, and where it lies."""

    key: str
    ending: str
    offset: int
    size: int


def scan_tar(file: Path) -> Shard:
    """Find the images of an archive and their labels, by its headers.

    A sample are the members that follow one another and are called the same up to the first dot of the file's name:
    one image, and its label as a whole number in KEY.cls, or as "label" in KEY.json.

    Raises:
        UserError: naming archive and member, where the archive is damaged, cut short or compressed, or a sample has no
            image, several, or no label.
    """
    samples: list[tuple[_Member, int]] = []
    try:
        with file.open("rb") as stream:
            sample: list[_Member] = []
            for member in _members(file, stream):
                if sample and member.key != sample[0].key:
                    samples.append(_sample(file, stream, sample))
                    sample = []
                sample.append(member)
            if sample:
                samples.append(_sample(file, stream, sample))
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror or error}") from None
    if not samples:
        raise UserError(f"{file} has no images")
    return Shard(
        np.array([image.offset for image, _ in samples], dtype=np.int64),
        np.array([image.size for image, _ in samples], dtype=np.int64),
        np.array([label for _, label in samples], dtype=np.int64),
        Names.of(f"{image.key}.{image.ending}" for image, _ in samples),
    )


def header_fits(file: Path, offset: int, size: int, key: str) -> bool:
    """Whether a header stands before the byte `offset`, of a member of that name and size."""
    try:
        with file.open("rb") as stream:
            stream.seek(max(0, offset - RECORD))
            member = tarfile.TarInfo.frombuf(stream.read(RECORD), "utf-8", "surrogateescape")
    except (OSError, tarfile.TarError, ValueError):
        return False
    return (member.size, member.name) == (size, key)


def _members(file: Path, stream: BinaryIO) -> Iterator[_Member]:
    """The files in an archive, in order."""
    size = os.fstat(stream.fileno()).st_size
    start = stream.read(6)
    for magic, name in COMPRESSED.items():
        if start.startswith(magic):
            raise UserError(f"{file} is compressed ({name}): images are read where they lie; unpack it to a plain .tar")
    stream.seek(0)
    last, place = "", -1
    try:
        with tarfile.open(fileobj=stream, mode="r:", errors="surrogateescape") as archive:
            while (member := archive.next()) is not None:
                if archive.offset <= place:
                    # A size below zero, which tarfile follows round and round (CVE-2025-8194).
                    raise UserError(f"{file} is damaged{last}: a header leads back to byte {archive.offset:,}")
                place = archive.offset
                archive.members.clear()  # pyright: ignore[reportAttributeAccessIssue]  # it would keep all of them
                last = f" after {member.name!r}"
                if not member.isreg():
                    continue
                if member.sparse is not None or not 0 <= member.size <= size - member.offset_data:
                    raise UserError(f"{file}, {member.name}: the file is cut short: it ends at byte {size:,}")
                folder, _, name = member.name.rpartition("/")
                stem, dot, ending = name.partition(".")
                if dot and stem:
                    key = f"{folder}/{stem}" if folder else stem
                    yield _Member(key, ending.lower(), member.offset_data, member.size)
            # tarfile takes what is no header for the end; but that is an empty record, or something is missing.
            stream.seek(archive.offset)
            record = stream.read(RECORD)
            if len(record) < RECORD:
                raise UserError(f"{file} is cut short: the archive has no end{last}")
            if any(record):
                raise UserError(f"{file} is damaged{last}: no header is at byte {archive.offset:,}")
    except (tarfile.TarError, ValueError, EOFError, OverflowError, RecursionError, MemoryError) as error:
        raise UserError(f"{file} is no tar archive, or damaged{last}: {error}") from None


def _sample(file: Path, stream: BinaryIO, members: list[_Member]) -> tuple[_Member, int]:
    """The image of a sample and its label."""
    key = members[0].key
    images = [member for member in members if f".{member.ending.rpartition('.')[2]}" in ENDINGS]
    if len(images) != 1:
        found = " and ".join(f".{member.ending}" for member in images or members)
        problem = "no image" if not images else "several images"
        raise UserError(f"{file}, {key}: the sample has {problem}: {found}")
    if not images[0].size:
        raise UserError(f"{file}, {key}.{images[0].ending}: the image is empty")
    for member in members:
        if member.ending in LABELS:
            place = f"{file}, {key}.{member.ending}"
            text = os.pread(stream.fileno(), min(member.size, MAX_LABEL), member.offset)
            return images[0], _label(text, place, as_json=member.ending == "json")
    wanted = " or ".join(f".{ending}" for ending in LABELS)
    raise UserError(f"{file}, {key}: the sample has no label ({wanted})")


def _label(text: bytes, place: str, *, as_json: bool) -> int:
    try:
        value = parse_json(text)["label"] if as_json else int(text)
        if isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**62:
            return value
    except (ValueError, KeyError, TypeError):
        pass
    shown = repr(text[:40])[1:]
    wanted = 'an object with a whole number as "label"' if as_json else "a whole number"
    raise UserError(f"{place}: the label is not {wanted}: {shown}")
