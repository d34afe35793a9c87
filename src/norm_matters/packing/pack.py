"""Pack images into shards. Whoever is cut off goes on where it stopped, and ends with the same bytes."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import PIL

from norm_matters.core.errors import UserError
from norm_matters.core.seeding import derive_seed
from norm_matters.datasets.images import Images
from norm_matters.datasets.manifest import INDEX, JOURNAL, MANIFEST, Manifest, PartFacts, ShardFacts, read_json
from norm_matters.datasets.shards import Shard, pack_shards
from norm_matters.datasets.tars import scan_tar
from norm_matters.datasets.workers import Workers
from norm_matters.packing.check import check_packed
from norm_matters.packing.journal import Done, begin_journal, check_plan, file_sha256, note_done
from norm_matters.packing.prepare import Prepared, Preparing
from norm_matters.packing.settings import PackSettings
from norm_matters.packing.source import PackSource
from norm_matters.packing.workers import in_order
from norm_matters.packing.writers import (
    HashingStream,
    bytes_in_shard,
    ending_of,
    pyarrow,
    scan_parquet,
    shard_writer,
)
from norm_matters.record.files import make_folder, remove_temporaries, stream_file, write_file
from norm_matters.record.provenance import without_secrets

Advance = Callable[[int], None]
# Images whose sizes tell how large the whole will be.
SAMPLE = 256


@dataclass(frozen=True)
class Packed:
    """A packed dataset.

    Attributes:
        images: in each part.
        skipped: what was wrong with the images that were left out.
    """

    folder: Path
    images: dict[str, int]
    shards: int
    bytes: int
    skipped: tuple[str, ...]


def plan_packing(source: PackSource, settings: PackSettings) -> dict[str, Any]:
    """What the shards follow from: the source, the settings, and the libraries that make the bytes; JSON types."""
    plan = {
        "source": source.name,
        "classes": len(source.classes),
        **{f"{name} images": len(images) for name, images in source.parts.items()},
        **{f"{name} sha256": images.digest() for name, images in source.parts.items()},
        **asdict(settings),
    }
    # Whether broken images are refused or skipped, whole shards are the same; but not where nobody looks for them.
    plan["decoded"] = plan.pop("bad_images") != "keep"
    if settings.resize:
        plan["Pillow"] = PIL.__version__
    else:
        del plan["quality"]
    if settings.format == "parquet":
        plan["pyarrow"] = pyarrow()[0].__version__
    return plan


def estimate_packing(source: PackSource, settings: PackSettings) -> tuple[int, int]:
    """About how many shards there will be, and how many bytes in them, from a few images of each part.

    What resizing saves is not known.
    """
    shards = total = 0
    for images in source.parts.values():
        chosen = np.unique(np.linspace(0, len(images) - 1, SAMPLE).astype(int))
        sizes = np.array([len(images.content(int(index))) for index in chosen])
        by_size = sizes.mean() * len(images) / settings.shard_bytes
        by_count = len(images) / settings.shard_images if settings.shard_images else 0
        # However small a shard is to be, an image fits.
        shards += min(len(images), math.ceil(max(by_size, by_count, 1)))
        total += round(bytes_in_shard(settings.format, sizes).mean() * len(images))
    return shards, total


def pack_dataset(
    source: PackSource,
    folder: Path,
    settings: PackSettings,
    *,
    workers: Workers = "auto",
    command: Sequence[str] = (),
    advance: Advance = lambda images: None,
) -> Packed:
    """Write a dataset as shards with `dataset.json` and an index, and check what was written.

    Training images come in an order drawn by the seed, so that shards of a set that is sorted by class are mixed;
    those to evaluate on stay in their order.

    Args:
        folder: new, empty, or with a part of the same packing: then it goes on, and shards that are whole stay.
        command: for the record.
        advance: told how many images more are done.

    Raises:
        UserError: naming a broken image; or the folder holds something else.
        StorageError: the disk is full, or fails.
    """
    make_folder(folder)
    plan = plan_packing(source, settings)
    if (folder / MANIFEST).exists():
        return _packed_before(folder, plan, workers)
    done, command = begin_journal(folder, plan, without_secrets(command))
    remove_temporaries(folder)
    parts: dict[str, list[Done]] = {}
    for name, images in source.parts.items():
        parts[name] = _pack_part(name, images, source.classes, folder, settings, done, workers, advance)
    return _finish(folder, source, settings, parts, plan, list(command))


def _pack_part(
    part: str,
    images: Images,
    classes: Sequence[str],
    folder: Path,
    settings: PackSettings,
    done: Iterable[Done],
    workers: Workers,
    advance: Advance,
) -> list[Done]:
    """Write those shards of a part that are not done."""
    order = np.arange(len(images))
    if part == "train":
        order = np.random.default_rng(derive_seed(settings.seed, "pack")).permutation(order)
    whole = {shard.start: shard for shard in done if shard.part == part and shard.matches(folder)}
    shards: list[Done] = []
    start = 0
    while start < len(order):
        if start in whole:
            shards.append(whole[start])
            _refuse(whole[start].skipped, settings)
            advance(whole[start].taken)
            start += whole[start].taken
            continue
        stop = min((place for place in whole if place > start), default=len(order))
        preparing = Preparing(images, order[start:stop], settings)
        stream = chain.from_iterable(in_order(preparing, len(preparing), workers))
        for group in _groups(_checked(stream, settings), settings):
            name = f"{part}-{len(shards):06}{ending_of(settings.format)}"
            shard = _write_shard(folder / name, part, start, group, classes, settings)
            note_done(folder, shard)
            shards.append(shard)
            advance(shard.taken)
            start += shard.taken
        assert start == stop
    return shards


def _checked(images: Iterable[Prepared], settings: PackSettings) -> Iterator[Prepared]:
    """Pass images on; UserError for a broken one unless those are skipped."""
    for image in images:
        if image.problem:
            _refuse([image.problem], settings)
        yield image


def _refuse(problems: Sequence[str], settings: PackSettings) -> None:
    if problems and settings.bad_images != "skip":
        raise UserError(f"{problems[0]} (--bad-images skip leaves such images out; `data stats` lists them all)")


def _groups(images: Iterable[Prepared], settings: PackSettings) -> Iterator[list[Prepared]]:
    """The images of each shard; those that are skipped belong to the shard that is being filled."""
    group: list[Prepared] = []
    size = count = 0
    for image in images:
        full = size + len(image.content) > settings.shard_bytes or count == settings.shard_images
        if count and not image.problem and full:
            yield group
            group, size, count = [], 0, 0
        group.append(image)
        size += len(image.content)
        count += not image.problem
    if group:
        yield group


def _write_shard(
    file: Path, part: str, start: int, group: Sequence[Prepared], classes: Sequence[str], settings: PackSettings
) -> Done:
    good = [image for image in group if not image.problem]
    if not good:
        raise UserError(f"{group[0].problem}; the last {len(group)} images of '{part}' are all broken")
    with stream_file(file) as stream:
        hashing = HashingStream(stream)
        writer = shard_writer(settings.format, hashing, classes)  # pyright: ignore[reportArgumentType]
        for image in good:
            writer.add(image.key, image.ending, image.content, image.label)
        writer.close()
    return Done(
        part=part,
        name=file.name,
        start=start,
        taken=len(group),
        images=len(good),
        bytes=hashing.count,
        sha256=hashing.sha256.hexdigest(),
        skipped=[image.problem for image in group if image.problem],
    )


def _finish(
    folder: Path,
    source: PackSource,
    settings: PackSettings,
    parts: dict[str, list[Done]],
    plan: dict[str, Any],
    command: list[str],
) -> Packed:
    """Read all shards back, compare them with what was to be written, and write index and manifest."""
    scan = scan_tar if settings.format == "webdataset" else scan_parquet
    table: list[Shard] = []
    for part, shards in parts.items():
        found = Counter[int]()
        for shard in shards:
            if not shard.matches(folder):
                raise UserError(f"{folder / shard.name} is not as it was written; the same command writes it anew")
            table.append(scan(folder / shard.name))
            if len(table[-1].sizes) != shard.images:
                raise UserError(f"{folder / shard.name} has {len(table[-1].sizes)} images instead of {shard.images}")
            found.update(table[-1].labels.tolist())
        wanted = Counter(source.parts[part].labels.tolist())
        missing = sum((wanted - found).values()), sum((found - wanted).values())
        if missing != (sum(len(shard.skipped) for shard in shards), 0):
            raise UserError(
                f"{folder}: the shards of '{part}' lack {missing[0]} images, and have {missing[1]} too many"
            )
    index = pack_shards(table)
    write_file(folder / INDEX, index)
    skipped = [problem for shards in parts.values() for shard in shards for problem in shard.skipped]
    manifest = Manifest(
        norm_matters=1,
        format=settings.format,
        classes=list(source.classes),
        parts={name: _facts(shards) for name, shards in parts.items()},
        index_sha256=file_sha256(folder / INDEX),
        skipped=skipped,
        plan=plan,
        command=command,
    )
    write_file(folder / MANIFEST, manifest.model_dump_json(indent=1) + "\n")
    with suppress(OSError):
        (folder / JOURNAL).unlink()
    return _packed(folder, manifest)


def _facts(shards: Sequence[Done]) -> PartFacts:
    facts = [ShardFacts(name=s.name, images=s.images, bytes=s.bytes, sha256=s.sha256) for s in shards]
    return PartFacts(images=sum(shard.images for shard in facts), shards=facts)


def _packed_before(folder: Path, plan: dict[str, Any], workers: Workers) -> Packed:
    """What a finished packing has, if it is the same and whole."""
    value = read_json(folder / MANIFEST)
    check_plan(folder, value.get("plan") if isinstance(value, dict) else None, plan)
    with suppress(OSError):
        (folder / JOURNAL).unlink()
    return _packed(folder, check_packed(folder, workers=workers))


def _packed(folder: Path, manifest: Manifest) -> Packed:
    return Packed(
        folder,
        {name: part.images for name, part in manifest.parts.items()},
        len(manifest.shards),
        sum(shard.bytes for shard in manifest.shards),
        tuple(manifest.skipped),
    )
