import gzip
import struct
from pathlib import Path

import numpy as np
import pytest

from norm_matters.core.config import DataConfig
from norm_matters.core.errors import UserError
from norm_matters.datasets import idx, load_dataset
from norm_matters.datasets.idx import read_idx

FILES = {f"{part}-{what}": part for part in ("train", "t10k") for what in ("images-idx3-ubyte", "labels-idx1-ubyte")}


def idx_bytes(array: np.ndarray) -> bytes:
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.astype(np.uint8).tobytes()


def write_set(folder: Path, *, compressed: bool = False, side: int = 28) -> dict[str, np.ndarray]:
    """Four files of a small set; what they hold."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    arrays = {}
    for part, count in (("train", 30), ("t10k", 20)):
        arrays[f"{part}-images-idx3-ubyte"] = rng.integers(0, 256, (count, side, side))
        arrays[f"{part}-labels-idx1-ubyte"] = np.arange(count) % 10
    for name, array in arrays.items():
        data = idx_bytes(array)
        if compressed:
            (folder / f"{name}.gz").write_bytes(gzip.compress(data, mtime=0))
        else:
            (folder / name).write_bytes(data)
    return arrays


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize(
    ("name", "folder"),
    [("mnist", "MNIST/raw"), ("kmnist", "KMNIST/raw"), ("fashion-mnist", "."), ("fashion-mnist", "fashion-mnist")],
)
def test_sets_are_read_wherever_they_are(tmp_path, name, folder, compressed):
    arrays = write_set(tmp_path / "data" / folder, compressed=compressed)
    data = load_dataset(DataConfig(name=name, dir=str(tmp_path / "data")))
    for part, prefix in ((data.train, "train"), (data.val, "t10k")):
        assert np.array_equal(part.pixels[:, 0].numpy(), arrays[f"{prefix}-images-idx3-ubyte"])
        assert np.array_equal(part.labels, arrays[f"{prefix}-labels-idx1-ubyte"])
    assert (data.val_name, data.channels, data.size, len(data.classes)) == ("test", 1, 28, 10)
    assert data.flip == (name == "fashion-mnist")


def test_environment_names_the_folder(tmp_path, monkeypatch):
    write_set(tmp_path / "mnist")
    monkeypatch.setenv("NORM_MATTERS_DATA", str(tmp_path))
    assert len(load_dataset(DataConfig(name="mnist")).train) == 30


def test_debians_files_are_read_in_place(tmp_path, monkeypatch):
    monkeypatch.setenv("NORM_MATTERS_DATA", str(tmp_path / "empty"))
    write_set(tmp_path / "debian", compressed=True)
    monkeypatch.setitem(idx.DEBIAN, "fashion-mnist", tmp_path / "debian")
    assert len(load_dataset(DataConfig(name="fashion-mnist")).train) == 30
    # A folder that the user names is the only one looked at.
    with pytest.raises(UserError, match="train-images-idx3-ubyte is missing"):
        load_dataset(DataConfig(name="fashion-mnist", dir=str(tmp_path / "empty")))


@pytest.mark.skipif(not idx.DEBIAN["fashion-mnist"].is_dir(), reason="Debian's dataset-fashion-mnist is not installed")
def test_debians_fashion_mnist(tmp_path, monkeypatch):
    monkeypatch.setenv("NORM_MATTERS_DATA", str(tmp_path))
    data = load_dataset(DataConfig(name="fashion-mnist"))
    assert (len(data.train), len(data.val)) == (60000, 10000)
    assert np.bincount(data.train.labels).tolist() == [6000] * 10
    assert (data.mean, data.std) == ((0.286,), (0.353,))


def test_missing_files_are_named_with_what_helps(tmp_path):
    with pytest.raises(UserError, match=r"MNIST/raw/train-images-idx3-ubyte is missing; --download"):
        load_dataset(DataConfig(name="mnist", dir=str(tmp_path)))


def test_download_is_asked_of_torchvision_only_when_files_are_missing(tmp_path, monkeypatch):
    asked = []

    def fake(title, folder):
        asked.append(title)
        write_set(folder / title / "raw")

    monkeypatch.setattr(idx, "download", fake)
    config = DataConfig(name="kmnist", dir=str(tmp_path), download=True)
    assert len(load_dataset(config).train) == 30
    load_dataset(config)
    assert asked == ["KMNIST"]


GOOD = idx_bytes(np.arange(2 * 3 * 4).reshape(2, 3, 4))


def test_read_idx_keeps_shape_and_order(tmp_path):
    (tmp_path / "good").write_bytes(GOOD)
    assert np.array_equal(read_idx(tmp_path / "good"), np.arange(24).reshape(2, 3, 4))


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("empty", b""),
        ("text", b"hello world"),
        ("floats", b"\0\0\x0d" + GOOD[3:]),
        ("head-cut", GOOD[:9]),
        ("cut", GOOD[:-1]),
        ("long", GOOD + b"\0"),
        ("huge", struct.pack(">BBBB3I", 0, 0, 8, 3, 2**31, 2**31, 2**31)),
        ("not.gz", GOOD),
        ("cut.gz", gzip.compress(GOOD, mtime=0)[:-9]),
        ("damaged.gz", gzip.compress(GOOD, mtime=0)[:14] + b"\xff\xff" + gzip.compress(GOOD, mtime=0)[16:]),
        ("bomb.gz", gzip.compress(GOOD + bytes(10**6), mtime=0)),
    ],
)
def test_damaged_files_are_named(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=name):
        read_idx(tmp_path / name)


def test_images_and_labels_that_do_not_belong_together(tmp_path):
    write_set(tmp_path / "mnist")
    (tmp_path / "mnist" / "t10k-labels-idx1-ubyte").write_bytes(idx_bytes(np.zeros(19)))
    with pytest.raises(UserError, match=r"t10k-images.*do not belong together"):
        load_dataset(DataConfig(name="mnist", dir=str(tmp_path)))
