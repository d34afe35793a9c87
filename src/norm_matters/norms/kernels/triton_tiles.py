"""How the Triton kernels see a tensor, and how they bring sums together.

Both layouts are a table of rows whose columns lie side by side in memory. `PLANES` (contiguous): a channel is a table
of N images by H W positions, a program has one channel. Else (channels last): the table is N H W pixels by C channels,
a program has a block of columns. A program (group, part) goes through its part of the group's tiles in a fixed order
and writes one partial result per channel, (row, part, channel); a small kernel adds them up in float64. Nothing is
added by atomics, so that the bits are the same every time.

Sizes that change from call to call are not specialised on: only `ALIGN`, the power of two that divides the columns,
decides how wide loads are.
"""

# ruff: noqa: N803, RET505  (Triton's users write what is constant for the compiler in capitals; a `return` after an
# `if` that is decided by such a constant would be compiled too, so that the `else` is needed)
# Inside a kernel the types are the compiler's own: pyright sees the wrong ones.
# pyright: basic, reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportIndexIssue=false, reportOperatorIssue=false, reportOptionalMemberAccess=false
# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false

import triton
import triton.language as tl

SIZES = ["rows", "units", "channels", "parts", "tiles", "n", "k", "eps", "constant"]


@triton.jit
def channels_of(group, PLANES: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    """The channels of a program: [1] or [BLOCK_COLUMNS]."""
    if PLANES:
        return group + tl.arange(0, 1)
    else:
        return group * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)


@triton.jit
def part_of(parts, tiles, BACKWARDS: tl.constexpr):
    """The part of a program and its tiles, from the first to before the last.

    A pass that goes backwards begins where the one before it ended, with what the cache still holds.
    """
    part = tl.program_id(1)
    if BACKWARDS:
        part = parts - 1 - part
    per_part = tl.cdiv(tiles, parts)
    first = part * per_part
    return part, first, tl.minimum(first + per_part, tiles)


@triton.jit
def place(
    tile,
    rows,
    units,
    channels,
    PLANES: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Where a tile lies: offsets (int64) and which of them are inside the table, both [BLOCK_ROWS, BLOCK_COLUMNS]."""
    group = tl.program_id(0)
    columns = units * ALIGN
    if PLANES:
        blocks = tl.cdiv(columns, BLOCK_COLUMNS)
        row = tile // blocks * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        column = tile % blocks * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
        start = row.to(tl.int64) * channels * columns + group.to(tl.int64) * columns
    else:
        row = tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        column = group * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
        start = row.to(tl.int64) * columns
    return start[:, None] + column[None, :], (row < rows)[:, None] & (column < columns)[None, :]


@triton.jit
def per_channel(tile, PLANES: tl.constexpr):
    """Sum a tile to one number per channel of the program."""
    if PLANES:
        return tl.sum(tl.sum(tile, 1), 0, keep_dims=True)
    else:
        return tl.sum(tile, 0)


@triton.jit
def highest_per_channel(tile, PLANES: tl.constexpr):
    """The largest of a tile per channel of the program; NaN is passed over."""
    if PLANES:
        return tl.max(tl.max(tile, 1), 0, keep_dims=True)
    else:
        return tl.max(tile, 0)


@triton.jit
def store_partial(partials, row: tl.constexpr, value, part, parts, channel, channels):
    """Write a partial result (rows, parts, channels)."""
    tl.store(partials + (row * parts + part).to(tl.int64) * channels + channel, value, mask=channel < channels)


@triton.jit
def load_stat(stats, row: tl.constexpr, channel, channels):
    """Read a row of (rows, channels)."""
    return tl.load(stats + row * channels + channel, mask=channel < channels, other=0.0)


@triton.jit
def load_partials(partials, row: tl.constexpr, part, parts, channel, channels):
    """Read partial results [parts, channels] as float64."""
    offsets = (row * parts + part).to(tl.int64)[:, None] * channels + channel[None, :]
    inside = (part < parts)[:, None] & (channel < channels)[None, :]
    return tl.load(partials + offsets, mask=inside, other=0.0).to(tl.float64)


@triton.jit
def total_of(partials, row: tl.constexpr, parts, channel, channels, BLOCK_PARTS: tl.constexpr):
    """Sum a row of partial results over the parts, [channels] in float64."""
    total = load_partials(partials, row, tl.arange(0, BLOCK_PARTS), parts, channel, channels)
    for first in range(BLOCK_PARTS, parts, BLOCK_PARTS):
        total += load_partials(partials, row, first + tl.arange(0, BLOCK_PARTS), parts, channel, channels)
    return tl.sum(total, 0)


@triton.jit
def affine_of(stats, weight, bias, channel, channels, eps):
    """Mean, scale and bias of the channels, to the bit the same wherever they are needed."""
    mean = load_stat(stats, 0, channel, channels)
    sigma = load_stat(stats, 1, channel, channels)
    scale = tl.div_rn(1.0, tl.sqrt_rn(tl.fma(sigma, sigma, tl.zeros_like(sigma) + eps)))
    if weight is not None:
        scale = scale * tl.load(weight + channel, mask=channel < channels, other=0.0)
    offset = tl.zeros_like(mean)
    if bias is not None:
        offset = tl.load(bias + channel, mask=channel < channels, other=0.0)
    return mean, scale, offset


@triton.jit
def normalised(d, scale, offset):
    """d scale + offset in one rounding, so that no compiler is free to choose another."""
    return tl.fma(d, tl.broadcast_to(scale[None, :], d.shape), tl.broadcast_to(offset[None, :], d.shape))


@triton.jit
def sign_of(d):
    """-1, 0 or 1; 0 of NaN."""
    return (d > 0).to(tl.float32) - (d < 0).to(tl.float32)
