import os
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from norm_matters.core.config import DataConfig
from norm_matters.core.errors import UserError
from norm_matters.datasets import imagenet, listing, load_dataset
from norm_matters.datasets.listing import list_images

WNIDS = ("n01440764", "n01443537", "n02119789")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def photo(path: Path, shade: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (12, 10), (shade, 0, 0)).save(path, "JPEG")


def write_train(root: Path) -> None:
    for wnid in WNIDS:
        for number in range(2):
            photo(root / "train" / wnid / f"{wnid}_{number}.JPEG")


# Labels of the validation images in the order of their numbers.
VAL = (2, 0, 1, 0)


def write_flat_val(root: Path) -> None:
    for number in range(1, len(VAL) + 1):
        photo(root / "val" / f"ILSVRC2012_val_{number:08}.JPEG", number)


def load(folder: Path):
    return load_dataset(DataConfig(name="imagenet", dir=str(folder)))


def write_kaggle_labels(folder: Path) -> None:
    rows = [f"ILSVRC2012_val_{number:08},{WNIDS[label]} 1 2 3 4 " for number, label in enumerate(VAL, 1)]
    # In any order, as Kaggle has them.
    (folder / "LOC_val_solution.csv").write_text("\n".join(["ImageId,PredictionString", *rows[::-1]]))


def write_development_kit(folder: Path) -> None:
    from scipy.io import savemat

    folder.mkdir(parents=True, exist_ok=True)
    dtype = [("ILSVRC2012_ID", object), ("WNID", object), ("words", object), ("num_children", object)]
    # Its numbers are its own, and classes of classes follow.
    rows = [(2, WNIDS[0], "tench", 0), (3, WNIDS[1], "goldfish", 0), (1, WNIDS[2], "fox", 0), (4, "n00001740", "x", 2)]
    savemat(folder / "meta.mat", {"synsets": np.array(rows, dtype=dtype).reshape(-1, 1)})
    numbers = {0: 2, 1: 3, 2: 1}
    (folder / imagenet.GROUND_TRUTH).write_text("".join(f"{numbers[label]}\n" for label in VAL))


@pytest.mark.parametrize("place", [".", "imagenet", "ILSVRC/Data/CLS-LOC"])
@pytest.mark.parametrize("labels", ["folders", "kaggle", "kit", "own"])
def test_layouts(tmp_path, place, labels):
    root = tmp_path / place
    write_train(root)
    if labels == "folders":
        for number, label in enumerate(VAL, 1):
            photo(root / "val" / WNIDS[label] / f"ILSVRC2012_val_{number:08}.JPEG", number)
    else:
        write_flat_val(root)
    if labels == "kaggle":
        write_kaggle_labels(tmp_path)
    if labels == "kit":
        write_development_kit(tmp_path / "ILSVRC2012_devkit_t12" / "data")
    if labels == "own":
        lines = [f"ILSVRC2012_val_{number:08}.JPEG {WNIDS[label]}" for number, label in enumerate(VAL, 1)]
        (root / "val_labels.txt").write_text("\n".join(lines))
    data = load(tmp_path)
    assert (data.classes, data.val_name, data.epochs, data.size) == (WNIDS, "validation", 90, None)
    assert data.train.labels.tolist() == [0, 0, 1, 1, 2, 2]
    found = {Path(data.val.name(n)).stem: int(data.val.labels[n]) for n in range(4)}
    assert found == {f"ILSVRC2012_val_{number:08}": label for number, label in enumerate(VAL, 1)}
    for n in range(4):
        assert abs(data.val.image(n).getpixel((0, 0))[0] - int(Path(data.val.name(n)).stem[-8:])) <= 2


def test_names_of_classes(tmp_path):
    write_train(tmp_path)
    write_flat_val(tmp_path)
    write_kaggle_labels(tmp_path)
    (tmp_path / "words.txt").write_text("".join(f"{wnid}\tword {n}\n" for n, wnid in enumerate(WNIDS)))
    assert load(tmp_path).classes == ("word 0", "word 1", "word 2")
    (tmp_path / "LOC_synset_mapping.txt").write_text(f"{WNIDS[0]} tench, Tinca tinca\n{WNIDS[1]} goldfish\n")
    assert load(tmp_path).classes == ("tench, Tinca tinca", "goldfish", WNIDS[2])
    # Two of ImageNet's are "crane".
    lines = f"{WNIDS[0]} crane\n{WNIDS[1]} goldfish\n{WNIDS[2]} crane\n"
    (tmp_path / "LOC_synset_mapping.txt").write_text(lines)
    assert load(tmp_path).classes == (f"crane ({WNIDS[0]})", "goldfish", f"crane ({WNIDS[2]})")


