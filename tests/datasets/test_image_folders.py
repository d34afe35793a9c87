import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from norm_matters.core.config import DataConfig
from norm_matters.core.errors import UserError
from norm_matters.datasets import Loader, load_dataset


def write_images(root: Path, classes: dict[str, int], ending: str = ".png") -> None:
    """So many images per class folder, of various sizes and modes."""
    rng = np.random.default_rng(0)
    modes = ("RGB", "L", "RGBA", "P", "1")
    for name, count in classes.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for number in range(count):
            pixels = rng.integers(0, 256, (rng.integers(20, 40), rng.integers(20, 40), 3), dtype=np.uint8)
            image = Image.fromarray(pixels)
            image.convert(modes[number % len(modes)] if ending == ".png" else "RGB").save(
                root / name / f"{number:03}{ending}"
            )


def load(root: Path, **options):
    return load_dataset(DataConfig(name=f"imagefolder:{root}", **options))


@pytest.mark.parametrize(("val", "val_name"), [("val", "validation"), ("validation", "validation"), ("test", "test")])
def test_train_and_val_folders(tmp_path, val, val_name):
    write_images(tmp_path / "train", {"cat": 5, "dog": 6})
    write_images(tmp_path / val, {"cat": 2, "dog": 3})
    data = load(tmp_path)
    assert (data.classes, data.val_name) == (("cat", "dog"), val_name)
    assert np.bincount(data.train.labels).tolist() == [5, 6]
    assert np.bincount(data.val.labels).tolist() == [2, 3]
    assert (data.size, data.channels) == (None, 3)
    assert data.train.name(0) == str(tmp_path / "train" / "cat" / "000.png")
    assert data.train.image(0).mode == "RGB"


def test_val_goes_before_test(tmp_path):
    for part in ("train", "val", "test"):
        write_images(tmp_path / part, {"cat": 2, "dog": 2})
    assert load(tmp_path).val.name(0) == str(tmp_path / "val" / "cat" / "000.png")


def test_class_folders_alone_get_a_holdout(tmp_path):
    write_images(tmp_path, {"cat": 20, "dog": 30})
    data = load(tmp_path)
    assert data.val_name == "holdout 10% of train"
    assert np.bincount(data.val.labels).tolist() == [2, 3]
    names = {part.name(i) for part in (data.train, data.val) for i in range(len(part))}
    assert len(names) == 50


def test_train_folder_alone_gets_a_holdout(tmp_path):
    write_images(tmp_path / "train", {"cat": 10, "dog": 10})
    data = load(tmp_path)
    assert (data.val_name, len(data.val)) == ("holdout 10% of train", 2)


def test_relative_to_the_data_folder(tmp_path):
    write_images(tmp_path / "pets", {"cat": 3, "dog": 3})
    assert len(load_dataset(DataConfig(name="imagefolder:pets", dir=str(tmp_path))).train) == 4


def test_files_that_are_no_images_are_passed_over(tmp_path):
    write_images(tmp_path, {"cat": 3, "dog": 3, ".hidden": 2})
    write_images(tmp_path / "cat", {"deeper": 2}, ".JPG")
    for name in ("Thumbs.db", "notes.txt", "._000.png"):
        (tmp_path / "cat" / name).write_bytes(b"x")
    data = load(tmp_path)
    assert data.classes == ("cat", "dog")
    assert len(data.train) + len(data.val) == 8


def test_wrong_folders_are_refused(tmp_path):
    with pytest.raises(UserError, match="nowhere is no folder"):
        load(tmp_path / "nowhere")
    with pytest.raises(UserError, match="has no folders"):
        load(tmp_path)
    write_images(tmp_path, {"cat": 3})
    with pytest.raises(UserError, match="one class only \\('cat'\\)"):
        load(tmp_path)
    (tmp_path / "dog").mkdir()
    with pytest.raises(UserError, match="dog has no images"):
        load(tmp_path)


def test_classes_that_differ_are_named(tmp_path):
    write_images(tmp_path / "train", {"cat": 1, "dog": 1, "fox": 1})
    write_images(tmp_path / "val", {"cat": 1, "hen": 1, "fox": 1})
    with pytest.raises(UserError, match="train lacks 'hen'; val lacks 'dog'"):
        load(tmp_path)


def test_fingerprint_changes_with_the_files(tmp_path):
    write_images(tmp_path, {"cat": 10, "dog": 10})
    first = load(tmp_path).fingerprint
    assert load(tmp_path).fingerprint == first
    shutil.copy(tmp_path / "dog" / "000.png", tmp_path / "dog" / "010.png")
    assert load(tmp_path).fingerprint != first


def test_images_reach_the_network(tmp_path):
    write_images(tmp_path, {"cat": 8, "dog": 8})
    data = load(tmp_path)
    for crop in ("inception", "pad"):
        plan = data.preprocessing(crop=crop, input_size=24)
        loader = Loader(data.train, plan, batch_size=7, train=True, seed=0)
        batches = list(loader.epoch(0))
        assert [tuple(b.images.shape) for b in batches] == [(7, 3, 24, 24)] * 2
        assert not batches[0].images.equal(next(loader.epoch(1)).images)


def test_broken_images_are_named_when_they_are_met(tmp_path):
    write_images(tmp_path / "train", {"cat": 4, "dog": 4})
    write_images(tmp_path / "val", {"cat": 1, "dog": 1})
    (tmp_path / "train" / "dog" / "002.jpg").write_text("not an image")
    data = load(tmp_path)
    loader = Loader(data.train, data.preprocessing(crop="inception"), batch_size=9, train=True, seed=0)
    with pytest.raises(UserError, match=r"dog/002\.jpg: no image"):
        list(loader.epoch(0))


def test_imagenet(tmp_path):
    config = DataConfig(name="imagenet", dir=str(tmp_path))
    with pytest.raises(UserError, match=r"imagenet/train is missing; --data-dir"):
        load_dataset(config)
    folders = {"n01440764": 2, "n01443537": 2}
    for part in ("train", "val"):
        write_images(tmp_path / "imagenet" / part, folders, ".JPEG")
    data = load_dataset(config)
    assert (data.classes, data.val_name, data.epochs) == (tuple(folders), "validation", 90)
    assert data.mean == (0.485, 0.456, 0.406)
    (tmp_path / "imagenet" / "LOC_synset_mapping.txt").write_text("n01440764 tench, Tinca tinca\nn01443537 goldfish\n")
    inside = DataConfig(name="imagenet", dir=str(tmp_path / "imagenet"))
    assert load_dataset(inside).classes == ("tench, Tinca tinca", "goldfish")
