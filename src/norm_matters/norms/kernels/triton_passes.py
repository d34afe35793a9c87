"""Triton kernels of the forward pass: sums, statistics, normalisation."""

# ruff: noqa: N803  (Triton's users write what is constant for the compiler in capitals)
# Inside a kernel the types are the compiler's own: pyright sees the wrong ones.
# pyright: basic, reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false
# pyright: reportIndexIssue=false, reportOperatorIssue=false, reportOptionalMemberAccess=false
# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false

import triton
import triton.language as tl

from norm_matters.norms.kernels.triton_tiles import (
    SIZES,
    affine_of,
    channels_of,
    highest_per_channel,
    load_partials,
    load_stat,
    normalised,
    part_of,
    per_channel,
    place,
    sign_of,
    store_partial,
    total_of,
)


@triton.jit(do_not_specialize=SIZES)
def sum_values(
    x,
    partials,
    rows,
    units,
    channels,
    parts,
    tiles,
    SQUARES: tl.constexpr,
    EXTREMES: tl.constexpr,
    PLANES: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Count and mean of each part; with SQUARES also sum (x - mean)^2, with EXTREMES the highest and lowest x.

    The sums are those of x less the mean of the part's first tile. That is a good share of the part, and so is near the
    part's mean in units of its spread, whatever the values are: little precision is lost to the shift.
    """
    channel = channels_of(tl.program_id(0), PLANES, BLOCK_COLUMNS)
    part, first, last = part_of(parts, tiles, False)
    offsets, inside = place(first, rows, units, channels, PLANES, ALIGN, BLOCK_ROWS, BLOCK_COLUMNS)
    value = tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32)
    high = highest_per_channel(tl.where(inside, value, -float("inf")), PLANES)
    low = -highest_per_channel(tl.where(inside, -value, -float("inf")), PLANES)
    # Rounding must not carry it out of the values' range: the deviations of equal values are 0.
    shift = per_channel(value, PLANES) / tl.maximum(per_channel(inside.to(tl.float32), PLANES), 1.0)
    shift = tl.minimum(tl.maximum(shift, low), high)
    shift = tl.where(tl.abs(shift) < float("inf"), shift, 0.0)

    total = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    count = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    squares = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    highest = tl.full([BLOCK_ROWS, BLOCK_COLUMNS], -float("inf"), tl.float32)
    lowest = tl.full([BLOCK_ROWS, BLOCK_COLUMNS], float("inf"), tl.float32)
    for tile in range(first, last):
        offsets, inside = place(tile, rows, units, channels, PLANES, ALIGN, BLOCK_ROWS, BLOCK_COLUMNS)
        value = tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32)
        d = tl.where(inside, value - shift[None, :], 0.0)
        total += d
        count += inside.to(tl.float32)
        if SQUARES:
            squares += d * d
        if EXTREMES:
            highest = tl.where(inside, tl.maximum(highest, value), highest)
            lowest = tl.where(inside, tl.minimum(lowest, value), lowest)

    values = per_channel(count, PLANES)
    sum_d = per_channel(total, PLANES)
    away = sum_d / tl.maximum(values, 1.0)
    store_partial(partials, 0, values, part, parts, channel, channels)
    store_partial(partials, 1, shift + away, part, parts, channel, channels)
    if SQUARES:
        sum_d2 = per_channel(squares, PLANES) - sum_d * away
        # Not tl.maximum, which makes 0 of NaN.
        store_partial(partials, 2, tl.where(sum_d2 < 0, 0.0, sum_d2), part, parts, channel, channels)
    if EXTREMES:
        store_partial(partials, 2, highest_per_channel(highest, PLANES), part, parts, channel, channels)
        store_partial(partials, 3, -highest_per_channel(-lowest, PLANES), part, parts, channel, channels)


@triton.jit(do_not_specialize=SIZES)
def finish_values(
    partials,
    stats,
    channels,
    parts,
    n,
    constant,
    SQUARES: tl.constexpr,
    EXTREMES: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """The mean from `sum_values`; sigma too, with SQUARES or EXTREMES (then the threshold and k - above), else 1."""
    channel = tl.program_id(0) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    inside = channel < channels
    part = tl.arange(0, BLOCK_PARTS)
    total = tl.zeros([BLOCK_PARTS, BLOCK_CHANNELS], tl.float64)
    for first in range(0, parts, BLOCK_PARTS):
        count = load_partials(partials, 0, first + part, parts, channel, channels)
        total += count * load_partials(partials, 1, first + part, parts, channel, channels)
    mean = tl.sum(total, 0) / n
    sigma = tl.full([BLOCK_CHANNELS], 1.0, tl.float64)
    if SQUARES:
        squares = tl.zeros([BLOCK_PARTS, BLOCK_CHANNELS], tl.float64)
        for first in range(0, parts, BLOCK_PARTS):
            count = load_partials(partials, 0, first + part, parts, channel, channels)
            away = load_partials(partials, 1, first + part, parts, channel, channels) - mean[None, :]
            squares += load_partials(partials, 2, first + part, parts, channel, channels) + count * away * away
        sigma = tl.sqrt(tl.sum(squares, 0) / n)
    if EXTREMES:
        largest = tl.full([BLOCK_PARTS, BLOCK_CHANNELS], 0.0, tl.float32)
        narrow = mean.to(tl.float32)
        for first in range(0, parts, BLOCK_PARTS):
            real = ((first + part) < parts)[:, None]
            for row in tl.static_range(2, 4):
                value = load_partials(partials, row, first + part, parts, channel, channels).to(tl.float32)
                largest = tl.where(real, tl.maximum(largest, tl.abs(value - narrow[None, :])), largest)
        # NaN, passed over so far, is in the mean.
        threshold = tl.max(largest, 0) + (narrow - narrow)
        sigma = threshold.to(tl.float64) * constant
        tl.store(stats + 3 * channels + channel, threshold, mask=inside)
        tl.store(stats + 4 * channels + channel, tl.full([BLOCK_CHANNELS], 1.0, tl.float32), mask=inside)
    tl.store(stats + channel, mean.to(tl.float32), mask=inside)
    tl.store(stats + channels + channel, sigma.to(tl.float32), mask=inside)


@triton.jit(do_not_specialize=SIZES)
def sum_sizes(
    x,
    stats,
    partials,
    rows,
    units,
    channels,
    parts,
    tiles,
    PLANES: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Sum |d| and sum sign(d) of each part."""
    channel = channels_of(tl.program_id(0), PLANES, BLOCK_COLUMNS)
    part, first, last = part_of(parts, tiles, True)
    mean = load_stat(stats, 0, channel, channels)
    sizes = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    signs = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    for tile in range(first, last):
        offsets, inside = place(tile, rows, units, channels, PLANES, ALIGN, BLOCK_ROWS, BLOCK_COLUMNS)
        value = tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32)
        d = tl.where(inside, value - mean[None, :], 0.0)
        sizes += tl.abs(d)
        signs += sign_of(d)
    store_partial(partials, 0, per_channel(sizes, PLANES), part, parts, channel, channels)
    store_partial(partials, 1, per_channel(signs, PLANES), part, parts, channel, channels)


