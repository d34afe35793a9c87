import json
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from norm_matters.core.config import DataConfig
from norm_matters.core.errors import UserError
from norm_matters.datasets import DATASETS, check_dataset, entry, load_dataset
from norm_matters.datasets.entry import DatasetEntry, Source, stratified_split
from norm_matters.datasets.images import ResidentImages
from norm_matters.packing import open_source


def resident(count: int = 40, classes: int = 4, side: int = 8, channels: int = 1) -> ResidentImages:
    pixels = torch.arange(count * channels * side * side).remainder(251).to(torch.uint8)
    return ResidentImages(pixels.view(count, channels, side, side), np.arange(count) % classes, title="made up")


@pytest.fixture
def given_source(monkeypatch):
    """Let `load_dataset` find a source made in the test, in place of the digits."""

    def put(source: Source) -> None:
        monkeypatch.setitem(DATASETS._targets, "digits", DatasetEntry(lambda data, argument: source))

    return put


@pytest.mark.parametrize("name", DATASETS.names())
def test_registered_datasets_exist(name):
    assert isinstance(DATASETS.get(name), DatasetEntry)
    assert DATASETS.summary(name)


@pytest.mark.parametrize("name", ["digits", "cifar10", "imagefolder:some/where", "parquet:a:b.parquet"])
def test_good_names(name):
    check_dataset(name)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("cifar-10", "did you mean 'cifar10'"),
        ("", "there are: digits"),
        ("digits:x", "did you mean 'digits'"),
        ("imagefolder", "imagefolder:DIR"),
        ("imagefolder:", "imagefolder:DIR"),
        ("parquet", "parquet:DIR_OR_FILE"),
        ("image-folder:x", "did you mean 'imagefolder'"),
    ],
)
def test_bad_names(name, hint):
    with pytest.raises(UserError, match=hint):
        check_dataset(name)


def test_digits():
    data = load_dataset(DataConfig())
    assert (len(data.train), len(data.val)) == (1438, 359)
    assert data.train.pixels.shape[1:] == (1, 8, 8)
    assert data.train.pixels.max() == 255
    # The shape of each class's numbers, the same share of every class.
    for label in range(10):
        counts = [(part.labels == label).sum() for part in (data.train, data.val)]
        assert abs(counts[1] / sum(counts) - 0.2) < 0.01
    assert (data.name, data.val_name, data.channels, data.size) == ("digits", "test", 1, 8)
    assert data.classes == tuple("0123456789")
    again = load_dataset(DataConfig(), seed=5)
    assert again.fingerprint == data.fingerprint
    assert json.loads(json.dumps(data.fingerprint)) == data.fingerprint


def test_digits_are_scikit_learns():
    from sklearn.datasets import load_digits

    data = load_dataset(DataConfig())
    ours = torch.cat([data.train.pixels, data.val.pixels]).flatten(1).double() * 16 / 255
    labels = np.concatenate([data.train.labels, data.val.labels])
    theirs = {(*row, label) for row, label in zip(*load_digits(return_X_y=True), strict=True)}
    assert {(*row, label) for row, label in zip(ours.round().tolist(), labels, strict=True)} == theirs


def test_random_is_the_same_every_time():
    first, second = (load_dataset(DataConfig(name="random"), seed=seed) for seed in (0, 1))
    assert first.fingerprint == second.fingerprint
    assert (len(first.train), len(first.val), len(first.classes)) == (2048, 512, 10)
    assert not torch.equal(first.train.pixels[:512], first.val.pixels)


@settings(deadline=None, max_examples=40)
@given(
    counts=st.lists(st.integers(2, 30), min_size=2, max_size=5),
    share=st.floats(0.01, 0.99),
    seed=st.integers(0, 1000),
)
def test_stratified_split_takes_the_share_of_every_class(counts, share, seed):
    labels = np.random.default_rng(seed).permutation(np.repeat(np.arange(len(counts)), counts))
    first, second = stratified_split(labels, share, seed)
    assert sorted([*first, *second]) == list(range(len(labels)))
    assert sorted(first) == first.tolist()
    for label, count in enumerate(counts):
        taken = (labels[second] == label).sum()
        assert 1 <= taken <= count - 1
        assert abs(taken - share * count) <= 1