def test_what_is_missing_is_said_with_where_to_get_it(tmp_path):
    with pytest.raises(UserError, match=r"imagenet/train is missing; --data-dir"):
        load(tmp_path)
    write_train(tmp_path)
    with pytest.raises(UserError, match=r"val is missing; --data-dir"):
        load(tmp_path)
    write_flat_val(tmp_path)
    with pytest.raises(
        UserError, match=r"LOC_val_solution\.csv of Kaggle.*meta\.mat of ILSVRC2012_devkit_t12\.tar\.gz"
    ):
        load(tmp_path)


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        (["ILSVRC2012_val_00000001,n01440764 1"], r"has no label for .*ILSVRC2012_val_00000002\.JPEG"),
        (["ILSVRC2012_val_00000001,tench"], r"entry 1: 'tench' is no WNID"),
        (["x"], r"entry 1: '' is no WNID"),
        ([f"ILSVRC2012_val_{n:08},n99999999 1" for n in range(1, 5)], "is of class 'n99999999', which .*train has not"),
        ([f"ILSVRC2012_val_{n:08},n01440764 1" for n in range(1, 6)], "has 4 of the 5 images that"),
    ],
)
def test_wrong_lists_of_labels(tmp_path, rows, reason):
    write_train(tmp_path)
    write_flat_val(tmp_path)
    (tmp_path / "LOC_val_solution.csv").write_text("\n".join(["ImageId,PredictionString", *rows]))
    with pytest.raises(UserError, match=reason):
        load(tmp_path)


def test_a_wrong_development_kit(tmp_path):
    write_train(tmp_path)
    write_flat_val(tmp_path)
    write_development_kit(tmp_path / "data")
    (tmp_path / "data" / imagenet.GROUND_TRUTH).write_text("1\n77\n")
    with pytest.raises(UserError, match=r"line 2: '77' is no class of .*meta\.mat"):
        load(tmp_path)
    # A class of classes is none.
    (tmp_path / "data" / imagenet.GROUND_TRUTH).write_text("4\n")
    with pytest.raises(UserError, match=r"line 1: '4' is no class of .*meta\.mat"):
        load(tmp_path)
    (tmp_path / "data" / "meta.mat").write_bytes(b"MATLAB 5.0" + bytes(range(256)))
    with pytest.raises(UserError, match=r"meta\.mat is damaged"):
        load(tmp_path)


def age(root: Path) -> None:
    """As if nothing in the folder had changed for a while."""
    before = time.time() - 100
    for folder in [root, *(path for path in root.rglob("*") if path.is_dir())]:
        os.utime(folder, (before, before))


def test_lists_are_kept_until_a_folder_changes(tmp_path, monkeypatch):
    write_train(tmp_path)
    age(tmp_path / "train")
    first = list_images(tmp_path / "train", keep=True)
    walked: list[str] = []
    walk = listing._walk
    monkeypatch.setattr(listing, "_walk", lambda *args, **options: (walked.append(args[0]), walk(*args, **options))[1])
    again = list_images(tmp_path / "train", keep=True)
    assert not walked
    assert (list(again.names), again.sizes.tolist()) == (list(first.names), first.sizes.tolist())
    assert list(first.names) == [f"{wnid}/{wnid}_{number}.JPEG" for wnid in WNIDS for number in range(2)]

    photo(tmp_path / "train" / WNIDS[1] / "another.JPEG")
    assert len(list_images(tmp_path / "train", keep=True).names) == 7
    assert walked
    # What has only just changed may change again unnoticed: it is not kept.
    walked.clear()
    list_images(tmp_path / "train", keep=True)
    assert walked
    age(tmp_path / "train")
    list_images(tmp_path / "train", keep=True)
    (tmp_path / "train" / "n99999999").mkdir()
    walked.clear()
    list_images(tmp_path / "train", keep=True)
    assert walked


def test_a_damaged_list_is_made_anew(tmp_path):
    write_train(tmp_path)
    age(tmp_path / "train")
    expected = list(list_images(tmp_path / "train", keep=True).names)
    (kept,) = (tmp_path / "cache" / "norm-matters" / "listings").iterdir()
    whole = kept.read_bytes()
    for place in range(0, len(whole), 37):
        kept.write_bytes(whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1 :])
        assert list(list_images(tmp_path / "train", keep=True).names) == expected
    for length in range(0, len(whole), 41):
        kept.write_bytes(whole[:length])
        assert list(list_images(tmp_path / "train", keep=True).names) == expected


def test_links_and_folders_that_cannot_be_read(tmp_path):
    write_train(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    photo(tmp_path / "elsewhere" / "deep" / "a.jpg")
    os.symlink(tmp_path / "elsewhere", tmp_path / "train" / "n00000001")
    os.symlink(tmp_path / "elsewhere", tmp_path / "train" / WNIDS[0] / "link")
    names = list(list_images(tmp_path / "train").names)
    assert "n00000001/deep/a.jpg" in names
    assert len(names) == 7
    os.symlink("nowhere", tmp_path / "train" / WNIDS[0] / "broken.jpg")
    with pytest.raises(UserError, match=r"broken\.jpg: No such file"):
        list_images(tmp_path / "train")