@triton.jit(do_not_specialize=SIZES)
def finish_sizes(
    partials, stats, channels, parts, n, constant, BLOCK_PARTS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr
):
    """Sigma and S(u) of l1 from `sum_sizes`."""
    channel = tl.program_id(0) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    inside = channel < channels
    sigma = total_of(partials, 0, parts, channel, channels, BLOCK_PARTS) / n * constant
    signs = total_of(partials, 1, parts, channel, channels, BLOCK_PARTS)
    tl.store(stats + channels + channel, sigma.to(tl.float32), mask=inside)
    tl.store(stats + 2 * channels + channel, signs.to(tl.float32), mask=inside)


@triton.jit(do_not_specialize=SIZES)
def normalise(
    x,
    residual,
    weight,
    bias,
    stats,
    y,
    partials,
    rows,
    units,
    channels,
    parts,
    tiles,
    eps,
    RELU: tl.constexpr,
    TIES: tl.constexpr,
    BACKWARDS: tl.constexpr,
    PLANES: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Write y. With TIES also count per part what ties with the threshold, and sum the signs above it and at it."""
    channel = channels_of(tl.program_id(0), PLANES, BLOCK_COLUMNS)
    part, first, last = part_of(parts, tiles, BACKWARDS)
    mean, scale, offset = affine_of(stats, weight, bias, channel, channels, eps)
    if TIES:
        threshold = load_stat(stats, 3, channel, channels)
        tied = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
        tied_signs = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
        above_signs = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    for tile in range(first, last):
        offsets, inside = place(tile, rows, units, channels, PLANES, ALIGN, BLOCK_ROWS, BLOCK_COLUMNS)
        d = tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32) - mean[None, :]
        value = normalised(d, scale, offset)
        if residual is not None:
            value += tl.load(residual + offsets, mask=inside, other=0.0).to(tl.float32)
        if RELU:
            # NaN stays NaN.
            value = tl.where(value <= 0, 0.0, value)
        tl.store(y + offsets, value.to(y.dtype.element_ty), mask=inside)
        if TIES:
            sign = sign_of(d)
            ties = inside & (tl.abs(d) == threshold[None, :])
            tied += ties.to(tl.float32)
            tied_signs += tl.where(ties, sign, 0.0)
            above_signs += tl.where(inside & (tl.abs(d) > threshold[None, :]), sign, 0.0)
    if TIES:
        store_partial(partials, 0, per_channel(tied, PLANES), part, parts, channel, channels)
        store_partial(partials, 1, per_channel(tied_signs, PLANES), part, parts, channel, channels)
        store_partial(partials, 2, per_channel(above_signs, PLANES), part, parts, channel, channels)
