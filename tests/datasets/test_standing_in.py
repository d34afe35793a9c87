"""Images that cannot be read: others stand in for them, alike in every process, or the run ends and names them."""

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from norm_matters.core.config import DataConfig, load_config
from norm_matters.core.errors import UserError
from norm_matters.datasets import Loader, load_dataset
from norm_matters.datasets.standing_in import check_unreadable, images_to_skip, stand_ins

HTML = b"<!DOCTYPE html><html><body>404 Not Found</body></html>"


def huge_png() -> bytes:
    """The beginning of a PNG of 400 megapixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


BAD = {
    "train/a/1.png": ("cut", "truncated"),
    "train/a/5.png": (b"", "no image of a known format"),
    "train/b/2.png": (HTML, "no image of a known format"),
    "train/c/0.png": (huge_png(), "pixels; 50 megapixels are the limit"),
}


def make(root: Path, *, bad: bool) -> Path:
    draw = np.random.default_rng(0)
    for part, count in (("train", 8), ("val", 3)):
        for label in "abc":
            (root / part / label).mkdir(parents=True)
            for number in range(count):
                pixels = draw.integers(0, 256, (16, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / part / label / f"{number}.png")
    if bad:
        for name, (content, _) in BAD.items():
            path = root / name
            path.write_bytes(path.read_bytes()[:200] if content == "cut" else content)
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("bad") / "images", bad=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("whole") / "images", bad=False)


def loader(folder: Path, policy: str = "fail", *, train: bool = True, **options) -> Loader:
    dataset = load_dataset(DataConfig(name=f"imagefolder:{folder}", input_size=16))
    images = dataset.train if train else dataset.val
    return Loader(
        images,
        dataset.preprocessing(crop="inception", input_size=16),
        batch_size=6,
        train=train,
        seed=3,
        to_skip=images_to_skip(policy),
        **options,
    )


def epoch(feeding: Loader, number: int) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    try:
        batches = list(feeding.epoch(number))
    finally:
        feeding.close()
    images, labels, indices = zip(*batches, strict=True)
    return torch.cat(images), torch.cat(labels), np.concatenate(indices)


def test_the_policy_fail_names_the_image(folder: Path) -> None:
    with pytest.raises(UserError, match=r"images/train/./\d\.png: ") as caught:
        epoch(loader(folder), 0)
    assert len(caught.value.problems) == 1


def test_others_of_the_class_stand_in_and_the_rest_is_as_without(folder: Path, whole: Path) -> None:
    feeding = loader(folder, "skip:4")
    images, labels, indices = epoch(feeding, 0)
    expected, expected_labels, expected_indices = epoch(loader(whole), 0)
    assert np.array_equal(indices, expected_indices)
    assert torch.equal(labels, expected_labels)
    bad = {index for index in range(24) if str(Path(feeding.images.name(index)).relative_to(folder)) in BAD}
    assert len(bad) == 4
    same = [bool(torch.equal(a, b)) for a, b in zip(images, expected, strict=True)]
    assert same == [index not in bad for index in indices]
    assert {str(Path(name).relative_to(folder)) for name in feeding.unreadable} == set(BAD)
    for name, reason in feeding.unreadable.items():
        assert reason.startswith(f"{name}: ")
        assert BAD[str(Path(name).relative_to(folder))][1] in reason


def test_who_stands_in_is_treated_as_the_one_it_stands_in_for(tmp_path: Path) -> None:
    """Where all images of a class are alike, nothing tells who has stood in: crop and flip are those of the place."""
    roots = [make(tmp_path / name, bad=False) for name in ("some", "all")]
    for root in roots:
        for label in "abc":
            content = (root / "train" / label / "7.png").read_bytes()
            for path in (root / "train" / label).iterdir():
                path.write_bytes(content)
    (roots[0] / "train" / "a" / "1.png").write_bytes(HTML)
    (roots[0] / "train" / "c" / "0.png").write_bytes(b"")
    mended = loader(roots[0], "skip:2")
    for number in (0, 1):
        for one, other in zip(epoch(mended, number), epoch(loader(roots[1]), number), strict=True):
            assert np.array_equal(one, other)
    assert len(mended.unreadable) == 2


def test_workers_and_ranks_change_nothing(folder: Path) -> None:
    alone = [epoch(loader(folder, "skip:4"), number) for number in (0, 1)]
    with_workers = [epoch(loader(folder, "skip:4", workers=2), number) for number in (0, 1)]
    for one, other in zip(alone, with_workers, strict=True):
        assert torch.equal(one[0], other[0])
    ranks = [epoch(loader(folder, "skip:4", rank=rank, world=2), 0) for rank in (0, 1)]
    by_index = {int(index): image for images, _, indices in ranks for image, index in zip(images, indices, strict=True)}
    for image, index in zip(alone[0][0], alone[0][2], strict=True):
        assert torch.equal(image, by_index[int(index)])


def test_evaluation_takes_every_image(folder: Path) -> None:
    path = folder / "val" / "b" / "1.png"
    content = path.read_bytes()
    path.write_bytes(HTML + b"x" * (len(content) - len(HTML)))
    try:
        with pytest.raises(UserError, match=r"val/b/1\.png"):
            epoch(loader(folder, "skip:4", train=False), 0)
    finally:
        path.write_bytes(content)


@pytest.mark.parametrize("workers", [0, 2])
def test_more_than_are_allowed_end_the_run(folder: Path, workers: int) -> None:
    with pytest.raises(
        UserError, match=r"data\.bad_images: skip:2 allows 2, and [34] cannot be read: .*train/"
    ) as caught:
        epoch(loader(folder, "skip:2", workers=workers), 0)
    assert len(caught.value.problems) == 1


def test_a_class_without_a_readable_image_ends_the_run(tmp_path: Path) -> None:
    root = make(tmp_path / "images", bad=False)
    for path in (root / "train" / "a").iterdir():
        path.write_bytes(HTML)
    with pytest.raises(UserError, match="train/a/"):
        epoch(loader(root, "skip:100"), 0)


def test_many_are_told_in_one_line() -> None:
    found = {f"{number}.png": f"{number}.png: damaged" for number in range(9)}
    check_unreadable(found, 9)
    with pytest.raises(UserError) as caught:
        check_unreadable(found, 8)
    assert str(caught.value).endswith("3.png: damaged; 4.png: damaged; and 4 more")


@given(
    labels=st.lists(st.integers(0, 3), min_size=1, max_size=40),
    place=st.integers(0, 10**6),
    seed=st.integers(0, 2**40),
    number=st.integers(0, 1000),
)
def test_stand_ins_are_all_others_of_the_class_each_once(labels, place: int, seed: int, number: int) -> None:
    classes, index = np.array(labels), place % len(labels)
    found = list(stand_ins(classes, index, seed=seed, epoch=number, count=100))
    assert sorted(found) == [i for i, label in enumerate(labels) if label == labels[index] and i != index]
    assert found == list(stand_ins(classes, index, seed=seed, epoch=number, count=100))
    assert found[:2] == list(stand_ins(classes, index, seed=seed, epoch=number, count=2))


def test_epochs_take_different_ones() -> None:
    labels = np.zeros(1000, dtype=np.int64)
    first = [next(stand_ins(labels, 7, seed=0, epoch=number, count=1)) for number in range(200)]
    assert len(set(first)) > 150
    assert 400 < np.mean(first) < 600


@pytest.mark.parametrize("value", ["skip", "skip:", "skip:0", "skip:-1", "skip:1.5", "Fail", "skip:1e3", "skip:01"])
def test_other_policies_are_refused(value: str) -> None:
    with pytest.raises(UserError, match=r"data\.bad_images: value .* it takes fail, or skip:N"):
        load_config(overrides=[f"data.bad_images='{value}'"])
    assert images_to_skip(load_config(overrides=["data.bad_images=skip:12"]).data.bad_images) == 12
