"""The kernels' contract on a GPU, by Triton; the arguments and results are those of `reference`.

Passes over memory, reads + writes of the size of x, all in float32 whatever x is stored in:

    forward     sums of the values (l2, mean, linf: all that sigma needs), sums or the k largest of the deviations (l1,
                topk), y: 2 + 1 or 3 + 1, and the residual; what ties at the k-th place is counted with y
    backward    sums of the gradient, dx: 4 + 1; with a residual and a ReLU 5 + 2, for the first pass writes the
                gradient that the second reads

Between passes a small kernel brings the parts together. Nothing waits for the device and no choice depends on values,
so that all of it can be captured in a CUDA graph. Block and grid sizes are fixed by shape (`_layout`), not tuned.
"""

import functools
import importlib.util
import os
from typing import Any, NamedTuple

import torch
from torch import Tensor

from norm_matters.norms.kernels.estimator import Estimator

MOST_SLOTS = 32
"""The largest k: candidates are kept in registers."""
TILE = 4096
"""Values a program takes at a time: 16 for each thread of 8 warps, four loads of 16 bytes in float32."""
WARPS = 8
PROGRAMS_PER_SM = 8
TILES_PER_PART = 64
"""At most: what one float32 accumulator adds up is 64 values, and the shift of `sum_values` is near their mean."""
BLOCK_PARTS = 128
BLOCK_CHANNELS = 8
MOST_VALUES = 2**30
"""Per channel: rows are counted in int32."""
_ONE_STAT_ROW = 5
_CAPABILITY = (8, 0)


class _Layout(NamedTuple):
    """How a tensor is cut, as the kernels of `triton_tiles` have it.

    Attributes:
        sizes: rows, units (columns / align), channels, parts, tiles: of all passes, in this order.
        groups: programs side by side.
        shape: the constants of the kernels.
        values: per channel, n.
    """

    sizes: tuple[int, int, int, int, int]
    groups: int
    shape: dict[str, Any]
    values: int

    @property
    def channels(self) -> int:
        return self.sizes[2]

    @property
    def parts(self) -> int:
        return self.sizes[3]

    def partials(self, x: Tensor, count: int) -> Tensor:
        """Room for `count` partial results of each part and channel."""
        return x.new_empty((count, self.parts, self.channels), dtype=torch.float32)


def reason_against(x: Tensor, estimator: Estimator) -> str | None:
    """Say why these kernels cannot do it, or None."""
    if not _has_triton():
        return "the package triton is not installed"
    if not x.is_cuda and not (x.device.type == "cpu" and _interpreted()):
        return f"the input is on {x.device.type}, not on a GPU"
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"{str(x.dtype).removeprefix('torch.')} is not one of float32, float16 and bfloat16"
    if x.dim() < 2 or x.numel() == 0 or x.numel() // x.shape[1] > MOST_VALUES:
        return "it takes from 1 to 2^30 values per channel"
    if not x.is_contiguous() and not _is_channels_last(x):
        return "the input is neither contiguous nor in channels_last"
    if estimator.kind == "topk" and estimator.k > MOST_SLOTS:
        return f"k is more than {MOST_SLOTS}"
    if x.is_cuda and _capability(x.get_device()) < _CAPABILITY:
        return "the GPU's compute capability is below 8.0"
    return None


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    estimator: Estimator,
    *,
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor]:
    """See `reference.forward`."""
    from norm_matters.norms.kernels import triton_passes, triton_selection

    layout = _layout(x)
    kind, k = estimator.kind, min(estimator.k, layout.values)
    squares, extremes = kind == "l2", kind == "topk" and k == 1
    selects = kind == "topk" and not extremes
    with torch.cuda.device_of(x):
        stats = x.new_zeros((_ONE_STAT_ROW, layout.channels), dtype=torch.float32)
        partials = layout.partials(x, 4 if extremes else 3 if squares else 2)
        flags = {"SQUARES": squares, "EXTREMES": extremes}
        _pass(triton_passes.sum_values, layout, (x, partials), flags)
        _finish(triton_passes.finish_values, layout, partials, stats, (layout.values, estimator.constant), flags)
        if kind == "l1":
            _pass(triton_passes.sum_sizes, layout, (x, stats, partials))
            _finish(triton_passes.finish_sizes, layout, partials, stats, (layout.values, estimator.constant))
        elif selects:
            _select(triton_selection, x, stats, k, estimator.constant)
        ties = layout.partials(x, 3) if kind == "topk" else None
        backwards = kind != "l1" and not selects  # the other way than the pass before
        y = _normalise(x, weight, bias, residual, stats, ties, layout, eps=eps, relu=relu, backwards=backwards)
        if ties is not None:
            _finish(triton_selection.finish_ties, layout, ties, stats)
    return y, stats


def apply(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    stats: Tensor,
    *,
    eps: float,
    relu: bool,
) -> Tensor:
    """See `reference.apply`."""
    with torch.cuda.device_of(x):
        return _normalise(x, weight, bias, residual, stats, None, _layout(x), eps=eps, relu=relu, backwards=False)


