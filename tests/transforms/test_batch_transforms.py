import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from norm_matters.transforms.batch import augment, flip, normalise, pad_crop
from norm_matters.transforms.preprocessing import Preprocessing


def random_pixels(count: int, channels: int = 3, side: int = 8) -> torch.Tensor:
    return torch.randint(1, 256, (count, channels, side, side), dtype=torch.uint8, generator=torch.Generator())


def crops_of(image: torch.Tensor, pad: int) -> list[torch.Tensor]:
    """All crops, by a plain loop."""
    side = image.shape[-1]
    padded = torch.zeros(image.shape[0], side + 2 * pad, side + 2 * pad, dtype=image.dtype)
    padded[:, pad : pad + side, pad : pad + side] = image
    places = range(2 * pad + 1)
    return [padded[:, y : y + side, x : x + side] for y in places for x in places]


@settings(deadline=None, max_examples=15)
@given(count=st.integers(1, 20), pad=st.integers(1, 3), channels=st.sampled_from([1, 3]), seed=st.integers(0, 2**31))
def test_pad_crop_gives_a_crop_of_the_padded_image(count, pad, channels, seed):
    pixels = random_pixels(count, channels)
    result = pad_crop(pixels, pad=pad, seed=seed, epoch=0, indices=np.arange(count))
    assert result.shape == pixels.shape
    assert result.dtype == torch.uint8
    for before, after in zip(pixels, result, strict=True):
        assert any(torch.equal(after, crop) for crop in crops_of(before, pad))


def test_pad_crop_reaches_every_place_equally():
    pixels = random_pixels(1).expand(5000, -1, -1, -1)
    result = pad_crop(pixels, pad=1, seed=3, epoch=0, indices=np.arange(5000))
    counts = [sum(torch.equal(crop, image) for image in result) for crop in crops_of(pixels[0], 1)]
    assert sum(counts) == 5000
    # Nine places, 556 expected each, standard deviation 22.
    assert min(counts) > 440
    assert max(counts) < 670


def test_flip_mirrors_half_and_leaves_its_input_alone():
    pixels = random_pixels(2000)
    before = pixels.clone()
    result = flip(pixels, seed=0, epoch=0, indices=np.arange(2000))
    assert torch.equal(pixels, before)
    same = (result == pixels).flatten(1).all(1)
    mirrored = (result == pixels.flip(-1)).flatten(1).all(1)
    assert (same | mirrored).all()
    assert 900 < mirrored.sum() < 1100


@settings(deadline=None, max_examples=15)
@given(
    seed=st.integers(0, 2**31), epoch=st.integers(0, 300), split=st.integers(1, 15), order=st.permutations(range(16))
)
def test_augmentation_depends_on_seed_epoch_and_index_alone(seed, epoch, split, order):
    pixels = random_pixels(16)
    plan = Preprocessing(3, 8, (0.5,) * 3, (0.2,) * 3, "pad", 2, True, 8)
    whole = augment(pixels, plan, seed=seed, epoch=epoch, indices=np.arange(16))
    parts = np.split(np.array(order), [split])
    pieces = [augment(pixels[torch.from_numpy(p)], plan, seed=seed, epoch=epoch, indices=p) for p in parts]
    assert torch.equal(torch.cat(pieces), whole[torch.tensor(order)])
    other = augment(pixels, plan, seed=seed, epoch=epoch + 1, indices=np.arange(16))
    assert not torch.equal(other, whole)


def test_augment_does_only_what_is_asked_for():
    pixels = random_pixels(4)
    plan = Preprocessing(3, 8, (0.5,) * 3, (0.2,) * 3, "none", 0, False, 8)
    assert torch.equal(augment(pixels, plan, seed=0, epoch=0, indices=np.arange(4)), pixels)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_normalise(memory_format):
    pixels = random_pixels(5)
    plan = Preprocessing(3, 8, (0.1, 0.5, 0.9), (0.2, 0.3, 0.4), "none", 0, False, 8)
    result = normalise(pixels, plan, memory_format)
    mean, std = np.array(plan.mean).reshape(3, 1, 1), np.array(plan.std).reshape(3, 1, 1)
    np.testing.assert_allclose(result.numpy(), (pixels.numpy() / 255 - mean) / std, rtol=1e-5, atol=1e-6)
    assert result.dtype == torch.float32
    assert result.is_contiguous(memory_format=memory_format)