def test_stratified_split_depends_on_the_seed():
    labels = np.repeat([0, 1], 50)
    splits = [stratified_split(labels, 0.3, seed)[1].tolist() for seed in (0, 0, 1)]
    assert splits[0] == splits[1] != splits[2]


def test_holdout_replaces_the_official_part(given_source):
    source = Source(train=resident(), val=resident(8), classes=tuple("abcd"))
    given_source(source)
    data = load_dataset(DataConfig(holdout=0.3))
    assert data.val_name == "holdout 30% of train"
    assert (len(data.train), len(data.val)) == (28, 12)
    assert data.fingerprint != load_dataset(DataConfig(holdout=0.3), seed=1).fingerprint
    given_source(Source(train=resident(), val=None, classes=tuple("abcd")))
    assert load_dataset(DataConfig()).val_name == "holdout 10% of train"


def test_holdout_of_a_class_with_one_image(given_source):
    given_source(Source(train=resident(5, 4), val=None, classes=tuple("abcd")))
    with pytest.raises(UserError, match=r"data.holdout: class 1 has 1 image"):
        load_dataset(DataConfig())


def test_labels_out_of_range_are_named(given_source):
    for labels, wrong in (([0, 1, 2, 3], 3), ([0, -1, 1, 0], -1)):
        images = ResidentImages(resident(4).pixels, np.array(labels), title="made up")
        given_source(Source(train=resident(9, 3), val=images, classes=tuple("abc")))
        with pytest.raises(UserError, match=rf"made up, image \d: label {wrong} is out of range"):
            load_dataset(DataConfig())


def test_one_class_or_no_images_are_refused(given_source):
    given_source(Source(train=resident(4, 1), val=resident(4, 1), classes=("only",)))
    with pytest.raises(UserError, match="two or more"):
        load_dataset(DataConfig())
    given_source(Source(train=resident(), val=resident(0), classes=tuple("abcd")))
    with pytest.raises(UserError, match="no images"):
        load_dataset(DataConfig())


def test_mean_and_deviation_are_those_of_the_training_pixels(given_source):
    pixels = torch.randint(256, (3000, 3, 5, 5), generator=torch.Generator(), dtype=torch.uint8)
    pixels[:, 1] //= 2
    train = ResidentImages(pixels, np.arange(3000) % 2, title="made up")
    given_source(Source(train=train, val=resident(4, 2, side=5, channels=3), classes=tuple("ab")))
    data = load_dataset(DataConfig())
    expected = pixels.numpy() / 255
    np.testing.assert_allclose(data.mean, expected.mean((0, 2, 3)), atol=5.1e-5)
    np.testing.assert_allclose(data.std, expected.std((0, 2, 3)), atol=5.1e-5)


def test_a_set_of_one_colour_can_be_normalised(given_source):
    images = ResidentImages(torch.full((4, 1, 8, 8), 9, dtype=torch.uint8), np.arange(4) % 2, title="flat")
    given_source(Source(train=images, val=images, classes=tuple("ab")))
    assert load_dataset(DataConfig()).std == (1.0,)


def test_input_size_resizes_images_in_memory():
    small, big = load_dataset(DataConfig()), load_dataset(DataConfig(input_size=16))
    assert big.train.pixels.shape == (1438, 1, 16, 16)
    assert (big.size, big.pad) == (16, 2 * small.pad)
    assert big.fingerprint != small.fingerprint
    # As Pillow would resize them, up to rounding.
    theirs = np.asarray(small.train.image(0).resize((16, 16), Image.Resampling.BILINEAR)).astype(int)
    assert np.abs(theirs - big.train.pixels[0, 0].numpy()).max() <= 1


