"""Datasets of strangers: nothing in them is run, leads elsewhere, or unpacks to more than memory holds."""

import contextlib
import hashlib
import io
import json
import os
import pickle
import socket
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from norm_matters.core.config import DataConfig, load_config
from norm_matters.core.errors import UserError
from norm_matters.datasets import load_dataset
from norm_matters.datasets.idx import read_idx
from norm_matters.datasets.images import decode_image
from norm_matters.datasets.manifest import packed_classes, packed_shards, read_manifest
from norm_matters.datasets.rowgroups import open_parquet
from norm_matters.datasets.tars import scan_tar
from norm_matters.models import create_model
from norm_matters.packing import PackSettings, open_source, pack_dataset
from norm_matters.run import CHECKS


def png(side: int = 8) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((side, side, 3), np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    """A folder of images of two classes."""
    root = tmp_path / "pets"
    for label in ("cat", "dog"):
        for part in ("train", "val"):
            (root / part / label).mkdir(parents=True)
            for number in range(3):
                (root / part / label / f"{number}.png").write_bytes(png())
    return root


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    """An image of the user's that is nobody else's affair."""
    path = tmp_path / "private" / "passport.png"
    path.parent.mkdir()
    path.write_bytes(png())
    return path


def load(root: Path, **settings):
    return load_dataset(DataConfig(name=f"imagefolder:{root}", **settings))


def link_an_image(root: Path, private: Path) -> None:
    (root / "train" / "cat" / "x.png").symlink_to(private)


def link_an_image_by_a_relative_path(root: Path, private: Path) -> None:
    folder = root / "train" / "cat"
    (folder / "x.png").symlink_to(os.path.relpath(private, folder))


def link_an_image_by_way_of_a_link(root: Path, private: Path) -> None:
    (root / "a").symlink_to(private)
    (root / "val" / "dog" / "x.png").symlink_to("../../a")


def link_a_class(root: Path, private: Path) -> None:
    for part in ("train", "val"):
        (root / part / "rat").symlink_to(private.parent)


def link_a_part(root: Path, private: Path) -> None:
    (root / "val").rename(private.parent / "val")
    (root / "val").symlink_to(private.parent / "val")


LINKS = [link_an_image, link_an_image_by_a_relative_path, link_an_image_by_way_of_a_link, link_a_class, link_a_part]


@pytest.mark.parametrize("make", LINKS)
def test_links_out_of_a_folder_of_images_are_refused_unless_asked_for(
    make: Callable[[Path, Path], None], pets: Path, canary: Path
) -> None:
    make(pets, canary)
    with pytest.raises(UserError, match=r"leads out of .*pets.*; data\.links=true allows that"):
        load(pets)
    assert len(load(pets, links=True).train) >= 6


def test_links_within_a_folder_of_images_are_followed(pets: Path) -> None:
    (pets / "train" / "cat" / "again.png").symlink_to("0.png")
    (pets / "train" / "rat").symlink_to("dog")
    (pets / "val" / "rat").symlink_to(pets / "val" / "cat")
    (pets.parent / "link").symlink_to(pets)
    assert load(pets.parent / "link").classes == ("cat", "dog", "rat")


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", ["pipe", "device", "socket"])
def test_an_image_that_is_no_file(kind: str, pets: Path, tmp_path: Path) -> None:
    path = pets / "train" / "cat" / "x.png"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(os.path.relpath(path))
    with pytest.raises(UserError, match="no regular file"):
        load(pets, links=True)


NAMES = {
    "a pipe of webdataset": "webdataset:pipe:touch canary",
    "an address": "webdataset:http://127.0.0.1:9/{000..001}.tar",
    "an address of S3": "webdataset:s3://bucket/train-000.tar",
    "an address of parquet": "parquet:http://127.0.0.1:9/x.parquet",
    "a hub's name that climbs": "hf:../../etc",
    "a hub's name with an address": "hf:http://127.0.0.1/x",
    "braces without end": "webdataset:{000000000..999999999}.tar",
    "braces of braces": "webdataset:" + "{a,b}" * 40 + ".tar",
    "a module": "os.system",
    "a module and a place": "norm_matters.cli:main",
}


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES.keys())
def test_a_dataset_that_is_a_program_or_an_address(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError):
        load_dataset(DataConfig(name=name))
    assert not list(tmp_path.iterdir())


