"""How fast norms are, forward and backward, beside torch's own in the same layout; and what they keep."""

import csv
import io
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, get_args

import torch
from torch import Tensor

from norm_matters.bench.memory import Form, channel_is_cached, fewest_passes, synchroniser
from norm_matters.bench.norm_arms import BATCH, DTYPES, LAYOUTS, NATIVE, REFERENCE, Arm, Batch, norm_arms
from norm_matters.bench.timing import REPEATS, speedup, time_in_turns
from norm_matters.core.allocator import keep_pages
from norm_matters.core.errors import UserError, nearest
from norm_matters.norms.batchwise import BatchwiseNorm
from norm_matters.norms.build import canonical_spec, resolve_spec

NORMS = ("l1", "l2", "linf", "topk:k=10", "mean")
SHAPES = ("64x64x56x56", "64x256x56x56", "64x512x28x28", "64x2048x7x7", "128x16x32x32", "128x64x8x8")
QUICK_SHAPES = ("16x16x16x16", "8x64x8x8")
FORMS: tuple[Form, ...] = get_args(Form)


class NormRow(NamedTuple):
    """One norm in one form and implementation.

    Attributes:
        norm: canonical spec; `nn.BatchNorm2d`, `nn.GroupNorm` for torch's own.
        form: `plain`: alone; `relu`: with a ReLU; `add_relu`: with an addition and a ReLU.
        shape: NxCxHxW.
        dtype, layout: of input, gradient and residual.
        implementation: of our norms `cpu` or `triton` (our kernels), `reference` (plain torch, what is used where no
            kernel can) or `compiled` (that, by torch.compile); of torch's `native` or `native compiled`.
        milliseconds: forward + backward, the median; None where it failed, as in all that follows.
        speedup: how many times as fast as native it is in the same layout: the median of the ratios of each round.
        floor_ms: of the fewest passes over memory (see `fewest_passes`) at the bandwidth of a copy; None where unknown.
        share_of_floor: floor_ms / milliseconds; over 1 where the tensors fit into a cache.
        kept_bytes: between forward and backward, the input included where it is kept (see `memory.kept_bytes`).
        peak_bytes: the most that is alive at once of what forward + backward allocate (see `memory.peak_bytes`).
        error: what went wrong, in one line; else empty.
    """

    norm: str
    form: str
    shape: str
    dtype: str
    layout: str
    implementation: str
    milliseconds: float | None = None
    speedup: float | None = None
    floor_ms: float | None = None
    share_of_floor: float | None = None
    kept_bytes: int | None = None
    peak_bytes: int | None = None
    error: str = ""


@dataclass(frozen=True)
class NormCase:
    """Norms on one input, timed in turns.

    Attributes:
        norms: specs.
        form, shape, dtype, layout: see `NormRow`.
        device: where to compute.
        compiled: time the compiled forms too; each is compiled for seconds first.
    """

    norms: tuple[str, ...]
    form: Form
    shape: tuple[int, int, int, int]
    dtype: str
    layout: str
    device: str = "cpu"
    compiled: bool = False

    def measure(self, bandwidth: float, *, repeats: int = REPEATS) -> list[NormRow]:
        """Time all implementations in turns; malloc keeps its pages for all of them, and in this process from now on.

        Args:
            bandwidth: for the floor, in bytes per second.
            repeats: rounds.

        Returns:
            A row for each implementation, in the order of the norms, then torch's own.
        """
        if self.device == "cpu":
            keep_pages()
        torch.compiler.reset()  # else the compiler would refuse the functions of all cases together as too many
        batch = Batch.draw(self.shape, self.form, dtype=self.dtype, layout=self.layout, device=self.device)
        arms = norm_arms(self.norms, self.form, batch.x, compiled=self.compiled)
        memory: dict[Arm, tuple[int, int]] = {}
        errors: dict[Arm, str] = {}
        for arm in arms:
            try:
                batch.run(arm)
                memory[arm] = batch.memory(arm)
            except Exception as error:  # whatever it is: the others are measured all the same
                errors[arm] = _one_line(error)
            batch.clear(arm)
        seconds = time_in_turns(
            {arm.name: partial(batch.run, arm) for arm in memory},
            repeats=repeats,
            synchronise=synchroniser(self.device),
        )
        base = next((arm.name for arm in memory if (arm.norm, arm.implementation) == (BATCH, NATIVE)), None)
        shape = "x".join(map(str, self.shape))
        rows = []
        for arm in arms:
            row = NormRow(arm.norm, self.form, shape, self.dtype, self.layout, arm.implementation)
            if arm in errors:
                rows.append(row._replace(error=errors[arm]))
                continue
            ratio = None if base is None else speedup(seconds, arm.name, base)
            row = _timed(row, seconds[arm.name], ratio, floor_seconds(arm.norm, self.form, batch.x, bandwidth))
            rows.append(row._replace(kept_bytes=memory[arm][0], peak_bytes=memory[arm][1]))
        return rows