def backward(
    grad: Tensor,
    x: Tensor,
    out: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    stats: Tensor,
    estimator: Estimator,
    *,
    eps: float,
    relu: bool,
    has_residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """See `reference.backward`."""
    from norm_matters.norms.kernels import triton_gradients

    layout = _layout(x)
    k = max(1, min(estimator.k, layout.values))
    by_output = relu and out is not None
    with torch.cuda.device_of(x):
        dweight, dbias = x.new_empty((2, layout.channels), dtype=torch.float32).unbind()
        coefficients = x.new_empty((3, layout.channels), dtype=torch.float32)
        partials = layout.partials(x, 2)
        masked = torch.empty_like(x) if by_output else None
        _pass(
            triton_gradients.sum_gradients,
            layout,
            (grad, x, out if by_output else None, weight, bias, stats, masked, partials),
            {"RELU": relu},
            eps,
        )
        _finish(
            triton_gradients.finish_gradients,
            layout,
            partials,
            stats,
            (layout.values, k, estimator.constant, eps),
            {"KIND": estimator.kind},
            (weight, dweight, dbias, coefficients),
        )
        dx = torch.empty_like(x)
        _pass(
            triton_gradients.write_gradient,
            layout,
            (grad if masked is None else masked, x, weight, bias, stats, coefficients, dx),
            {"KIND": estimator.kind, "RELU": relu and not by_output},
            eps,
        )
    return dx, dweight, dbias, masked if has_residual else None


def _normalise(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    stats: Tensor,
    ties: Tensor | None,
    layout: _Layout,
    *,
    eps: float,
    relu: bool,
    backwards: bool,
) -> Tensor:
    """Write y, and count into `ties` what ties with the threshold."""
    from norm_matters.norms.kernels.triton_passes import normalise

    y = torch.empty_like(x)
    flags = {"RELU": relu, "TIES": ties is not None, "BACKWARDS": backwards}
    _pass(normalise, layout, (x, residual, weight, bias, stats, y, ties), flags, eps)
    return y


def _select(kernels: Any, x: Tensor, stats: Tensor, k: int, constant: float) -> None:
    """The statistics from the k largest deviations."""
    layout = _layout(x, programs_per_sm=2)  # fewer parts, for each has k candidates
    slots = _power(k)
    candidates = layout.partials(x, k)
    _pass(kernels.find_candidates, layout, (x, stats, candidates), {"SLOTS": slots}, k)
    _launch(
        kernels.select_largest,
        (layout.channels, 1),
        (candidates, stats, layout.channels, layout.parts, k, constant),
        {"SLOTS": slots, "BLOCK": 1024},
        warps=4,
    )


def _pass(kernel: Any, layout: _Layout, tensors: tuple[Any, ...], flags: Any = None, *numbers: float) -> None:
    """Start a kernel that passes over a tensor."""
    constants = {**layout.shape, **(flags or {})}
    _launch(kernel, (layout.groups, layout.parts), (*tensors, *layout.sizes, *numbers), constants, warps=WARPS)


def _finish(
    kernel: Any,
    layout: _Layout,
    partials: Tensor,
    stats: Tensor,
    numbers: tuple[float, ...] = (),
    flags: Any = None,
    tensors: tuple[Tensor | None, ...] = (),
) -> None:
    """Start a kernel that brings the partial results together."""
    blocks = {"BLOCK_PARTS": min(BLOCK_PARTS, _power(layout.parts)), "BLOCK_CHANNELS": BLOCK_CHANNELS}
    arguments = (partials, stats, *tensors, layout.channels, layout.parts, *numbers)
    _launch(kernel, (-(-layout.channels // BLOCK_CHANNELS), 1), arguments, {**blocks, **(flags or {})}, warps=4)


def _launch(
    kernel: Any, grid: tuple[int, int], arguments: tuple[Any, ...], constants: dict[str, Any], *, warps: int
) -> None:
    kernel[grid](*arguments, **constants, num_warps=warps)


def _layout(x: Tensor, programs_per_sm: int | None = None) -> _Layout:
    """Cut x (N, C, *).

    Tiles are wide, for long loads, and cover the table closely. There are programs enough to fill the device several
    times, so that the last ones do not leave it idle, and each has some tiles to spread its start over.
    """
    return _cut(
        tuple(x.shape),
        x.is_contiguous() and x.shape[2:].numel() > 1,
        _multiprocessors(x.get_device()) * (programs_per_sm or PROGRAMS_PER_SM),
        TILE,
    )


@functools.lru_cache(maxsize=1024)
def _cut(shape: tuple[int, ...], planes: bool, programs: int, tile: int) -> _Layout:
    channels, pixels = shape[1], torch.Size(shape[2:]).numel()
    rows, columns = (shape[0], pixels) if planes else (shape[0] * pixels, channels)
    block_columns = _block(columns, most=tile if planes else min(64, tile))
    block_rows = min(_power(rows), tile // block_columns)
    tiles = -(-rows // block_rows) * (-(-columns // block_columns) if planes else 1)
    groups = channels if planes else -(-columns // block_columns)
    parts = min(tiles, max(-(-programs // groups), -(-tiles // TILES_PER_PART)), 65535)
    parts = -(-tiles // -(-tiles // parts))  # none is empty
    align = min(16, columns & -columns)
    shape_of_kernel = {
        "PLANES": planes,
        "ALIGN": align,
        "BLOCK_ROWS": block_rows,
        "BLOCK_COLUMNS": block_columns,
    }
    sizes = (rows, columns // align, channels, parts, tiles)
    return _Layout(sizes, groups, shape_of_kernel, rows * columns if planes else rows)


def _block(extent: int, *, most: int) -> int:
    """The widest power of two, 32 to `most`, that covers the extent with at most 15% to spare; else what covers it."""
    block = most
    while block >= 32:
        if -(-extent // block) * block <= 1.15 * extent:
            return block
        block //= 2
    return min(most, _power(extent))


def _power(value: int) -> int:
    """The power of two that is not less."""
    return 1 << max(0, value - 1).bit_length()


def _is_channels_last(x: Tensor) -> bool:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.dim() in formats and x.is_contiguous(memory_format=formats[x.dim()])


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _interpreted() -> bool:
    """Whether Triton runs on the CPU, for tests."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _capability(device: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@functools.cache
def _multiprocessors(device: int) -> int:
    return 1 if device < 0 else torch.cuda.get_device_properties(device).multi_processor_count