def member(
    name: str, content: bytes = b"", kind: bytes = tarfile.REGTYPE, link: str = ""
) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size, info.type, info.linkname = len(content), kind, link
    return info, content


def archive(path: Path, *members: tuple[tarfile.TarInfo, bytes]) -> Path:
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as out:
        for info, content in members:
            out.addfile(info, io.BytesIO(content))
    return path


def test_members_that_lead_elsewhere_are_read_where_they_lie(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    monkeypatch.chdir(inside)
    image, label = png(), b"1"
    file = archive(
        inside / "train-0.tar",
        *(member("../../x.png", image), member("../../x.cls", b"0")),
        *(member("/tmp/y.png", image), member("/tmp/y.cls", label)),
        *(
            member("link.png", b"", tarfile.SYMTYPE, "/etc/passwd"),
            member("hard.png", b"", tarfile.LNKTYPE, "/etc/passwd"),
        ),
        *(member("device.png", b"", tarfile.CHRTYPE), member("pipe.png", b"", tarfile.FIFOTYPE)),
    )
    before = sorted(tmp_path.rglob("*"))
    shard = scan_tar(file)
    assert list(shard.keys) == ["../../x.png", "/tmp/y.png"]
    assert sorted(tmp_path.rglob("*")) == before


def size_field(archive_bytes: bytes, offset: int, value: int) -> bytes:
    """The archive with the size in the header at an offset set to any number, its checksum right again."""
    data = bytearray(archive_bytes)
    data[offset + 124 : offset + 136] = (
        b"\x80" + value.to_bytes(11, "big") if value >= 0 else b"\xff" + (256**11 + value).to_bytes(11, "big")
    )
    data[offset + 148 : offset + 156] = b" " * 8
    data[offset + 148 : offset + 156] = b"%06o\0 " % sum(data[offset : offset + 512])
    return bytes(data)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("size", [-1, -512, -1024, -(2**60), 10**12, 2**80])
@pytest.mark.parametrize("kind", [tarfile.REGTYPE, b"Z", tarfile.DIRTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE])
def test_sizes_below_zero_and_beyond_the_file(size: int, kind: bytes, tmp_path: Path) -> None:
    """The first is CVE-2025-8194: tarfile goes round and round."""
    file = archive(tmp_path / "x.tar", member("a.png", png()), member("a.cls", b"0"), member("b", b"x" * 600, kind))
    data = file.read_bytes()
    offset = next(place for place in range(1024, len(data), 512) if data[place : place + 2] in (b"b\0", b"b/"))
    file.write_bytes(size_field(data, offset, size))
    with contextlib.suppress(UserError):
        assert len(scan_tar(file).keys) == 1


def test_a_sparse_member_and_a_nested_archive(tmp_path: Path) -> None:
    info, _ = member("a.png")
    info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": str(10**12)}
    with tarfile.open(tmp_path / "sparse.tar", "w", format=tarfile.PAX_FORMAT) as out:
        out.addfile(info)
        out.addfile(*(lambda pair: (pair[0], io.BytesIO(pair[1])))(member("a.cls", b"0")))
    with pytest.raises(UserError, match=r"sparse\.tar"):
        scan_tar(tmp_path / "sparse.tar")
    inner = archive(tmp_path / "inner.tar", member("x.png", png()), member("x.cls", b"0")).read_bytes()
    with pytest.raises(UserError, match="no image"):
        scan_tar(archive(tmp_path / "outer.tar", member("inner.tar", inner)))


def test_a_bomb_of_parquet_is_not_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "train.parquet"
    pixel = png()
    count = 200_000
    images = pa.DictionaryArray.from_arrays(pa.array(np.zeros(count, np.int8)), pa.array([pixel])).cast(pa.binary())
    table = pa.table({"image": pa.StructArray.from_arrays([images], ["bytes"]), "label": np.zeros(count, np.int8)})
    pq.write_table(table, path, compression="zstd")
    assert path.stat().st_size < count
    with pytest.raises(UserError, match=r"unpack to 200,000 rows"):
        open_parquet(path)
    with pytest.raises(UserError, match=r"unpack to 200,000 rows"):
        load_dataset(DataConfig(name=f"parquet:{path}"))


@pytest.mark.parametrize(
    "data",
    [
        b"\0\0\x08\xff" + b"\0\0\0\x01" * 255 + b"x",
        b"\0\0\x08\x00x",
        b"\0\0\x08\x04" + b"\xff\xff\xff\xff" * 4,
        b"\0\0\x08\x01\xff\xff\xff\xffshort",
        pickle.dumps([1, 2, 3]),
    ],
    ids=["255 dimensions", "no dimension", "2^128 values", "4 GB", "a pickle"],
)
def test_idx_files_that_promise_too_much(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "x-idx3-ubyte").write_bytes(data)
    with pytest.raises(UserError, match="x-idx3-ubyte"):
        read_idx(tmp_path / "x-idx3-ubyte")


def bomb(width: int, height: int) -> bytes:
    """A PNG of a size that its few bytes cannot fill."""
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("width", "height"), [(7072, 7071), (13_000, 13_000), (20_000, 20_000), (2**31 - 1, 1), (1, 2**31 - 1)]
)
def test_images_of_more_than_fifty_megapixels_are_not_decoded(width: int, height: int) -> None:
    with pytest.raises(UserError, match=r"^cat\.png: .*50 megapixels"):
        decode_image(bomb(width, height), 3, name="cat.png")


