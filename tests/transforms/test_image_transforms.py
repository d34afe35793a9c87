import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from norm_matters.bench.photos import make_photo
from norm_matters.core.seeding import seed_everything
from norm_matters.transforms.image import (
    _in_reduced,
    _random_box,
    apply_own,
    centre_crop,
    evaluation_pixels,
    inception_crop,
    inception_reduction,
    reduction,
    seeded,
    to_pixels,
    training_pixels,
)
from norm_matters.transforms.preprocessing import Preprocessing


def gradient(width: int, height: int) -> Image.Image:
    """Red grows to the right, green downwards: a crop shows where it was taken."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([x, y, np.zeros_like(x)], axis=-1).astype(np.uint8))


def boxes(width: int, height: int, count: int) -> np.ndarray:
    """(left, right, top, bottom) of crops as shares of the image, read off the colours."""
    image = gradient(width, height)
    crops = [inception_crop(image, 16, seed=0, epoch=0, index=i).double() / 255 for i in range(count)]
    return np.array([(c[0].min(), c[0].max(), c[1].min(), c[1].max()) for c in crops])


def test_inception_crop_covers_areas_and_ratios():
    left, right, top, bottom = boxes(400, 300, 400).T
    widths, heights = (right - left) * 400, (bottom - top) * 300
    # Bilinear samples lie half a pixel of 16 inside, hence the slack.
    area = widths * heights / (400 * 300) * (16 / 15) ** 2
    assert 0.05 < area.min() < 0.12
    assert 0.85 < area.max() < 1.05
    assert 0.35 < area.mean() < 0.6
    ratio = widths / heights
    assert 0.7 < ratio.min() < 0.8
    assert 1.25 < ratio.max() < 1.4
    assert left.min() < 0.05
    assert right.max() > 0.95


def test_inception_crop_depends_on_seed_epoch_and_index():
    image = gradient(50, 40)
    crop = {key: inception_crop(image, 8, **dict(zip(("seed", "epoch", "index"), key, strict=True))).numpy().tobytes()
            for key in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))}  # fmt: skip
    assert len(set(crop.values())) == 4
    assert inception_crop(image, 8, seed=0, epoch=0, index=0).numpy().tobytes() == crop[0, 0, 0]


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 1), (3, 2)])
def test_crops_of_extreme_images_have_the_size_asked_for(size):
    image = Image.new("RGB", size, "red")
    assert inception_crop(image, 16, seed=0, epoch=0, index=0).shape == (3, 16, 16)
    assert inception_crop(image.convert("L"), 16, seed=0, epoch=0, index=0).shape == (1, 16, 16)
    assert centre_crop(image, 16, 18).size == (16, 16)
    assert np.asarray(centre_crop(image, 16, 18)).min(axis=(0, 1)).tolist() == [255, 0, 0]


def test_centre_crop_matches_torchvision():
    from norm_matters.core.torchvision import torchvision

    t = torchvision.transforms
    noise = np.random.default_rng(0).integers(0, 256, (67, 91, 3), dtype=np.uint8)
    for array in (noise, noise.transpose(1, 0, 2)):
        image = Image.fromarray(np.ascontiguousarray(array))
        theirs = t.Compose([t.Resize(36), t.CenterCrop(32)])(image)
        assert centre_crop(image, 32, 36).tobytes() == theirs.tobytes()


def test_centre_crop_of_a_long_strip_does_not_fill_the_memory():
    # Resized as a whole this would take 256 x 12,800,000 pixels.
    strip = Image.new("L", (50_000, 1), 7)
    assert centre_crop(strip, 224, 256).getextrema() == (7, 7)


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_to_pixels(mode):
    image = gradient(5, 3).convert(mode)
    pixels = to_pixels(image)
    assert pixels.shape == (len(mode), 3, 5)
    assert pixels.dtype == torch.uint8
    assert np.array_equal(pixels.permute(1, 2, 0).squeeze(-1).numpy(), np.asarray(image))


def test_training_crops_at_random_only_where_asked():
    image = gradient(40, 30)
    plan = Preprocessing(3, 16, (0.5,) * 3, (0.2,) * 3, "inception", 0, True, 18)
    centre = evaluation_pixels(image, plan)
    assert centre.shape == (3, 16, 16)

    def read(reduction):
        return image, image.size

    crop = training_pixels(read, plan, seed=0, epoch=0, index=0)
    assert torch.equal(crop, inception_crop(image, 16, seed=0, epoch=0, index=0))
    assert not torch.equal(crop, centre)
    plan = Preprocessing.from_json({**plan.to_json(), "crop": "pad", "pad": 2})
    assert torch.equal(training_pixels(read, plan, seed=0, epoch=0, index=0), centre)


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_inception_crop_is_pillows_up_to_rounding(mode):
    image = make_photo(250, 190, seed=1).convert(mode)
    for index in range(20):
        box = _random_box(image.size, seed=0, epoch=0, index=index)
        theirs = np.asarray(image.crop(box).resize((64, 64), Image.Resampling.BILINEAR)).astype(int)
        ours = inception_crop(image, 64, seed=0, epoch=0, index=index).permute(1, 2, 0).squeeze(-1).numpy()
        assert np.abs(ours - theirs).max() <= 3
        assert np.abs(ours - theirs).mean() < 0.1


@given(side=st.integers(1, 5000), needed=st.integers(8, 400))
def test_a_reduction_leaves_what_is_needed(side, needed):
    factor = reduction(side, needed)
    assert factor in (1, 2, 4, 8)
    assert factor == 1 or side / factor >= needed
    assert factor == 8 or side / (2 * factor) < needed


@settings(deadline=None)
@given(
    width=st.integers(8, 900), height=st.integers(8, 900), index=st.integers(0, 10**6), size=st.sampled_from([8, 32])
)
def test_a_part_of_a_reduced_image_has_the_pixels_needed_and_lies_inside(width, height, index, size):
    factor = inception_reduction(width, height, size, seed=0, epoch=0, index=index)
    box = _random_box((width, height), seed=0, epoch=0, index=index)
    reduced = -(-width // factor), -(-height // factor)
    left, top, right, bottom = _in_reduced(box, (width, height), reduced)
    assert 0 <= left < right <= reduced[0]
    assert 0 <= top < bottom <= reduced[1]
    if factor > 1:
        assert min(right - left, bottom - top) >= size
    for place, full in zip((left, top, right, bottom), box, strict=True):
        # The last pixel of a reduced image may stand for a single one.
        assert abs(place * factor - full) <= 2 * factor
    assert factor > 1 or (left, top, right, bottom) == box


def draws() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_the_part_is_chosen_in_the_full_size():
    image, full = gradient(13, 7), (101, 53)
    for index in range(200):
        left, top, right, bottom = _in_reduced(_random_box(full, seed=0, epoch=0, index=index), full, image.size)
        part = inception_crop(image, max(right - left, bottom - top), seed=0, epoch=0, index=index, full_size=full)
        # Red and green begin where the part does, and end with it.
        colours = np.asarray(image)[top:bottom, left:right].reshape(-1, 3)
        assert (part.amin((1, 2)).numpy() == colours.min(0)).all()
        assert (part.amax((1, 2)).numpy() == colours.max(0)).all()


def test_seeded_repeats_and_restores_all_streams():
    seed_everything(1)
    before = draws()
    seed_everything(1)
    results = []
    for key in ((0, 0, 0), (0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)):
        with seeded(seed=key[0], epoch=key[1], index=key[2]):
            results.append(draws())
    with pytest.raises(ZeroDivisionError), seeded(seed=0, epoch=0, index=0):
        raise ZeroDivisionError
    assert draws() == before
    assert results[0] == results[1]
    assert all(len({r[stream] for r in results}) == 4 for stream in range(3))


def test_own_transform():
    image = gradient(6, 4)
    result = apply_own(lambda i: to_pixels(i), image, seed=0, epoch=0, index=0)
    assert result.dtype == torch.float32
    for wrong in (lambda i: i, lambda i: torch.zeros(3, 3)):
        with pytest.raises(ValueError, match="channels, height, width"):
            apply_own(wrong, image, seed=0, epoch=0, index=0)
