import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from norm_matters.core.seeding import generator
from norm_matters.datasets.order import Layout, block_lengths, epoch_order

lengths = st.lists(st.integers(1, 60), min_size=1, max_size=60)


def layout_of(blocks, window: int) -> Layout:
    return Layout(np.array(blocks, dtype=np.int64), window)


@settings(deadline=None, max_examples=150)
@given(blocks=lengths, window=st.integers(1, 400), seed=st.integers(0, 99), epoch=st.integers(0, 99))
def test_every_image_once_for_any_blocks(blocks, window, seed, epoch):
    count = sum(blocks)
    order = epoch_order(count, layout_of(blocks, window), seed=seed, epoch=epoch)
    assert order.dtype == np.int64
    assert sorted(order.tolist()) == list(range(count))
    assert np.array_equal(order, epoch_order(count, layout_of(blocks, window), seed=seed, epoch=epoch))


@pytest.mark.parametrize("layout", [None, layout_of([10, 90], 100), layout_of([10, 90], 200)])
def test_without_blocks_the_order_is_what_it_always_was(layout):
    expected = torch.randperm(100, generator=generator(3, "order", 5)).tolist()
    assert epoch_order(100, layout, seed=3, epoch=5).tolist() == expected


def test_orders_differ_by_seed_and_epoch():
    layout = layout_of([10] * 100, 100)
    orders = {tuple(epoch_order(1000, layout, seed=s, epoch=e)) for s in range(3) for e in range(3)}
    assert len(orders) == 9


@settings(deadline=None, max_examples=60)
@given(length=st.integers(5, 40), number=st.integers(20, 60), share=st.floats(0.05, 0.5), seed=st.integers(0, 99))
def test_a_block_is_met_within_a_window(length, number, share, seed):
    count = length * number
    window = max(1, int(share * count))
    order = epoch_order(count, layout_of([length] * number, window), seed=seed, epoch=0)
    places = np.argsort(order).reshape(number, length)
    # Around the end, distances count modulo the length of the epoch. A window of places in the sequence of draws holds
    # about a window of images, a block more or less.
    spans = [min((row - first).__mod__(count).max() for first in row) for row in places]
    assert max(spans) <= window + 4 * length + 6 * np.sqrt(window)


def test_few_blocks_are_open_at_a_time_from_the_first_image_on():
    blocks, window, count = 200, 2000, 100 * 200
    order = epoch_order(count, layout_of([100] * blocks, window), seed=0, epoch=0)
    block_of = order // 100
    for start in range(0, count - window, 500):
        # As many as begin within two windows; and mixed well at once.
        assert len(np.unique(block_of[start : start + window])) <= 2 * window // 100 + 2
        assert len(np.unique(block_of[start : start + 256])) >= 18


def test_classes_that_are_stored_one_after_the_other_are_mixed():
    """1,000 classes of 100 images each, in order: how often an image is followed by one of its class."""
    count, window = 100_000, 16_384
    labels = np.arange(count) // 100
    order = epoch_order(count, layout_of([150] * 666 + [100], window), seed=0, epoch=0)
    runs = (np.diff(labels[order]) == 0).mean()
    # A window has 164 classes and a block more; in a full shuffle it is a tenth of a per cent.
    assert runs < 0.006
    # In a batch of 256 there are nearly as many classes as can be met within a window.
    classes = [len(np.unique(labels[batch])) for batch in np.split(order[: 256 * 390], 390)]
    assert min(classes) > 120


def test_pairs_of_blocks_meet_in_other_epochs():
    layout = layout_of([10] * 40, 50)
    neighbours = set()
    for epoch in range(200):
        order = epoch_order(400, layout, seed=0, epoch=epoch) // 10
        neighbours |= set(zip(order[:-1].tolist(), order[1:].tolist(), strict=True))
    assert len(neighbours) == 40 * 40


def test_block_lengths():
    assert block_lengths(np.array([], dtype=int)).tolist() == []
    assert block_lengths(np.array([4])).tolist() == [1]
    assert block_lengths(np.array([0, 0, 3, 3, 3, 0])).tolist() == [2, 3, 1]