@pytest.mark.parametrize("kind", ["PDF", "EPS", "ICO", "TGA", "JPEG2000", "SGI"])
def test_other_formats_are_not_opened(kind: str, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(buffer, kind)
    with pytest.raises(UserError, match=r"cat\.png: no image of a known format"):
        decode_image(buffer.getvalue(), 3, name="cat.png")


def test_an_index_that_is_a_pickle_is_not_read(pets: Path, tmp_path: Path) -> None:
    """As timm's was (GHSA-pqww-w348-m542): a pickle beside the data, its SHA-256 right."""

    class Canary:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'canary'}",)

    folder = tmp_path / "packed"
    pack_dataset(open_source(str(pets)), folder, PackSettings(format="webdataset"), workers=0)
    data = pickle.dumps(Canary())
    manifest = json.loads((folder / "dataset.json").read_text())
    assert packed_shards(folder, read_manifest(folder))
    (folder / "index.safetensors").write_bytes(data)
    (folder / "dataset.json").write_text(json.dumps({**manifest, "index_sha256": hashlib.sha256(data).hexdigest()}))
    assert packed_shards(folder, read_manifest(folder)) == {}
    assert len(load_dataset(DataConfig(name=f"webdataset:{folder}")).train) == 6
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    "text",
    [
        '{"classes": ["a", "a"], "classes": []}',
        '{"norm_matters": NaN}',
        "[" * 10**5,
        '{"norm_matters": 1}',
        "7",
        "\xff",
    ],
)
def test_a_manifest_that_is_none(text: str, tmp_path: Path) -> None:
    (tmp_path / "dataset.json").write_text(text, encoding="latin-1")
    if text == "7":  # somebody else's
        assert (read_manifest(tmp_path), packed_classes(tmp_path)) == (None, None)
        return
    with pytest.raises(UserError, match=r"dataset\.json is damaged"):
        read_manifest(tmp_path)


def test_what_a_configuration_may_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No name in a configuration is one of a module or an address; see test_model_trust for files of Python."""
    monkeypatch.chdir(tmp_path)
    for name in (
        "os.system",
        "timm:hf-hub:evil/model",
        "timm:local-dir:.",
        "torchvision:os",
        "torch.hub.load",
        "x:y",
        "hub:a/b",
    ):
        with pytest.raises(UserError, match=r"model\.name"):
            load_config(options={"model.name": name}, checks=CHECKS)
    for options in ({"pretrained_cfg": {"url": "http://127.0.0.1:9"}}, {"checkpoint_path": "/etc/passwd"}):
        with pytest.raises(UserError, match="is set by other settings here"):
            create_model("timm:resnet18", num_classes=10, **options)
