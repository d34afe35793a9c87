"""Triton kernels that find the k largest deviations of a channel without their places.

Each part of the tensor gives its k largest |d|; the k largest of those are the channel's. How many values tie with
the k-th is counted while y is written, which reads x anyway.
"""

# ruff: noqa: N803  (Triton's users write what is constant for the compiler in capitals)
# Inside a kernel the types are the compiler's own: pyright sees the wrong ones.
# pyright: basic, reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportIndexIssue=false, reportOperatorIssue=false, reportOptionalMemberAccess=false
# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false

import triton
import triton.language as tl

from norm_matters.norms.kernels.triton_tiles import SIZES, channels_of, load_stat, part_of, place, total_of


@triton.jit
def no_sizes(k, SLOTS: tl.constexpr, WIDTH: tl.constexpr):
    """Room for the k largest sizes of each column, [SLOTS, WIDTH]: -1 is free, infinity is never replaced."""
    slot = tl.broadcast_to(tl.arange(0, SLOTS)[:, None], [SLOTS, WIDTH])
    return tl.where(slot < k, -1.0, float("inf"))


@triton.jit
def keep_largest(kept, size):
    """Put into `kept` [SLOTS, WIDTH] whatever of the sizes [VALUES, WIDTH] is larger than what is there.

    One value of each column a turn; most tiles have none, once the first has been through. Sizes must not be NaN.
    """
    slot = tl.arange(0, kept.shape[0])[:, None]
    place = tl.arange(0, size.shape[0])[:, None]
    lowest, lowest_slot = tl.min(kept, 0, return_indices=True, keep_dims=True)
    top, top_place = tl.max(size, 0, return_indices=True, keep_dims=True)
    while tl.max(tl.max((top > lowest).to(tl.int32), 1), 0) > 0:
        enters = top > lowest
        kept = tl.where(enters & (slot == lowest_slot), top, kept)
        size = tl.where(enters & (place == top_place), -1.0, size)
        lowest, lowest_slot = tl.min(kept, 0, return_indices=True, keep_dims=True)
        top, top_place = tl.max(size, 0, return_indices=True, keep_dims=True)
    return kept


@triton.jit(do_not_specialize=SIZES)
def find_candidates(
    x,
    stats,
    candidates,
    rows,
    units,
    channels,
    parts,
    tiles,
    k,
    SLOTS: tl.constexpr,
    PLANES: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Write the k largest |d| of each part (SLOTS, parts, channels), in no order; -1 where it has fewer values."""
    WIDTH: tl.constexpr = 1 if PLANES else BLOCK_COLUMNS
    channel = channels_of(tl.program_id(0), PLANES, BLOCK_COLUMNS)
    part, first, last = part_of(parts, tiles, True)
    mean = load_stat(stats, 0, channel, channels)
    kept = no_sizes(k, SLOTS, WIDTH)
    for tile in range(first, last):
        offsets, inside = place(tile, rows, units, channels, PLANES, ALIGN, BLOCK_ROWS, BLOCK_COLUMNS)
        size = tl.abs(tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32) - mean[None, :])
        # NaN is not a candidate: the mean of its channel is NaN, which is enough.
        size = tl.where(inside & (size >= 0), size, -1.0)
        if PLANES:
            size = tl.reshape(size, [BLOCK_ROWS * BLOCK_COLUMNS, 1], can_reorder=True)
        kept = keep_largest(kept, size)
    slot = tl.arange(0, SLOTS)[:, None]
    offsets = (slot * parts + part).to(tl.int64) * channels + channel[None, :]
    tl.store(candidates + offsets, kept, mask=(slot < k) & (channel < channels)[None, :])


@triton.jit(do_not_specialize=SIZES)
def select_largest(candidates, stats, channels, parts, k, constant, SLOTS: tl.constexpr, BLOCK: tl.constexpr):
    """Sigma, the threshold and how many of the k tie with it, in the place of the share, from the candidates."""
    channel = tl.program_id(0)
    count = parts * k
    kept = no_sizes(k, SLOTS, 1)
    for first in range(0, count, BLOCK):
        entry = first + tl.arange(0, BLOCK)[:, None]
        size = tl.load(candidates + entry.to(tl.int64) * channels + channel, mask=entry < count, other=-1.0)
        kept = keep_largest(kept, size)
    slot = tl.arange(0, SLOTS)[:, None]
    threshold = tl.min(tl.min(kept, 1), 0)
    above = tl.sum(tl.sum(((slot < k) & (kept > threshold)).to(tl.float32), 1), 0)
    total = tl.sum(tl.sum(tl.where(slot < k, kept, 0.0), 1), 0)
    # NaN, passed over so far, is in the mean.
    mean = tl.load(stats + channel)
    unknown = mean - mean
    tl.store(stats + channels + channel, total / k * constant + unknown)
    tl.store(stats + 3 * channels + channel, threshold + unknown)
    tl.store(stats + 4 * channels + channel, k - above)


@triton.jit(do_not_specialize=SIZES)
def finish_ties(partials, stats, channels, parts, BLOCK_PARTS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr):
    """The share of one value that ties with the threshold, and S(u)."""
    channel = tl.program_id(0) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    inside = channel < channels
    tied = total_of(partials, 0, parts, channel, channels, BLOCK_PARTS)
    tied_signs = total_of(partials, 1, parts, channel, channels, BLOCK_PARTS)
    above_signs = total_of(partials, 2, parts, channel, channels, BLOCK_PARTS)
    # At least one ties, but in a channel with NaN.
    share = load_stat(stats, 4, channel, channels) / tl.where(tied < 1, 1.0, tied)
    tl.store(stats + 2 * channels + channel, (above_signs + share * tied_signs).to(tl.float32), mask=inside)
    tl.store(stats + 4 * channels + channel, share.to(tl.float32), mask=inside)
