import gc
import io
import json
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from norm_matters.core.config import DataConfig
from norm_matters.core.errors import UserError
from norm_matters.datasets import Loader, load_dataset, shards, stored, webdataset
from norm_matters.datasets.images import Images
from norm_matters.datasets.stored import StoredImages
from norm_matters.transforms.preprocessing import Preprocessing

PLAN = Preprocessing(3, 8, (0.5,) * 3, (0.2,) * 3, "pad", 2, True, 8)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def encoded(number: int, kind: str = "PNG") -> bytes:
    pixels = np.random.default_rng(number).integers(0, 256, (9 + number % 3, 10, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def write_tar(path: Path, members, **options) -> None:
    """An archive of members (name, bytes)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def samples(start: int, count: int, kind: str = "PNG", ending: str = "png"):
    for n in range(start, start + count):
        yield f"{n:05}.{ending}", encoded(n, kind)
        yield f"{n:05}.cls", str(n % 3).encode()


def write_set(folder: Path, train: int = 3, per_shard: int = 7, val: int = 5) -> None:
    for n in range(train):
        write_tar(folder / f"train-{n:03}.tar", samples(n * per_shard, per_shard))
    if val:
        write_tar(folder / "val-000.tar", samples(1000, val))


def load(pattern, **options):
    return load_dataset(DataConfig(name=f"webdataset:{pattern}", **options))


def numbers(images: Images) -> list[str]:
    return [images.name(n).rpartition(", ")[2] for n in range(len(images))]


@pytest.mark.parametrize(
    "pattern", ["", "train-{000..002}.tar", "train-*.tar", "{train,val}-*.tar", "{train-{000..002},val-000}.tar"]
)
def test_a_folder_and_patterns_name_the_same_shards(tmp_path, pattern):
    write_set(tmp_path)
    if pattern.startswith("{train-"):
        with pytest.raises(UserError, match="is missing"):
            load(tmp_path / pattern)
        return
    data = load(tmp_path / pattern)
    assert (len(data.train), len(data.val), data.val_name, data.classes) == (21, 5, "validation", ("0", "1", "2"))
    assert numbers(data.train) == [f"{n:05}.png" for n in range(21)]
    assert data.train.labels.tolist() == [n % 3 for n in range(21)]
    for n in (0, 6, 7, 20):
        assert data.train.content(n) == encoded(n)
        assert np.array_equal(data.train.image(n), Image.open(io.BytesIO(encoded(n))))
    assert data.fingerprint["train"] == load(tmp_path).fingerprint["train"]
    assert data.size is None


def test_patterns_relative_to_the_data_folder_and_holdouts(tmp_path):
    write_set(tmp_path / "some", val=0)
    data = load("some/train-{0..2}.tar".replace("{0..2}", "{000..001}"), dir=str(tmp_path))
    assert (len(data.train) + len(data.val), data.val_name) == (14, "holdout 10% of train")
    assert sorted(numbers(data.train) + numbers(data.val)) == [f"{n:05}.png" for n in range(14)]
    for part in (data.train, data.val):
        for n in range(len(part)):
            assert part.labels[n] == int(numbers(part)[n][:5]) % 3
            assert part.content(n) == encoded(int(numbers(part)[n][:5]))


@pytest.mark.parametrize(
    ("names", "train", "val", "val_name"),
    [
        (["imagenet1k-train-0000.tar", "imagenet1k-validation-00.tar"], 1, 1, "validation"),
        (["a.tar", "b.tar"], 2, 0, ""),
        (["train.tar", "test.tar", "val.tar"], 1, 1, "validation"),
        (["train.tar", "test.tar"], 1, 1, "test"),
        (["x-train.tar", "y-val.tar"], 1, 1, "validation"),
    ],
)
def test_what_a_shard_is_for_is_in_its_name(tmp_path, names, train, val, val_name):
    for name in names:
        write_tar(tmp_path / name, samples(0, 2))
    found = webdataset.find_shards(tmp_path, ".")
    assert (len(found[0]), len(found[1]), found[2]) == (train, val, val_name)


def test_shards_of_another_set_are_not_evaluated_on(tmp_path):
    for name in ("a-train-0.tar", "b-val-0.tar", "train-0.tar", "val-0.tar"):
        write_tar(tmp_path / name, samples(0, 2))
    assert webdataset.find_shards(tmp_path, "a-train-*.tar")[1] == []
    assert [file.name for file in webdataset.find_shards(tmp_path, "train-{0..0}.tar")[1]] == ["val-0.tar"]
    assert webdataset.find_shards(tmp_path, "*.tar")[0] == [tmp_path / "a-train-0.tar", tmp_path / "train-0.tar"]


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        ("train-{000..003}.tar", r"train-003\.tar is missing"),
        ("nothing-*.tar", r"nothing-\*\.tar is missing"),
        ("empty", r"empty/\*\.tar is missing"),
        ("train-{3..0}.tar", "counts down"),
        ("train-{0..999999999}{0..999999999}.tar", "more than 100,000"),
        ("{train,train}-000.tar", "twice"),
        ("val-*.tar", "none to train on"),
    ],
)
def test_patterns_that_name_nothing(tmp_path, pattern, reason):
    write_set(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=reason):
        load(tmp_path / pattern)


@pytest.mark.parametrize(
    "listed", [{"classes.txt": "ant\nbee\ncow\n"}, {"dataset.json": json.dumps({"classes": ["ant", "bee", "cow"]})}]
)
def test_names_of_classes(tmp_path, listed):
    write_set(tmp_path)
    for name, text in listed.items():
        (tmp_path / name).write_text(text)
    assert load(tmp_path).classes == ("ant", "bee", "cow")


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_all_formats_of_tar_and_names(tmp_path, format):
    long = "folder with spaces/" * 9 + "é" * 20
    if format == tarfile.USTAR_FORMAT:
        long = "a/b/image"
    members = [
        ("./", b""),
        (f"{long}.seg.jpg", encoded(0, "JPEG")),
        (f"{long}.json", b'{"label": 1, "other": [1]}'),
        (f"{long}.txt", b"a caption"),
        ("plain.WEBP", encoded(1, "WEBP")),
        ("plain.cls", b" 2\n"),
        ("__index__", b"no dot: passed over"),
        ("other/plain.JPEG", encoded(2, "JPEG")),
        ("other/plain.cls", b"0"),
    ]
    write_tar(tmp_path / "train.tar", members, format=format)
    write_tar(tmp_path / "test.tar", samples(0, 2))
    data = load(tmp_path)
    assert data.train.labels.tolist() == [1, 2, 0]
    assert numbers(data.train) == [f"{long}.seg.jpg", "plain.webp", "other/plain.jpeg"]
    assert [data.train.content(n) for n in range(3)] == [encoded(0, "JPEG"), encoded(1, "WEBP"), encoded(2, "JPEG")]


IMAGE = encoded(0)


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ([("a.png", IMAGE)], r"train\.tar, a: the sample has no label"),
        ([("a.cls", b"1")], r"train\.tar, a: the sample has no image: \.cls"),
        ([("a.png", IMAGE), ("a.jpg", IMAGE), ("a.cls", b"1")], "several images: .png and .jpg"),
        ([("a.png", IMAGE), ("b.cls", b"1")], "a: the sample has no label"),
        ([("a.png", IMAGE), ("a.cls", b"one")], r"train\.tar, a\.cls: the label is not a whole number: 'one'"),
        ([("a.png", IMAGE), ("a.cls", b"")], "not a whole number"),
        ([("a.png", IMAGE), ("a.cls", b"9" * 5000)], "not a whole number"),
        ([("a.png", IMAGE), ("a.cls", b"9" * 30)], "not a whole number"),
        ([("a.png", IMAGE), ("a.json", b'{"label": true}')], "an object with a whole number"),
        ([("a.png", IMAGE), ("a.json", b'{"label": "1"}')], "an object with a whole number"),
        ([("a.png", IMAGE), ("a.json", b"[" * 100_000)], "an object with a whole number"),
        ([("a.png", IMAGE), ("a.json", b"[1]")], "an object with a whole number"),
        ([("a.png", b""), ("a.cls", b"1")], r"a\.png: the image is empty"),
        ([("a.png", IMAGE), ("a.cls", b"-1")], r"a\.png: label -1 is out of range"),
        ([("a.png", IMAGE), ("a.cls", b"4000000000")], "label 4000000000 is out of range; there are 1000000 classes"),
        ([], "has no images"),
    ],
)
def test_wrong_samples_are_named(tmp_path, members, reason):
    write_tar(tmp_path / "train.tar", members)
    write_tar(tmp_path / "val.tar", samples(0, 2))
    with pytest.raises(UserError, match=reason) as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_member_that_is_no_image_is_named_when_it_is_met(tmp_path):
    write_tar(tmp_path / "train.tar", [("a.png", b"no image"), ("a.cls", b"0"), *samples(1, 3)])
    write_tar(tmp_path / "val.tar", samples(5, 3))
    part = load(tmp_path).train
    with pytest.raises(UserError, match=r"train\.tar, a\.png: no image of a known format"):
        part.image(0)


@pytest.mark.parametrize(("name", "mode"), [("gzip", "w:gz"), ("bzip2", "w:bz2"), ("xz", "w:xz")])
def test_compressed_archives_are_refused(tmp_path, name, mode):
    with tarfile.open(tmp_path / "train.tar", mode) as archive:
        archive.addfile(tarfile.TarInfo("a"))
    with pytest.raises(UserError, match=rf"train\.tar is compressed \({name}\)"):
        load(tmp_path)


def test_an_archive_cut_short_anywhere_is_named(tmp_path):
    write_set(tmp_path, train=1, per_shard=6)
    file = tmp_path / "train-000.tar"
    whole = file.read_bytes()
    end = len(whole.rstrip(b"\0"))
    end += -end % 512
    for length in [*range(0, end, 173), *range(0, end + 1, 512)]:
        file.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"train-000\.tar"):
            load(tmp_path)
    # An empty record is enough of an end.
    file.write_bytes(whole[: end + 512])
    assert len(load(tmp_path).train) == 6


def test_a_damaged_header_loses_nothing_silently(tmp_path):
    write_set(tmp_path, train=1, per_shard=6)
    file = tmp_path / "train-000.tar"
    whole = bytearray(file.read_bytes())
    with tarfile.open(file) as archive:
        offset = archive.getmembers()[4].offset
    whole[offset + 150] ^= 1  # the checksum
    file.write_bytes(whole)
    with pytest.raises(UserError, match=r"train-000\.tar is damaged after '00001\.cls': no header is at byte"):
        load(tmp_path)


def test_a_shard_that_shrinks_later_is_named(tmp_path):
    write_set(tmp_path)
    data = load(tmp_path)
    os.truncate(tmp_path / "train-001.tar", 5000)
    with pytest.raises(UserError, match=r"train-001\.tar, 0001\d\.png: the file is cut short: it has \d+ of \d+ bytes"):
        [data.train.content(n) for n in range(len(data.train))]
    (tmp_path / "val-000.tar").unlink()
    with pytest.raises(UserError, match=r"val-000\.tar cannot be read: No such file"):
        data.val.content(0)


def scans(monkeypatch) -> list[str]:
    """Names of the archives whose headers are read from now on."""
    seen, scan = [], webdataset.scan_tar
    monkeypatch.setattr(webdataset, "scan_tar", lambda file: (seen.append(file.name), scan(file))[1])
    return seen


def test_headers_are_read_once(tmp_path, monkeypatch):
    write_set(tmp_path / "set")
    seen = scans(monkeypatch)
    first = load(tmp_path / "set").fingerprint
    assert len(seen) == 4
    assert load(tmp_path / "set").fingerprint == first
    assert len(seen) == 4
    # Another file under the name is looked at again.
    write_tar(tmp_path / "set" / "train-001.tar", samples(50, 7))
    assert load(tmp_path / "set").fingerprint != first
    assert seen[4:] == ["train-001.tar"]
    # So is one whose table is damaged, in any way.
    for kept in (tmp_path / "cache" / "norm-matters" / "shards").iterdir():
        data = bytearray(kept.read_bytes())
        data[len(data) // 2] ^= 1
        kept.write_bytes(data)
    load(tmp_path / "set")
    assert len(seen) == 9


def test_nowhere_to_keep_tables_is_no_error(tmp_path, monkeypatch):
    (tmp_path / "cache").write_text("a file in the way")
    write_set(tmp_path / "set")
    assert len(load(tmp_path / "set").train) == 21


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_hostile_table_is_refused(data):
    """Tables with a right checksum and wrong numbers."""
    table = shards.Shard(
        np.array([512, 2048]), np.array([100, 200]), np.array([0, 1]), webdataset_names(["a.png", "b.png"])
    )
    packed = shards.pack_shards([table, table])
    arrays = dict(zip(shards._COLUMNS, shards.unpack_arrays(packed, shards._COLUMNS), strict=True))
    name = data.draw(st.sampled_from(shards._COLUMNS))
    array = arrays[name].copy()
    if data.draw(st.booleans()) or not len(array):
        array = np.resize(array, data.draw(st.integers(0, 9)))
    else:
        info = np.iinfo(array.dtype)
        place = data.draw(st.integers(0, len(array) - 1))
        array[place] = data.draw(
            st.one_of(st.integers(int(info.min), int(info.max)), st.sampled_from([0, 1, int(info.min), int(info.max)]))
        )
    try:
        found = shards.unpack_shards(shards.pack_arrays({**arrays, name: array}), [4096, 4096])
    except ValueError:
        return
    for shard in found:
        assert len(shard.offsets) == len(shard.sizes) == len(shard.labels) == len(shard.keys)
        assert all(0 <= offset <= offset + size <= 4096 for offset, size in zip(*shard[:2], strict=True))
    # No name is lost or read twice.
    assert sum(len(key.encode(errors="surrogateescape")) for shard in found for key in shard.keys) == len(
        array if name == "text" else arrays["text"]
    )


def test_a_table_whose_names_overlap_is_refused():
    table = shards.Shard(np.zeros(3, int), np.zeros(3, int), np.zeros(3, int), webdataset_names(["aa", "bb", "cc"]))
    arrays = dict(zip(shards._COLUMNS, shards.unpack_arrays(shards.pack_shards([table]), shards._COLUMNS), strict=True))
    with pytest.raises(ValueError, match="names are cut"):
        shards.unpack_shards(shards.pack_arrays({**arrays, "key_ends": np.array([4, 2, 6])}), [9])


def webdataset_names(names):
    from norm_matters.datasets.names import Names

    return Names.of(names)


@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damage_anywhere_is_one_line_or_changes_nothing_else(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("damaged")
    write_set(folder, train=1, per_shard=3, val=2)
    file = folder / "train-000.tar"
    content = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        # Headers more often than images.
        place = 512 * data.draw(st.integers(0, len(content) // 512 - 1)) + data.draw(st.integers(0, 511))
        content[place] = data.draw(st.integers(0, 255))
    file.write_bytes(content)
    try:
        images = load(folder).train
        for n in range(len(images)):
            images.image(n)
    except UserError as error:
        told = error.problems
    else:
        told = ("all is well",)
    assert told
    assert not any("\n" in line for line in told)


def test_images_lie_in_blocks_where_there_are_many_bytes(tmp_path, monkeypatch):
    write_set(tmp_path, train=3, per_shard=30)
    assert load(tmp_path).train.layout is None
    monkeypatch.setattr(stored, "LARGE", 1000)
    monkeypatch.setattr(stored, "BLOCK_BYTES", 4096)
    images = load(tmp_path).train
    assert images.layout is not None
    assert images.layout.blocks.sum() == 90
    assert len(images.layout.blocks) > 12
    # No block has images of two shards, or from afar.
    assert isinstance(images, StoredImages)
    first = 0
    for length in images.layout.blocks:
        inside = range(first, first + length)
        assert len({images.name(n).partition(",")[0] for n in inside}) == 1
        assert np.ptp(images.store.offsets[first : first + length]) < 4096
        first += length
    assert [images.content(n) for n in range(90)] == [encoded(n) for n in range(90)]
    # Half of the images are in the same blocks.
    half = images.subset(np.arange(0, 90, 2))
    assert half.layout is not None
    assert half.layout.blocks.sum() == 45
    assert abs(len(half.layout.blocks) - len(images.layout.blocks)) <= 3
    quarter = half.subset(np.arange(1, 45, 2))
    assert [quarter.content(n) for n in range(22)] == [encoded(4 * n + 2) for n in range(22)]
    assert quarter.labels.tolist() == [(4 * n + 2) % 3 for n in range(22)]


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("workers", [0, 2])
def test_every_image_once_whatever_the_processes(tmp_path, monkeypatch, world, workers):
    monkeypatch.setattr(stored, "LARGE", 1000)
    monkeypatch.setattr(stored, "BLOCK_BYTES", 2048)
    monkeypatch.setattr(stored, "WINDOW", 40)
    monkeypatch.setattr(stored, "MAX_OPEN", 2)
    write_set(tmp_path, train=5, per_shard=24, val=7)
    data = load(tmp_path)
    assert data.train.layout is not None
    for images, train in ((data.train, True), (data.val, False)):
        options = {"batch_size": 12 if train else 2, "train": train, "seed": 1, "workers": workers, "world": world}
        loaders = [Loader(images, PLAN, rank=rank, **options) for rank in range(world)]
        alone = Loader(images, PLAN, **{**options, "world": 1, "workers": 0})
        for epoch in (0, 1):
            seen = [list(loader.epoch(epoch)) for loader in loaders]
            indices = np.concatenate([batch.indices for batches in seen for batch in batches])
            assert sorted(indices.tolist()) == list(range(len(images)))
            # The same pixels as one process sees, for every image.
            expected = {int(i): x for b in alone.epoch(epoch) for i, x in zip(b.indices, b.images, strict=True)}
            for batch in (batch for batches in seen for batch in batches):
                assert batch.labels.tolist() == images.labels[batch.indices].tolist()
                assert all(expected[int(i)].equal(x) for i, x in zip(batch.indices, batch.images, strict=True))
            # From the middle of an epoch on, it is the rest of the whole one.
            tail = list(loaders[0].epoch(epoch, start=2))
            assert [b.indices.tolist() for b in tail] == [b.indices.tolist() for b in seen[0][2:]]
            assert all(a.images.equal(b.images) for a, b in zip(tail, seen[0][2:], strict=True))
        for loader in loaders:
            loader.close()


def frozen_objects(image: Image.Image) -> torch.Tensor:
    return torch.full((1, 1, 1), float(gc.get_freeze_count()))


def test_workers_do_not_copy_what_they_inherit(tmp_path):
    """They share their parent's memory as long as nobody writes to it; a search for garbage would."""
    write_set(tmp_path)
    images = load(tmp_path).train
    loader = Loader(images, PLAN, batch_size=7, train=False, seed=0, workers=2, transform=frozen_objects)
    assert all((batch.images > 10_000).all() for batch in loader.epoch(0))
    loader.close()
    assert gc.get_freeze_count() == 0


def test_images_travel_to_workers_that_are_not_forked(tmp_path):
    write_set(tmp_path)
    images = load(tmp_path).train
    images.content(0)
    copy = pickle.loads(pickle.dumps(images))
    assert [copy.content(n) for n in range(21)] == [encoded(n) for n in range(21)]
    # Nor does its end close the files of the first.
    del copy
    assert [images.content(n) for n in range(21)] == [encoded(n) for n in range(21)]


def test_files_are_closed(tmp_path, monkeypatch):
    monkeypatch.setattr(stored, "MAX_OPEN", 2)
    write_set(tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    images = load(tmp_path).train
    [images.content(n) for n in range(21)]
    assert len(os.listdir("/proc/self/fd")) == before + 2
    del images
    assert len(os.listdir("/proc/self/fd")) == before
