"""The image files in a folder and below it, with their sizes; a million of them in seconds."""

import os
import stat
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np

from norm_matters.core.errors import UserError
from norm_matters.datasets.kept import pack_arrays, read_kept, unpack_arrays, write_kept
from norm_matters.datasets.names import Names

ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff")
VERSION = "1"
# Nanoseconds for which a folder may change without its time changing.
RACE = 2_000_000_000
_COLUMNS = ("sizes", "name_ends", "folder_times", "folder_ends", "text_names", "text_folders")


class Listing(NamedTuple):
    """The images in a folder.

    Attributes:
        names: of the files, relative to the folder: those of one folder in it after those of another, each sorted.
        sizes: int64 (N,), bytes of each.
    """

    names: Names
    sizes: np.ndarray


def list_images(root: Path, *, keep: bool = False, home: Path | None = None) -> Listing:
    """List the images in a folder and below it. Hidden files and files without an image's ending are passed over.

    Links to folders are followed in `root` itself only.

    Args:
        home: `root` or a folder above it, out of which no link may lead: an image of a stranger's could be any file of
            the user's. None: links may lead anywhere.
        keep: keep the list for the next time. It counts until a file or folder is added, removed or renamed: a file
            that is written over in its place keeps the size that is listed.

    Raises:
        UserError: a folder or a file cannot be looked at, is a pipe or device, or leads out of `home`.
    """
    place, border = os.path.realpath(root), "" if home is None else os.path.realpath(home)
    _check_inside(str(root), place, border)
    kept = read_kept("listings", VERSION, place, border) if keep else None
    if kept is not None:
        with suppress(ValueError, OSError):
            return _unpack(kept, root)
    files: list[tuple[str, int]] = []
    folders: list[tuple[str, int]] = []
    try:
        for name, is_folder in sorted((entry.name, entry.is_dir()) for entry in os.scandir(root)):
            if is_folder and not name.startswith("."):
                folder = os.path.join(root, name)
                _check_inside(folder, os.path.realpath(folder), border)
                files += sorted(_walk(folder, f"{name}/", folders, border))
        files += sorted(_walk(str(root), "", folders, border, deeper=False))
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}") from None
    listing = Listing(Names.of(name for name, _ in files), np.array([size for _, size in files], dtype=np.int64))
    if keep and max(changed for _, changed in folders) < time.time_ns() - RACE:
        write_kept(_pack(listing, folders), "listings", VERSION, place, border)
    return listing


def _check_inside(path: str, place: str, border: str) -> None:
    """Raise UserError where a path leads to a place beyond the border; "" is none."""
    if border and os.path.commonpath([place, border]) != border:
        raise UserError(f"{path} is or has a link that leads out of {border}, to {place}; data.links=true allows that")


def _walk(
    folder: str, prefix: str, folders: list[tuple[str, int]], border: str, *, deeper: bool = True
) -> Iterator[tuple[str, int]]:
    """Name and size of each image, in any order; adds each folder and when it changed."""
    folders.append((prefix, os.stat(folder).st_mtime_ns))
    with os.scandir(folder) as entries:
        for entry in entries:
            name = entry.name
            if entry.is_dir():
                if deeper and not entry.is_symlink():
                    yield from _walk(entry.path, f"{prefix}{name}/", folders, border)
            elif name.lower().endswith(ENDINGS) and not name.startswith("."):
                if entry.is_symlink():
                    _check_inside(entry.path, os.path.realpath(entry.path), border)
                facts = entry.stat()
                if not stat.S_ISREG(facts.st_mode):
                    raise UserError(f"{entry.path} is no regular file")
                yield prefix + name, facts.st_size


def _pack(listing: Listing, folders: list[tuple[str, int]]) -> bytes:
    places = Names.of(name for name, _ in folders)
    return pack_arrays(
        {
            "sizes": listing.sizes,
            "name_ends": listing.names.ends,
            "folder_times": np.array([changed for _, changed in folders], dtype=np.int64),
            "folder_ends": places.ends,
            "text_names": np.frombuffer(listing.names.blob, dtype=np.uint8),
            "text_folders": np.frombuffer(places.blob, dtype=np.uint8),
        }
    )


def _unpack(data: bytes, root: Path) -> Listing:
    """The list, if no folder has changed since; ValueError or OSError if one has."""
    sizes, ends, times, folder_ends, names, folders = unpack_arrays(data, _COLUMNS)
    places = Names(folders.tobytes(), folder_ends)
    for place, changed in zip(places, times.tolist(), strict=True):
        if os.stat(os.path.join(root, place)).st_mtime_ns != changed:
            raise ValueError("a folder has changed")
    if len(sizes) != len(ends) or (len(ends) and ends[-1] != len(names)) or not len(places):
        raise ValueError("it is damaged")
    return Listing(Names(names.tobytes(), ends), sizes)
