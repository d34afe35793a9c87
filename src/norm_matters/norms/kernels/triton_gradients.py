"""Triton kernels of the backward pass."""

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
def sum_gradients(
    grad,
    x,
    out,
    weight,
    bias,
    stats,
    masked,
    partials,
    rows,
    units,
    channels,
    parts,
    tiles,
    eps,
    RELU: tl.constexpr,
    PLANES: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """S(g) and S(g d) of each part, with g the gradient that RELU passes on.

    Where y passed is read from `out` if that is given, and g is written to `masked` then; else it is computed anew.
    """
    channel = channels_of(tl.program_id(0), PLANES, BLOCK_COLUMNS)
    part, first, last = part_of(parts, tiles, False)
    mean, scale, offset = affine_of(stats, weight, bias, channel, channels, eps)
    sum_g = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    sum_gd = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    for tile in range(first, last):
        offsets, inside = place(tile, rows, units, channels, PLANES, ALIGN, BLOCK_ROWS, BLOCK_COLUMNS)
        g = tl.load(grad + offsets, mask=inside, other=0.0).to(tl.float32)
        d = tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32) - mean[None, :]
        if RELU:
            if out is not None:
                g = tl.where(tl.load(out + offsets, mask=inside, other=0.0) > 0, g, 0.0)
                tl.store(masked + offsets, g.to(masked.dtype.element_ty), mask=inside)
            else:
                g = tl.where(normalised(d, scale, offset).to(x.dtype.element_ty) > 0, g, 0.0)
        sum_g += g
        sum_gd += g * d
    store_partial(partials, 0, per_channel(sum_g, PLANES), part, parts, channel, channels)
    store_partial(partials, 1, per_channel(sum_gd, PLANES), part, parts, channel, channels)


@triton.jit(do_not_specialize=SIZES)
def finish_gradients(
    partials,
    stats,
    weight,
    dweight,
    dbias,
    coefficients,
    channels,
    parts,
    n,
    k,
    constant,
    eps,
    KIND: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr,
):
    """The gradients of weight and bias, and (a, b, q) for dx = a g + b - q u."""
    channel = tl.program_id(0) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    inside = channel < channels
    sum_g = total_of(partials, 0, parts, channel, channels, BLOCK_PARTS)
    sum_gd = total_of(partials, 1, parts, channel, channels, BLOCK_PARTS)
    sigma = load_stat(stats, 1, channel, channels).to(tl.float64)
    slope_sum = load_stat(stats, 2, channel, channels).to(tl.float64)
    r = 1.0 / tl.sqrt(sigma * sigma + eps)
    a = r
    if weight is not None:
        a = r * tl.load(weight + channel, mask=inside, other=0.0).to(tl.float64)
    # r^3 sigma w S(g d) gain; in the gain of l2 sigma cancels.
    q = a * r * r * sum_gd
    if KIND == "l2":
        q = q / n
    elif KIND == "l1":
        q = q * sigma * constant / n
    elif KIND == "topk":
        q = q * sigma * constant / k
    else:
        q = tl.zeros_like(q)
    b = (q * slope_sum - a * sum_g) / n
    tl.store(dweight + channel, (sum_gd * r).to(tl.float32), mask=inside)
    tl.store(dbias + channel, sum_g.to(tl.float32), mask=inside)
    tl.store(coefficients + channel, a.to(tl.float32), mask=inside)
    tl.store(coefficients + channels + channel, b.to(tl.float32), mask=inside)
    tl.store(coefficients + 2 * channels + channel, q.to(tl.float32), mask=inside)


@triton.jit(do_not_specialize=SIZES)
def write_gradient(
    grad,
    x,
    weight,
    bias,
    stats,
    coefficients,
    dx,
    rows,
    units,
    channels,
    parts,
    tiles,
    eps,
    KIND: tl.constexpr,
    RELU: tl.constexpr,
    PLANES: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """Write dx = a g + b - q u; with RELU g is what of grad y passes on, computed anew."""
    channel = channels_of(tl.program_id(0), PLANES, BLOCK_COLUMNS)
    _, first, last = part_of(parts, tiles, True)
    mean, scale, offset = affine_of(stats, weight, bias, channel, channels, eps)
    a = load_stat(coefficients, 0, channel, channels)[None, :]
    b = load_stat(coefficients, 1, channel, channels)[None, :]
    q = load_stat(coefficients, 2, channel, channels)[None, :]
    threshold = load_stat(stats, 3, channel, channels)[None, :]
    share = load_stat(stats, 4, channel, channels)[None, :]
    for tile in range(first, last):
        offsets, inside = place(tile, rows, units, channels, PLANES, ALIGN, BLOCK_ROWS, BLOCK_COLUMNS)
        g = tl.load(grad + offsets, mask=inside, other=0.0).to(tl.float32)
        d = tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32) - mean[None, :]
        if RELU:
            g = tl.where(normalised(d, scale, offset).to(x.dtype.element_ty) > 0, g, 0.0)
        value = a * g + b
        if KIND == "l2":
            value -= q * d
        elif KIND == "l1":
            value -= q * sign_of(d)
        elif KIND == "topk":
            size = tl.abs(d)
            weight_of = tl.where(size > threshold, 1.0, tl.where(size == threshold, share, 0.0))
            value -= q * (sign_of(d) * weight_of)
        tl.store(dx + offsets, value.to(dx.dtype.element_ty), mask=inside)
