from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from norm_matters.core.seeding import uniform, uniform_of
from norm_matters.transforms.batch import (
    BatchPlan,
    augment,
    cutout,
    flip,
    network_input,
    normalise,
    pad_crop,
    plan_batches,
)
from norm_matters.transforms.preprocessing import Preprocessing

PLAN = Preprocessing(3, 8, (0.1, 0.5, 0.9), (0.2, 0.3, 0.4), "pad", 2, True, 8)


def random_pixels(count: int, channels: int = 3, height: int = 8, width: int = 8) -> torch.Tensor:
    return torch.randint(1, 256, (count, channels, height, width), dtype=torch.uint8, generator=torch.Generator())


def by_hand(pixels: np.ndarray, plan: Preprocessing, *, seed: int, epoch: int, index: int) -> np.ndarray:
    """One image (C, H, W) as the network sees it in training, by a second, plain way; float32."""

    def draw(stream: int, count: int) -> int:
        return int(uniform(seed=seed, epoch=epoch, indices=np.array(index), stream=stream) * count)

    _, height, width = pixels.shape
    if plan.crop == "pad" and plan.pad:
        top, left = draw(0, 2 * plan.pad + 1), draw(1, 2 * plan.pad + 1)
        padded = np.pad(pixels, ((0, 0), (plan.pad,) * 2, (plan.pad,) * 2))
        pixels = padded[:, top : top + height, left : left + width]
    if plan.flip and uniform(seed=seed, epoch=epoch, indices=np.array(index), stream=2) < 0.5:
        pixels = pixels[:, :, ::-1]
    mean, std = (np.array(v, np.float32).reshape(-1, 1, 1) * np.float32(255) for v in (plan.mean, plan.std))
    image = (pixels.astype(np.float32) - mean) / std
    if plan.cutout:
        row, column = draw(3, plan.input_size), draw(4, plan.input_size)
        first = [max(0, place - plan.cutout // 2) for place in (row, column)]
        last = [max(0, place - plan.cutout // 2 + plan.cutout) for place in (row, column)]
        image[:, first[0] : last[0], first[1] : last[1]] = 0
    return image


@settings(deadline=None, max_examples=60)
@given(
    count=st.integers(1, 9),
    channels=st.sampled_from([1, 3]),
    side=st.integers(8, 13),
    pad=st.integers(0, 5),
    flip=st.booleans(),
    cut=st.integers(0, 8),
    seed=st.integers(0, 2**31),
    epoch=st.integers(0, 300),
    memory_format=st.sampled_from([torch.channels_last, torch.contiguous_format]),
)
def test_every_bit_is_that_of_a_plain_loop(count, channels, side, pad, flip, cut, seed, epoch, memory_format):
    pixels = random_pixels(count, channels, side, side)
    plan = Preprocessing(
        channels, side, PLAN.mean[:channels], PLAN.std[:channels], "pad" if pad else "none", pad, flip, side, cut
    )
    indices = np.random.default_rng(seed).integers(0, 10**6, count)
    (drawn,) = plan_batches([indices], plan, seed=seed, epoch=epoch)
    result = network_input(pixels, plan, drawn, memory_format)
    assert result.is_contiguous(memory_format=memory_format)
    expected = [
        by_hand(x, plan, seed=seed, epoch=epoch, index=int(i)) for x, i in zip(pixels.numpy(), indices, strict=True)
    ]
    assert np.array_equal(result.numpy(), np.stack(expected))


@settings(deadline=None, max_examples=30)
@given(
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    pad=st.integers(1, 4),
    channels=st.integers(1, 4),
    dtype=st.sampled_from([torch.uint8, torch.float32]),
    last=st.booleans(),
    data=st.data(),
)
def test_pad_crop_takes_the_place_it_is_given(height, width, pad, channels, dtype, last, data):
    pixels = random_pixels(3, channels, height, width).to(dtype)
    pixels = pixels.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    places = data.draw(st.lists(st.integers(0, 2 * pad), min_size=6, max_size=6))
    top, left = torch.tensor(places).view(2, 3)
    result = pad_crop(pixels, pad=pad, top=top, left=left)
    padded = np.pad(pixels.numpy(), ((0, 0), (0, 0), (pad,) * 2, (pad,) * 2))
    for image, t, x in zip(range(3), top, left, strict=True):
        assert np.array_equal(result[image], padded[image, :, t : t + height, x : x + width])
    assert (result.dtype, result.shape) == (dtype, pixels.shape)


def test_crops_reach_every_place_equally_and_half_are_mirrored():
    (drawn,) = plan_batches([np.arange(20_000)], replace(PLAN, pad=1), seed=3, epoch=0)
    counts = torch.bincount(drawn.top * 3 + drawn.left, minlength=9)
    # Nine places, 2222 expected each, standard deviation 44.
    assert 2000 < counts.min() <= counts.max() < 2450
    assert 9700 < len(drawn.mirrored) < 10_300


def test_flip_mirrors_what_it_is_told_and_leaves_its_input_alone():
    pixels = random_pixels(9, width=5)
    before = pixels.clone()
    chosen = torch.tensor([0, 3, 8])
    result = flip(pixels, mirrored=chosen)
    assert torch.equal(pixels, before)
    expected = pixels.clone()
    expected[chosen] = pixels[chosen].flip(-1)
    assert torch.equal(result, expected)
    assert torch.equal(flip(pixels, mirrored=torch.tensor([], dtype=torch.int64)), pixels)


def test_cutout_is_a_square_around_a_pixel_that_may_be_any():
    size, side = 4, 12
    plan = Preprocessing(1, side, (0.5,), (0.2,), "none", 0, False, side, size)
    (drawn,) = plan_batches([np.arange(4000)], plan, seed=1, epoch=0)
    images = cutout(torch.ones(4000, 1, side, side), size=size, top=drawn.cut_top, left=drawn.cut_left)
    rows, columns = ((images[:, 0] == 0).any(dim) for dim in (2, 1))
    # Clipped at the border, never less than half of it plus the centre, nowhere but in one square.
    for inside in (rows, columns):
        lengths = inside.sum(1)
        assert sorted(set(lengths.tolist())) == [2, 3, 4]
    assert torch.equal(images[:, 0] == 0, rows[:, :, None] & columns[:, None, :])
    centres = torch.bincount((drawn.cut_top + size // 2) * side + drawn.cut_left + size // 2, minlength=side * side)
    assert len(centres) == side * side
    # 28 expected each, standard deviation 5.3.
    assert 5 < centres.min() <= centres.max() < 60


@settings(deadline=None, max_examples=15)
@given(
    seed=st.integers(0, 2**31), epoch=st.integers(0, 300), split=st.integers(1, 15), order=st.permutations(range(16))
)
def test_augmentation_depends_on_seed_epoch_and_index_alone(seed, epoch, split, order):
    pixels = random_pixels(16)
    plan = replace(PLAN, cutout=4)

    def run(chunks, epoch=epoch):
        plans = plan_batches(chunks, plan, seed=seed, epoch=epoch)
        return torch.cat([network_input(pixels.index_select(0, p.indices), plan, p) for p in plans])

    whole = run([np.arange(16)])
    assert torch.equal(run(np.split(np.array(order), [split])), whole[torch.tensor(order)])
    assert not torch.equal(run([np.arange(16)], epoch + 1), whole)


def test_only_what_is_asked_for_is_planned():
    plain = replace(PLAN, crop="none", pad=0, flip=False)
    for preprocessing in (plain, None):
        (drawn,) = plan_batches([np.array([4, 2])], preprocessing, seed=0, epoch=0)
        assert drawn.indices.tolist() == [4, 2]
        assert drawn[1:] == (None,) * 5
    pixels = random_pixels(2)
    assert torch.equal(augment(pixels, plain, BatchPlan(torch.arange(2))), pixels)
    assert plan_batches([], PLAN, seed=0, epoch=0) == []


def test_plans_move_to_another_device_in_one_piece():
    chunks = [np.array([5, 1, 3]), np.array([0, 2])]
    here = plan_batches(chunks, replace(PLAN, cutout=2), seed=0, epoch=0)
    there = plan_batches(chunks, replace(PLAN, cutout=2), seed=0, epoch=0, device="meta")
    for one, other in zip(here, there, strict=True):
        for a, b in zip(one, other, strict=True):
            assert (a.shape, a.dtype, b.device.type) == (b.shape, torch.int64, "meta")


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("width", [1, 16])
def test_all_256_bytes_have_the_bits_of_subtraction_and_division(memory_format, width):
    pixels = torch.arange(256, dtype=torch.uint8).view(-1, 1, 16 // width, width).repeat(1, 3, 1, 1)
    result = normalise(pixels, PLAN, memory_format)
    for channel in range(3):
        mean, std = (np.float32(v[channel]) * np.float32(255) for v in (PLAN.mean, PLAN.std))
        expected = (pixels[:, channel].numpy().astype(np.float32) - mean) / std
        assert np.array_equal(result[:, channel].numpy(), expected)
        exact = (pixels[:, channel].numpy() / 255 - PLAN.mean[channel]) / PLAN.std[channel]
        np.testing.assert_allclose(result[:, channel].numpy(), exact, rtol=1e-5, atol=1e-6)
    assert result.dtype == torch.float32
    assert result.is_contiguous(memory_format=memory_format)


@given(seed=st.integers(0, 2**40), epoch=st.integers(0, 10**4), index=st.integers(0, 2**40), stream=st.integers(0, 60))
def test_one_draw_is_that_of_many(seed, epoch, index, stream):
    many = uniform(seed=seed, epoch=epoch, indices=np.array([3, index]), stream=stream)
    assert uniform_of(seed=seed, epoch=epoch, index=index, stream=stream) == many[1]
