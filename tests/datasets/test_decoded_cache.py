import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from norm_matters.core.config import DataConfig
from norm_matters.core.errors import StorageError
from norm_matters.datasets import ResidentImages, load_dataset
from norm_matters.datasets.cache import cache_folder, cache_key, read_cached, write_cached
from norm_matters.datasets.images import file_size

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache of the test's own, used for sets of any size."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("norm_matters.datasets.parquet.CACHED_FROM", 1)
    return tmp_path / "cache" / "norm-matters" / "decoded"


def write_set(folder: Path, seed: int = 0, labels=(0, 1, 2, 1), names=None) -> str:
    """A small set in the Hugging Face layout; its name."""
    from PIL import Image

    draw = np.random.default_rng(seed)
    folder.mkdir(exist_ok=True)
    for part in ("train", "test"):
        cells = []
        for number in range(len(labels)):
            path = folder / f"{number}.png"
            Image.fromarray(draw.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(path)
            cells.append({"bytes": path.read_bytes(), "path": None})
        table = pa.table({"image": cells, "label": list(labels)})
        if names:
            features = {"info": {"features": {"label": {"names": names}}}}
            table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
        pq.write_table(table, folder / f"{part}.parquet")
    return f"parquet:{folder}"


def load(name: str):
    return load_dataset(DataConfig(name=name))


@pytest.fixture
def never_decode(monkeypatch):
    def start():
        monkeypatch.setattr("norm_matters.datasets.parquet._decode_all", lambda *_: pytest.fail("decoded again"))

    return start


def test_the_second_start_decodes_nothing_and_finds_the_same(tmp_path, cache, never_decode):
    name = write_set(tmp_path / "set")
    first = load(name)
    assert len(list(cache.iterdir())) == 2
    never_decode()
    second = load(name)
    for part in ("train", "val"):
        one, other = getattr(first, part), getattr(second, part)
        assert torch.equal(one.pixels, other.pixels)
        assert np.array_equal(one.labels, other.labels)
        assert other.pixels.is_contiguous(memory_format=torch.channels_last)
        # What was stored as the digest is what would be computed.
        assert other.digest() == ResidentImages(other.pixels, other.labels, title="").digest()
    assert (first.fingerprint, first.mean, first.std) == (second.fingerprint, second.mean, second.std)


def test_what_the_pixels_follow_from_changes_the_key(tmp_path, cache):
    load(write_set(tmp_path / "set"))
    kept = set(cache.iterdir())
    # Of the same length: neither sizes nor names would tell.
    for changed in ({"seed": 1}, {"labels": (0, 1, 2, 2)}):
        data = load(write_set(tmp_path / "set", **changed))
        assert data.train.digest() == ResidentImages(data.train.pixels, data.train.labels, title="").digest()
        assert len(set(cache.iterdir()) - kept) == 2
        kept = set(cache.iterdir())
    # The same files elsewhere are the same set.
    load(write_set(tmp_path / "copy", labels=(0, 1, 2, 2)))
    assert set(cache.iterdir()) == kept


def test_the_digest_follows_the_numbers_that_other_files_give_the_labels(tmp_path):
    labels = ("cat", "dog", "dog", "cat")
    name = write_set(tmp_path / "set", labels=labels, names=["cat", "dog"])
    before, untouched = load(name).val, (tmp_path / "set" / "test.parquet").read_bytes()
    write_set(tmp_path / "set", labels=labels, names=["dog", "cat"])
    (tmp_path / "set" / "test.parquet").write_bytes(untouched)
    after = load(name).val
    assert after.labels.tolist() == (1 - before.labels).tolist()
    assert after.digest() == ResidentImages(after.pixels, after.labels, title="").digest()


def test_the_key_follows_from_contents_version_and_facts(tmp_path, monkeypatch):
    for name, content in (("a", b"1"), ("b", b"2"), ("c", b"1")):
        (tmp_path / name).write_bytes(content)
    a, b, c = (tmp_path / name for name in "abc")
    keys = {cache_key([a]), cache_key([b]), cache_key([a, b]), cache_key([b, a]), cache_key([a], "x")}
    assert len(keys) == 5
    assert cache_key([c]) == cache_key([a])
    monkeypatch.setattr("PIL.__version__", "0")
    assert cache_key([a]) not in keys


@settings(deadline=None, max_examples=60)
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), cut=st.booleans())
def test_a_damaged_file_counts_as_missing(tmp_path_factory, place, bit, cut):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        pixels = torch.arange(2 * 3 * 4 * 4, dtype=torch.uint8).view(2, 3, 4, 4)
        write_cached("key", pixels, "digest")
        found = read_cached("key")
        assert found is not None
        assert torch.equal(found[0], pixels)
        assert found[1] == "digest"
        (file,) = cache_folder().iterdir()
        data = bytearray(file.read_bytes())
        at = int(place * len(data))
        data[at] ^= 1 << bit
        file.write_bytes(data[:at] if cut else data)
        found = read_cached("key")
        # A blank more or less in the head changes nothing that is read.
        assert found is None or (torch.equal(found[0], pixels) and found[1] == "digest")
        assert not cut or found is None


def test_damage_is_repaired(tmp_path, cache):
    name = write_set(tmp_path / "set")
    expected = load(name)
    for file in cache.iterdir():
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
    damaged = {file.name: file.read_bytes() for file in cache.iterdir()}
    again = load(name)
    assert again.fingerprint == expected.fingerprint
    assert torch.equal(again.train.pixels, expected.train.pixels)
    assert all(file.read_bytes() != damaged[file.name] for file in cache.iterdir())


def test_nothing_there_and_nothing_written_is_no_error(tmp_path, monkeypatch):
    assert read_cached("nothing") is None
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert load(write_set(tmp_path / "set")).size == 8

    def full(path, data):
        raise StorageError(f"cannot write {path}: no space")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    monkeypatch.setattr("norm_matters.datasets.cache.write_file", full)
    assert load(write_set(tmp_path / "set")).size == 8


def test_small_sets_and_files_of_large_images_are_not_hashed(tmp_path, cache, monkeypatch):
    name = write_set(tmp_path / "set")
    monkeypatch.setattr("norm_matters.datasets.parquet.CACHED_FROM", 5)
    load(name)
    monkeypatch.setattr("norm_matters.datasets.parquet.CACHED_FROM", 1)
    size = file_size(str(tmp_path / "set" / "train.parquet"))
    monkeypatch.setattr("norm_matters.datasets.parquet.SMALL_FILE", size // 4 - 1)
    load(name)
    assert not cache.exists()


def test_the_folder_is_where_caches_are(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert cache_folder() == Path("/somewhere/norm-matters/decoded")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/me")
    assert cache_folder() == Path("/home/me/.cache/norm-matters/decoded")


def test_others_cannot_read_it(tmp_path, cache):
    load(write_set(tmp_path / "set"))
    assert not any(os.stat(file).st_mode & 0o007 for file in cache.iterdir())


def test_images_without_room_stay_encoded(tmp_path, monkeypatch):
    monkeypatch.setattr("norm_matters.datasets.parquet.MEMORY_SHARE", 0)
    assert load(write_set(tmp_path / "set")).size is None
