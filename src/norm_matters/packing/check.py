"""Whether a packed dataset is still what was written."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from norm_matters.core.errors import UserError
from norm_matters.datasets.manifest import INDEX, MANIFEST, Manifest, ShardFacts, read_manifest
from norm_matters.datasets.shards import unpack_shards
from norm_matters.datasets.workers import Workers
from norm_matters.packing.journal import file_sha256
from norm_matters.packing.workers import in_order


def check_packed(
    folder: Path, *, workers: Workers = "auto", advance: Callable[[int], None] = lambda images: None
) -> Manifest:
    """Compare every shard of a packed dataset with its manifest: size, SHA-256, number of images.

    Args:
        advance: told how many images more have been looked at.

    Returns:
        The manifest.

    Raises:
        UserError: naming everything that differs.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        raise UserError(f"{folder / MANIFEST} is missing: only what `data pack` wrote can be checked")
    problems = []
    for shard, problem in zip(
        manifest.shards, in_order(_Check(folder, manifest), len(manifest.shards), workers), strict=True
    ):
        advance(shard.images)
        if problem:
            problems.append(problem)
    for name, part in manifest.parts.items():
        if part.images != sum(shard.images for shard in part.shards):
            problems.append(f"{folder / MANIFEST}: '{name}' has not the sum of its shards' images")
    problems += _index_problems(folder, manifest)
    if problems:
        raise UserError(*problems)
    return manifest


class _Check:
    """The task of a worker: what is wrong with one shard, "" where nothing is."""

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.shards = folder, manifest.shards

    def __call__(self, number: int) -> str:
        facts: ShardFacts = self.shards[number]
        file = self.folder / facts.name
        try:
            size = file.stat().st_size
            if size != facts.bytes:
                return f"{file} has {size:,} bytes instead of {facts.bytes:,}"
            if file_sha256(file) != facts.sha256:
                return f"{file} has been changed: its SHA-256 is another than in {MANIFEST}"
        except OSError as error:
            return f"{file} cannot be read: {error.strerror}"
        return ""


def _index_problems(folder: Path, manifest: Manifest) -> list[str]:
    file = folder / INDEX
    try:
        data = file.read_bytes()
        if file_sha256(file) != manifest.index_sha256:
            return [f"{file} has been changed: its SHA-256 is another than in {MANIFEST}"]
        shards = unpack_shards(data, [shard.bytes for shard in manifest.shards])
    except OSError as error:
        return [f"{file} cannot be read: {error.strerror}"]
    except ValueError as error:
        return [f"{file}: {error}"]
    counts = np.array([len(shard.sizes) for shard in shards])
    wrong = np.flatnonzero(counts != [shard.images for shard in manifest.shards])
    return [f"{file}: {manifest.shards[n].name} has {counts[n]} images there" for n in wrong]