def floor_seconds(norm: str, form: Form, x: Tensor, bandwidth: float) -> float | None:
    """The time that the fewest passes over x take, forward and backward; None where nobody has counted them.

    Args:
        norm: spec, or nn.BatchNorm2d.
        form: what follows it.
        x: (N, C, H, W).
        bandwidth: bytes per second.
    """
    name = "l2" if norm == BATCH else norm.partition(":")[0]
    passes = fewest_passes(name, form, cached=channel_is_cached(x))
    return None if passes is None else sum(passes) * x.numel() * x.itemsize / bandwidth


def norm_cases(
    norms: Sequence[str] = NORMS,
    shapes: Sequence[str] = SHAPES,
    *,
    forms: Sequence[str] = FORMS,
    layouts: Sequence[str] = tuple(LAYOUTS),
    dtypes: Sequence[str] = ("float32",),
    device: str = "cpu",
    compiled: bool = False,
) -> list[NormCase]:
    """Every form of every shape, dtype and layout, each with all norms.

    Args:
        norms: specs of batch norms that are not made of others.
        shapes: NxCxHxW.
        forms, layouts, dtypes: names.
        device: where to compute.
        compiled: the compiled forms too.

    Raises:
        UserError: with a line for every argument that is not valid.
    """
    problems: list[str] = []
    specs = []
    for spec in norms:
        try:
            specs.append(_batch_norm(spec))
        except UserError as error:
            problems += [f"--norms: {problem}" for problem in error.problems]
    known = {"--forms": (forms, FORMS), "--layouts": (layouts, LAYOUTS), "--dtypes": (dtypes, DTYPES)}
    for option, (given, valid) in known.items():
        for name in given:
            if name not in valid:
                near = nearest(name, valid)
                problems.append(f"{option}: '{name}' is unknown, there are {', '.join(valid)}{near}")
    sizes = []
    for shape in shapes:
        try:
            sizes.append(parse_shape(shape))
        except UserError as error:
            problems += [f"--shapes: {problem}" for problem in error.problems]
    if problems:
        raise UserError(*problems)
    return [
        NormCase(tuple(dict.fromkeys(specs)), form, size, dtype, layout, device, compiled)
        for dtype in dict.fromkeys(dtypes)
        for layout in dict.fromkeys(layouts)
        for form in FORMS
        if form in forms
        for size in dict.fromkeys(sizes)
    ]


def parse_shape(text: str) -> tuple[int, int, int, int]:
    """`64x256x56x56` as numbers.

    Raises:
        UserError: it is no such shape, or has one value per channel only.
    """
    sizes = [int(part) if part.isascii() and part.isdecimal() else 0 for part in text.strip().split("x")]
    if len(sizes) != 4 or min(sizes) < 1 or math.prod(sizes) // sizes[1] < 2:
        # The sizes that can be read, the others as 8.
        known = [size or 8 for size in (*sizes, 8, 8, 8)[:4]]
        near = "x".join(map(str, known if math.prod(known) // known[1] > 1 else [8, *known[1:]]))
        raise UserError(f"'{text}' is no NxCxHxW with two or more values per channel; write e.g. '{near}'")
    n, c, h, w = sizes
    return n, c, h, w


def median_speedups(rows: Sequence[NormRow]) -> dict[tuple[str, str, str], dict[str, float]]:
    """The median over the shapes of the speedup of each of our norms, as `auto` computes it.

    Returns:
        (form, layout, dtype) -> norm -> speedup; a norm that failed everywhere is left out.
    """
    chosen: dict[tuple[str, ...], NormRow] = {}
    for row in rows:
        # Where there are kernels, their row comes first.
        if row.implementation in ("cpu", "triton", REFERENCE):
            chosen.setdefault((row.norm, row.form, row.shape, row.dtype, row.layout), row)
    found: dict[tuple[str, str, str], dict[str, list[float]]] = {}
    for row in chosen.values():
        if row.speedup is not None:
            found.setdefault((row.form, row.layout, row.dtype), {}).setdefault(row.norm, []).append(row.speedup)
    return {key: {norm: statistics.median(values) for norm, values in group.items()} for key, group in found.items()}


def norms_csv(rows: Sequence[NormRow]) -> str:
    """The rows as CSV; what was not measured is empty."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(NormRow._fields)
    for row in rows:
        table.writerow([f"{value:.6g}" if isinstance(value, float) else value for value in row])
    return text.getvalue()


def _batch_norm(spec: str) -> str:
    """The canonical spec of a batch norm; UserError for any other."""
    norm, _ = resolve_spec(spec)
    if not issubclass(norm, BatchwiseNorm) or norm.composite:
        raise UserError(f"'{spec}' is no batch norm of its own; take one such as l1 or topk:k=10")
    return canonical_spec(spec)


def _timed(row: NormRow, seconds: Sequence[float], ratio: float | None, floor: float | None) -> NormRow:
    """The row with its times."""
    median = statistics.median(seconds)
    row = row._replace(milliseconds=1e3 * median, speedup=ratio)
    return row if floor is None else row._replace(floor_ms=1e3 * floor, share_of_floor=floor / median)


def _one_line(error: Exception) -> str:
    """The first line of what an exception says, no longer than a table bears."""
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]
