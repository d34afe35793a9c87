"""`dataset.json` and `index.safetensors`, which `norm-matters data pack` writes beside its shards."""

import hashlib
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from norm_matters.core.errors import UserError
from norm_matters.core.json import parse_json
from norm_matters.core.reading import read_regular
from norm_matters.datasets.shards import Shard, unpack_shards
from norm_matters.datasets.tars import header_fits

MANIFEST, INDEX, JOURNAL = "dataset.json", "index.safetensors", "packing.jsonl"
MAX_BYTES = 2**26
# Fifty bytes and a name for each image: enough for twenty million.
MAX_INDEX = 2**31

_Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")]
_Count = Annotated[int, Field(ge=0, lt=2**62)]
_Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Facts(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")


class ShardFacts(_Facts):
    """One shard: its file's name, the images in it, its bytes and their SHA-256."""

    name: _Name
    images: _Count
    bytes: _Count
    sha256: _Sha256


class PartFacts(_Facts):
    """Images to train on, or to evaluate on."""

    images: _Count
    shards: list[ShardFacts]


class Manifest(_Facts):
    """What a packed dataset is, and what it was made from.

    Attributes:
        norm_matters: version of this format.
        parts: "train", and "validation" or "test" where the source has such a part.
        index_sha256: of index.safetensors, which has the shards in the order they have here.
        skipped: broken images that were left out, with the reason.
        plan: what the shards follow from: source, settings, versions.
        command: that packed it.
    """

    norm_matters: Literal[1]
    format: Literal["webdataset", "parquet"]
    classes: list[str]
    parts: dict[str, PartFacts]
    index_sha256: _Sha256
    skipped: list[str]
    plan: dict[str, Any]
    command: list[str]

    @property
    def shards(self) -> list[ShardFacts]:
        """Those of all parts."""
        return [shard for part in self.parts.values() for shard in part.shards]


class PackedShard(NamedTuple):
    """Where the images of a shard lie, and the SHA-256 that its file had when it was written."""

    shard: Shard
    sha256: str


def read_json(file: Path) -> Any:
    """The value in a JSON file; None where there is no such file.

    Raises:
        UserError: it cannot be read, or is no JSON.
    """
    try:
        return parse_json(read_regular(file, limit=MAX_BYTES))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{file} is damaged: {error}") from None


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a packed dataset; None where there is none, or a `dataset.json` of somebody else's.

    Raises:
        UserError: it is damaged, or packing has not come to its end.
    """
    value = read_json(folder / MANIFEST)
    if not isinstance(value, dict) or "norm_matters" not in value:
        if (folder / JOURNAL).exists():
            raise UserError(f"{folder}: packing has not finished; the same `data pack` command goes on with it")
        return None
    try:
        return Manifest.model_validate(value)
    except ValidationError as error:
        detail = error.errors(include_url=False)[0]
        place = ".".join(map(str, detail["loc"]))
        raise UserError(f"{folder / MANIFEST} is damaged: {place}: {detail['msg']}") from None


def packed_shards(folder: Path, manifest: Manifest) -> dict[str, PackedShard]:
    """File name -> what is in it, from the index; nothing where index, manifest and files do not fit together."""
    facts = manifest.shards
    try:
        data = read_regular(folder / INDEX, limit=MAX_INDEX)
        if hashlib.sha256(data).hexdigest() != manifest.index_sha256:
            return {}
        shards = unpack_shards(data, [shard.bytes for shard in facts])
    except (OSError, ValueError):
        return {}
    found = zip(facts, shards, strict=True)
    return {
        fact.name: PackedShard(shard, fact.sha256)
        for fact, shard in found
        if len(shard.sizes) == fact.images and _fits(folder / fact.name, fact.bytes, shard)
    }


def packed_classes(folder: Path) -> tuple[str, ...] | None:
    """Names of the classes in `dataset.json`, of any maker, or in `classes.txt`, one a line; None where neither is."""
    value = read_json(folder / MANIFEST)
    classes = value.get("classes") if isinstance(value, dict) else None
    if isinstance(classes, list) and all(isinstance(name, str) for name in classes):
        return tuple(classes)
    try:
        lines = read_regular(folder / "classes.txt", limit=MAX_BYTES).decode().splitlines()
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / 'classes.txt'} cannot be read: {error}") from None
    return tuple(line.strip() for line in lines if line.strip())


def _fits(file: Path, size: int, shard: Shard) -> bool:
    """Whether a file has its size, and what surrounds its first and its last image is as it should be."""
    try:
        if file.stat().st_size != size:
            return False
        ends = {0, len(shard.sizes) - 1} if len(shard.sizes) else ()
        if file.suffix == ".tar":
            return all(header_fits(file, int(shard.offsets[n]), int(shard.sizes[n]), shard.keys[n]) for n in ends)
        with file.open("rb") as stream:
            for n in ends:
                # Parquet writes the length of a value before it.
                stream.seek(max(0, int(shard.offsets[n]) - 4))
                if int.from_bytes(stream.read(4), "little") != shard.sizes[n]:
                    return False
    except OSError:
        return False
    return True
