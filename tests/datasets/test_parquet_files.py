import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from norm_matters.core.config import DataConfig
from norm_matters.core.errors import UserError
from norm_matters.datasets import EncodedImages, ResidentImages, load_dataset

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

RNG = np.random.default_rng(0)


def png(width: int = 8, height: int | None = None) -> bytes:
    buffer = io.BytesIO()
    shape = (height or width, width, 3)
    Image.fromarray(RNG.integers(0, 256, shape, dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def write(path: Path, labels, *, images=None, label="label", image="image", names=None) -> list[bytes]:
    """A file in the Hugging Face layout; the bytes of its images."""
    images = images or [png() for _ in labels]
    table = pa.table({image: [{"bytes": b, "path": None} for b in images], label: labels})
    if names:
        features = {"info": {"features": {label: {"names": names, "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)
    return images


def load(path: Path, **options):
    return load_dataset(DataConfig(name=f"parquet:{path}", **options))


@pytest.mark.parametrize(
    ("folder", "val", "val_name"),
    [(".", "test.parquet", "test"), ("data", "validation-00000-of-00001.parquet", "validation")],
)
def test_small_images_are_held_in_memory(tmp_path, folder, val, val_name):
    names = ["ant", "bee", "cow"]
    parts = [
        write(tmp_path / folder / f"train-0000{i}.parquet", [0, 1, 2, 2], names=names, image="img") for i in range(2)
    ]
    write(tmp_path / folder / val, [2, 1, 0], image="img")
    data = load(tmp_path)
    assert isinstance(data.train, ResidentImages)
    assert (data.classes, data.val_name, data.size) == (tuple(names), val_name, 8)
    assert data.train.labels.tolist() == [0, 1, 2, 2] * 2
    assert data.val.labels.tolist() == [2, 1, 0]
    for index, content in enumerate(parts[0] + parts[1]):
        assert np.array_equal(data.train.image(index), Image.open(io.BytesIO(content)))


@pytest.mark.parametrize(
    "images",
    [[png(8), png(9)] * 5, [png(65)] * 10, [png(8, 9)] * 10, [png(9, 8)] * 10],
    ids=["sizes differ", "large", "tall", "wide"],
)
def test_other_images_stay_encoded(tmp_path, images):
    write(tmp_path / "mine.parquet", [0, 1] * 5, images=images)
    data = load(tmp_path / "mine.parquet")
    assert isinstance(data.train, EncodedImages)
    assert data.size is None
    assert data.val_name == "holdout 10% of train"
    assert data.preprocessing(crop="inception").input_size == 224


def test_a_part_of_other_size_keeps_both_encoded(tmp_path):
    write(tmp_path / "train.parquet", [0, 1])
    write(tmp_path / "test.parquet", [0, 1], images=[png(9)] * 2)
    data = load(tmp_path)
    assert isinstance(data.train, EncodedImages)
    assert isinstance(data.val, EncodedImages)


@pytest.mark.parametrize(
    ("labels", "names", "classes", "numbers"),
    [
        ([0, 3, 0, 3] * 5, None, "0123", [0, 3]),
        (["dog", "cat"] * 10, None, ["cat", "dog"], [1, 0]),
        (["dog", "cat"] * 10, ["dog", "cat", "eel"], ["dog", "cat", "eel"], [0, 1]),
    ],
)
def test_classes(tmp_path, labels, names, classes, numbers):
    write(tmp_path / "one.parquet", labels, names=names, label="labels")
    data = load(tmp_path / "one.parquet")
    assert data.classes == tuple(classes)
    assert sorted(np.unique(data.train.labels)) == sorted(numbers)
    assert len(data.val) == 2


def test_labels_text_goes_to_its_number(tmp_path):
    write(tmp_path / "train.parquet", ["dog", "cat", "dog"])
    write(tmp_path / "test.parquet", ["cat", "dog"])
    data = load(tmp_path)
    assert (data.train.labels.tolist(), data.val.labels.tolist()) == ([1, 0, 1], [0, 1])
    write(tmp_path / "test.parquet", ["cat", "fox"])
    with pytest.raises(UserError, match=r"test\.parquet, row 1: label 'fox' is none of the 2 classes"):
        load(tmp_path)


@pytest.mark.parametrize("wrong", [-1, 2])
def test_labels_out_of_range_are_named(tmp_path, wrong):
    write(tmp_path / "train.parquet", [0, 1, 0])
    write(tmp_path / "test.parquet", [0, wrong])
    with pytest.raises(UserError, match=rf"label {wrong} is out of range"):
        load(tmp_path)


def test_wrong_files_are_refused(tmp_path):
    with pytest.raises(UserError, match="no such folder or file"):
        load(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"train\*\.parquet is missing"):
        load(tmp_path)
    bad = tmp_path / "train.parquet"
    bad.write_text("hello")
    with pytest.raises(UserError, match=r"train\.parquet is no parquet file") as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)
    pq.write_table(pa.table({"text": ["a"], "label": [0]}), bad)
    with pytest.raises(UserError, match=r"no column of images .*it has: text, label"):
        load(tmp_path)
    write(bad, [0, 1], label="kind")
    with pytest.raises(UserError, match=r"no column 'label'; it has: image, kind"):
        load(tmp_path)


def test_a_file_cut_short_is_named(tmp_path):
    write(tmp_path / "train.parquet", [0, 1] * 50)
    data = bytearray((tmp_path / "train.parquet").read_bytes())
    # The directory at the end stays whole, the pages before it do not.
    data[100:2000] = bytes(1900)
    (tmp_path / "train.parquet").write_bytes(data)
    with pytest.raises(UserError, match=r"train\.parquet"):
        load(tmp_path)


def test_files_with_other_columns_are_named(tmp_path):
    write(tmp_path / "train.parquet", [0, 1])
    write(tmp_path / "test.parquet", [0, 1], label="labels")
    with pytest.raises(UserError, match=r"test\.parquet"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("labels", "images", "reason"),
    [
        ([0, 1], [png(), None], r"train\.parquet, row 1 has no bytes"),
        ([0, None], [png(), png()], r"row 1: label 'None'"),
        ([0.5, 1.0], [png(), png()], r"row 0: label '0.5'"),
        ([0, 1], [png(), b"not an image"], r"train\.parquet, row 1: no image"),
    ],
)
def test_wrong_rows_are_named(tmp_path, labels, images, reason):
    write(tmp_path / "train.parquet", labels, images=images)
    with pytest.raises(UserError, match=reason):
        load(tmp_path)


def test_missing_pyarrow_is_said(tmp_path, monkeypatch):
    write(tmp_path / "train.parquet", [0, 1])
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(UserError, match="pip install"):
        load(tmp_path)
