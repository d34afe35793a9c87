"""Parquet files that are read by row group, and by byte ranges."""

import io
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from norm_matters.core.config import DataConfig
from norm_matters.core.errors import UserError
from norm_matters.datasets import EncodedImages, Loader, ResidentImages, load_dataset, parquet, rowgroups
from norm_matters.datasets.rowgroups import RowGroups
from norm_matters.datasets.stored import StoredImages
from norm_matters.transforms.preprocessing import Preprocessing

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

PLAN = Preprocessing(3, 8, (0.5,) * 3, (0.2,) * 3, "pad", 2, True, 8)


@pytest.fixture(autouse=True)
def large(monkeypatch):
    monkeypatch.setattr(parquet, "LARGE", 0)
    monkeypatch.setattr(parquet, "SMALL_FILE", 0)


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(number).integers(0, 256, (9 + number % 3, 10, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write(path: Path, start: int, count: int, group: int = 5, **options) -> None:
    rows = [{"bytes": png(n), "path": f"{n}.png"} for n in range(start, start + count)]
    table = pa.table({"image": rows, "label": [n % 3 for n in range(start, start + count)]})
    pq.write_table(table, path, row_group_size=group, **options)


def write_set(folder: Path) -> None:
    write(folder / "train-0.parquet", 0, 23)
    write(folder / "train-1.parquet", 23, 12, group=4)
    write(folder / "test-0.parquet", 100, 8)


def load(path: Path):
    return load_dataset(DataConfig(name=f"parquet:{path}"))


def store_of(images) -> RowGroups:
    assert isinstance(images, StoredImages)
    assert isinstance(images.store, RowGroups)
    return images.store


def test_images_are_those_of_the_file_in_any_order(tmp_path):
    write_set(tmp_path)
    data = load(tmp_path)
    assert (len(data.train), len(data.val), data.val_name) == (35, 8, "test")
    for n in np.random.default_rng(0).permutation(35).tolist():
        assert data.train.content(n) == png(n)
    assert data.train.labels.tolist() == [n % 3 for n in range(35)]
    assert data.train.name(0) == f"{tmp_path / 'train-0.parquet'}, row 0"
    assert data.train.name(22) == f"{tmp_path / 'train-0.parquet'}, row 22"
    assert data.train.name(23) == f"{tmp_path / 'train-1.parquet'}, row 0"
    assert data.train.name(34) == f"{tmp_path / 'train-1.parquet'}, row 11"
    assert data.train.layout is not None
    assert data.train.layout.blocks.tolist() == [5, 5, 5, 5, 3, 4, 4, 4]


def test_small_sets_are_held_in_memory_as_before(tmp_path, monkeypatch):
    write_set(tmp_path)
    lazy = load(tmp_path).train
    monkeypatch.setattr(parquet, "LARGE", 2**30)
    held = load(tmp_path).train
    assert isinstance(held, EncodedImages)
    assert held.layout is None
    assert [held.content(n) for n in range(35)] == [lazy.content(n) for n in range(35)]
    assert [held.name(n) for n in range(35)] == [lazy.name(n) for n in range(35)]


def test_small_images_are_held_decoded_however_many_bytes_they_take(tmp_path, monkeypatch):
    table = pa.table({"image": [{"bytes": png(3 * n)} for n in range(9)], "label": [n % 3 for n in range(9)]})
    table = table.set_column(0, "image", pa.array([{"bytes": square(n), "path": None} for n in range(9)]))
    pq.write_table(table, tmp_path / "train.parquet")
    pq.write_table(table, tmp_path / "test.parquet")
    assert isinstance(load(tmp_path).train, StoredImages)
    monkeypatch.setattr(parquet, "SMALL_FILE", 2**14)
    assert isinstance(load(tmp_path).train, ResidentImages)


def square(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (number, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def test_no_more_row_groups_are_kept_than_agreed(tmp_path, monkeypatch):
    write_set(tmp_path)
    images = load(tmp_path).train
    store = store_of(images)
    size = int(store.groups.sizes.max())
    monkeypatch.setattr(rowgroups, "KEPT_BYTES", 4 * size)
    loads: list[tuple[int, int]] = []
    load_group = RowGroups._load
    monkeypatch.setattr(RowGroups, "_load", lambda s, f, n: (loads.append((f, n)), load_group(s, f, n))[1])
    for n in range(35):
        images.content(n)
        assert sum(int(store.groups.sizes[kept]) for kept in store._kept) <= 4 * size
    assert len(loads) == 8
    # However large the groups are, a few are kept.
    monkeypatch.setattr(rowgroups, "KEPT_BYTES", 1)
    store._kept.clear()
    for n in (0, 5, 10, 0, 5, 10):
        images.content(n)
    assert len(loads) == 11


def test_a_forked_process_keeps_nothing_of_its_parents(tmp_path, monkeypatch):
    write_set(tmp_path)
    images = load(tmp_path).train
    for n in (0, 5, 10):
        images.content(n)
    store = store_of(images)
    assert len(store._kept) == 3
    monkeypatch.setattr(rowgroups.os, "getpid", lambda: -1)
    assert images.content(5) == png(5)
    assert list(store._kept) == [1]


def test_an_epoch_reads_each_row_group_about_once(tmp_path, monkeypatch):
    for part in range(4):
        write(tmp_path / f"train-{part}.parquet", 500 * part, 500, group=10)
    write(tmp_path / "test.parquet", 0, 5)
    mean = 300
    monkeypatch.setattr(rowgroups, "KEPT_BYTES", 400 * mean)
    images = load(tmp_path).train
    store = store_of(images)
    assert 100 < store.window < 500
    loads: list[int] = []
    load_group = RowGroups._load
    monkeypatch.setattr(RowGroups, "_load", lambda s, f, n: (loads.append(n), load_group(s, f, n))[1])
    loader = Loader(images, PLAN, batch_size=20, train=True, seed=0)
    for index in loader.order(0):
        images.content(int(index))
    # 200 groups, and a window of them at both ends.
    assert len(loads) <= 200 + store.window / 10 + 5


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("workers", [0, 2])
def test_every_image_once_whatever_the_processes(tmp_path, monkeypatch, world, workers):
    monkeypatch.setattr(rowgroups, "WINDOW", 10)
    write_set(tmp_path)
    data = load(tmp_path)
    data.train.content(0)  # what the parent has open and keeps is not its children's
    options = {"batch_size": 7, "train": True, "seed": 1, "workers": workers, "world": world}
    loaders = [Loader(data.train, PLAN, rank=rank, **options) for rank in range(world)]
    alone = Loader(data.train, PLAN, batch_size=7, train=True, seed=1)
    for epoch in (0, 1):
        seen = [list(loader.epoch(epoch)) for loader in loaders]
        indices = np.concatenate([batch.indices for batches in seen for batch in batches])
        assert sorted(indices.tolist()) == list(range(35))
        expected = {int(i): x for b in alone.epoch(epoch) for i, x in zip(b.indices, b.images, strict=True)}
        for batch in (batch for batches in seen for batch in batches):
            assert all(expected[int(i)].equal(x) for i, x in zip(batch.indices, batch.images, strict=True))
        tail = list(loaders[-1].epoch(epoch, start=3))
        assert [b.indices.tolist() for b in tail] == [b.indices.tolist() for b in seen[-1][3:]]
    for loader in loaders:
        loader.close()


def test_rows_without_bytes_and_broken_images_are_named(tmp_path):
    cells = [{"bytes": png(0)}, {"bytes": None}, None, {"bytes": b"no image"}] + [{"bytes": png(1)}] * 6
    pq.write_table(pa.table({"image": cells, "label": [0, 1] * 5}), tmp_path / "train.parquet")
    write(tmp_path / "test.parquet", 0, 2)
    images = load(tmp_path).train
    for row, reason in ((1, "row 1 has no bytes"), (2, "row 2 has no bytes"), (3, "row 3: no image of a known")):
        with pytest.raises(UserError, match=rf"train\.parquet, {reason}"):
            images.image(row)
    assert images.image(4)


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damage_anywhere_is_one_line_or_changes_nothing_else(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("damaged")
    write(folder / "train.parquet", 0, 6, group=3, compression="none", write_page_checksum=True)
    content = bytearray((folder / "train.parquet").read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        near_the_end = data.draw(st.booleans())
        place = data.draw(st.integers(max(0, len(content) - 600) if near_the_end else 0, len(content) - 1))
        content[place] = data.draw(st.integers(0, 255))
    (folder / "train.parquet").write_bytes(content)
    try:
        images = load(folder / "train.parquet").train
        for n in range(len(images)):
            images.image(n)
    except UserError as error:
        told = error.problems
    else:
        told = ("all is well",)
    assert told
    assert not any("\n" in line for line in told)


def test_a_file_that_is_replaced_while_it_is_read_is_named(tmp_path):
    write_set(tmp_path)
    images = load(tmp_path).train
    write(tmp_path / "train-0.parquet", 0, 2)
    with pytest.raises(UserError, match=r"train-0\.parquet, row"):
        images.content(3)
    with pytest.raises(UserError, match=r"train-0\.parquet, row group 3 cannot be read"):
        images.content(17)


def test_the_fingerprint_follows_files_and_labels(tmp_path):
    write_set(tmp_path)
    first = load(tmp_path).fingerprint
    assert load(tmp_path).fingerprint == first
    write(tmp_path / "train-1.parquet", 24, 12, group=4)
    assert load(tmp_path).fingerprint != first