def test_input_size_that_fills_the_memory_is_refused(monkeypatch):
    monkeypatch.setattr(entry.os, "sysconf", lambda key: {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 100}[key])
    with pytest.raises(UserError, match=r"data.input_size: 64: .* GB"):
        load_dataset(DataConfig(input_size=64))


def test_fingerprint_changes_with_a_pixel_a_label_and_a_class(given_source):
    def fingerprint(pixel=0, label=0, classes="abcd"):
        train = resident()
        train.pixels[0, 0, 0, 0], train.labels[0] = pixel, label
        given_source(Source(train=train, val=resident(8), classes=tuple(classes)))
        return json.dumps(load_dataset(DataConfig()).fingerprint)

    assert fingerprint() == fingerprint()
    assert len({fingerprint(), fingerprint(pixel=1), fingerprint(label=1), fingerprint(classes="abcde")}) == 4


@pytest.mark.parametrize(
    ("size", "crop", "input_size", "expected"),
    [
        (32, "pad", None, (32, "pad", 4, 32)),
        (32, "inception", None, (32, "pad", 4, 32)),
        (None, "inception", None, (224, "inception", 0, 256)),
        (None, "inception", 64, (64, "inception", 0, 73)),
        (None, "pad", 32, (32, "pad", 4, 32)),
    ],
)
def test_preprocessing_follows_from_dataset_and_model(given_source, size, crop, input_size, expected):
    given_source(Source(train=resident(), val=resident(8), classes=tuple("abcd"), pad=4, flip=False))
    data = load_dataset(DataConfig())
    plan = replace(data, size=size).preprocessing(crop=crop, input_size=input_size)
    assert (plan.input_size, plan.crop, plan.pad, plan.resize) == expected
    assert not plan.flip
    assert plan.mean == data.mean


def test_digits_need_no_crop_when_they_have_no_padding(given_source):
    given_source(Source(train=resident(), val=resident(8), classes=tuple("abcd"), pad=0))
    assert load_dataset(DataConfig()).preprocessing(crop="pad").crop == "none"


@pytest.mark.parametrize("refused", ["look", "list"])
@pytest.mark.parametrize("name", ["imagefolder:{}", "parquet:{}", "webdataset:{}/a.tar", "hf:some/set", "{}"])
def test_a_folder_that_may_not_be_entered_is_named(tmp_path, monkeypatch, name, refused):
    """Tests may run as root, whom nothing is refused."""
    closed = tmp_path / "closed"
    for folder in ("a", "b", "hub/datasets--some--set/snapshots/1"):
        (closed / folder).mkdir(parents=True)
    monkeypatch.setenv("HF_HOME", str(closed))
    look, enter = os.stat, os.scandir

    def refusing(call, place, *rest, **options):
        if str(place).startswith(str(closed)):
            raise PermissionError(13, "Permission denied", str(place))
        return call(place, *rest, **options)

    if refused == "look":
        monkeypatch.setattr(os, "stat", lambda *given, **options: refusing(look, *given, **options))
    monkeypatch.setattr(os, "scandir", lambda *given: refusing(enter, *given))
    name = name.format(closed)
    opening = [open_source] if name == str(closed) else [open_source, lambda name: load_dataset(DataConfig(name=name))]
    for each in opening:
        with pytest.raises(UserError, match="closed") as caught:
            each(name)
        assert len(caught.value.problems) == 1
        assert "\n" not in str(caught.value)
        if refused == "look":
            assert str(caught.value).endswith(": Permission denied")


def test_an_error_without_a_file_names_the_dataset(monkeypatch):
    def read(data, argument):
        raise OSError("no\nroom")

    monkeypatch.setitem(DATASETS._targets, "digits", DatasetEntry(read))
    with pytest.raises(UserError, match=r"^dataset 'digits': no room$"):
        load_dataset(DataConfig())
