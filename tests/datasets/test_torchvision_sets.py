"""CIFAR, SVHN and STL-10, from small files in their formats."""

import hashlib
import pickle
import socket
from pathlib import Path

import numpy as np
import pytest
import scipy.io

from norm_matters.core.config import DataConfig
from norm_matters.core.errors import StorageError, UserError
from norm_matters.core.torchvision import torchvision
from norm_matters.datasets import fetch, load_dataset

RNG = np.random.default_rng(0)


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def write_cifar(root: Path, monkeypatch, title: str) -> np.ndarray:
    """Files as torchvision wants them, whose checksums it takes for the known ones; the training pixels."""
    reader = getattr(torchvision.datasets, title)
    folder = root / reader.base_folder
    folder.mkdir(parents=True)
    label_key, count = ("labels", 10) if title == "CIFAR10" else ("fine_labels", 100)
    pixels = []
    for name in ("train_list", "test_list"):
        files = []
        for file, _ in getattr(reader, name):
            data = RNG.integers(0, 256, (count, 3072), dtype=np.uint8)
            if name == "train_list":
                pixels.append(data)
            (folder / file).write_bytes(pickle.dumps({"data": data, label_key: list(range(count))}))
            files.append([file, md5(folder / file)])
        monkeypatch.setattr(reader, name, files)
    meta = dict(reader.meta)
    (folder / meta["filename"]).write_bytes(pickle.dumps({meta["key"]: [f"class {i}" for i in range(count)]}))
    monkeypatch.setattr(reader, "meta", {**meta, "md5": md5(folder / meta["filename"])})
    return np.concatenate(pixels).reshape(-1, 3, 32, 32)


@pytest.mark.parametrize("title", ["CIFAR10", "CIFAR100"])
def test_cifar(tmp_path, monkeypatch, title):
    pixels = write_cifar(tmp_path, monkeypatch, title)
    data = load_dataset(DataConfig(name=title.lower(), dir=str(tmp_path)))
    assert np.array_equal(data.train.pixels.numpy(), pixels)
    classes = len(data.classes)
    assert classes == int(title[5:])
    assert np.array_equal(data.val.labels, np.arange(classes))
    assert data.classes[3] == "class 3"
    assert (data.size, data.pad, data.flip, data.val_name) == (32, 4, True, "test")


def test_cifar_that_is_missing_or_damaged(tmp_path, monkeypatch):
    config = DataConfig(name="cifar10", dir=str(tmp_path))
    with pytest.raises(UserError, match="data_batch_1 is missing; --download"):
        load_dataset(config)
    write_cifar(tmp_path, monkeypatch, "CIFAR10")
    victim = tmp_path / "cifar-10-batches-py" / "data_batch_2"
    # A pickle that would run code: never opened, since its checksum is wrong.
    victim.write_bytes(b"cos\nsystem\n(S'touch " + str(tmp_path / "canary").encode() + b"'\ntR.")
    with pytest.raises(UserError, match="checksum"):
        load_dataset(config)
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("folder", [".", "svhn"])
def test_svhn(tmp_path, monkeypatch, folder):
    reader = torchvision.datasets.SVHN
    root = tmp_path / folder
    root.mkdir(exist_ok=True)
    split_list, pixels = dict(reader.split_list), {}
    for split in ("train", "test"):
        pixels[split] = RNG.integers(0, 256, (32, 32, 3, 20), dtype=np.uint8)
        labels = np.arange(1, 21).reshape(-1, 1) % 10
        labels[labels == 0] = 10
        path = root / split_list[split][1]
        scipy.io.savemat(path, {"X": pixels[split], "y": labels.astype(np.uint8)})
        split_list[split] = [*split_list[split][:2], md5(path)]
    monkeypatch.setattr(reader, "split_list", split_list)
    config = DataConfig(name="svhn", dir=str(tmp_path))
    data = load_dataset(config)
    assert np.array_equal(data.train.pixels.numpy(), pixels["train"].transpose(3, 2, 0, 1))
    assert np.array_equal(data.val.labels, np.arange(1, 21) % 10)
    assert not data.flip
    path.write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"test_32x32\.mat is damaged"):
        load_dataset(config)


def write_stl10(root: Path) -> np.ndarray:
    folder = root / "stl10_binary"
    folder.mkdir()
    pixels = RNG.integers(0, 256, (20, 3, 96, 96), dtype=np.uint8)
    for part in ("train", "test"):
        (folder / f"{part}_X.bin").write_bytes(pixels.transpose(0, 1, 3, 2).tobytes())
        (folder / f"{part}_y.bin").write_bytes(bytes(i % 10 + 1 for i in range(20)))
    (folder / "class_names.txt").write_text(
        "\n".join(["airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck"])
    )
    return pixels


def test_stl10(tmp_path):
    config = DataConfig(name="stl10", dir=str(tmp_path))
    with pytest.raises(UserError, match=r"train_X\.bin is missing; --download"):
        load_dataset(config)
    pixels = write_stl10(tmp_path)
    data = load_dataset(config)
    assert np.array_equal(data.train.pixels.numpy(), pixels)
    assert np.array_equal(data.val.labels, np.arange(20) % 10)
    assert data.classes[:2] == ("airplane", "bird")
    (tmp_path / "stl10_binary" / "train_X.bin").write_bytes(b"\0" * 1000)
    with pytest.raises(UserError, match=r"train_X\.bin is damaged"):
        load_dataset(config)


@pytest.mark.parametrize("name", ["cifar10", "svhn", "stl10", "mnist"])
def test_download_without_a_network_is_one_clear_line(tmp_path, monkeypatch, name):
    def unreachable(*args, **kwargs):
        raise socket.gaierror(-3, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    with pytest.raises(UserError, match=r"--download: .* could not be fetched") as caught:
        load_dataset(DataConfig(name=name, dir=str(tmp_path), download=True))
    assert caught.value.exit_status == 2
    assert "\n" not in str(caught.value)


def test_download_into_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be written"):
        fetch.download("MNIST", tmp_path / "file")
