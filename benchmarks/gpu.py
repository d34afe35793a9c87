"""What the Triton kernels do on a GPU: first whether they are right, then how fast, against PyTorch's own.

    .venv/bin/python benchmarks/gpu.py [--minutes 9] [--output benchmarks/gpu.csv] [--dry-run]

Prints a table and writes it. Norm + ReLU, forward + backward, for each shape, layout and dtype, in turns in one
process:

    kernel l1 ...     the backend's functions, called directly
    graph l1 ...      the same from a CUDA graph: without what it costs to start kernels from Python
    norm l1 ...       the norm as a model calls it, autograd and running statistics included
    native            nn.BatchNorm2d + in-place ReLU, without cuDNN
    cudnn             the same with cuDNN allowed (it takes channels_last; for the contiguous layout torch has its own)
    compiled          nn.BatchNorm2d + ReLU by torch.compile
    copy              y.copy_(x), which gives the bandwidth that there is

GB/s count the fewest passes over memory that the norm can do with; `share` is that over the copy's GB/s. What fails is
reported in its row and the rest goes on. Nothing is timed after the minutes are over, but the table is written.
"""

import argparse
import csv
import functools
import io
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import norm_matters as nm
from norm_matters.bench.timing import time_in_turns
from norm_matters.norms import normalise_and_activate
from norm_matters.norms.kernels import reference
from norm_matters.norms.kernels import triton as backend
from norm_matters.norms.kernels.estimator import Estimator
from norm_matters.record.files import write_file

SHAPES = [
    (256, 256, 56, 56),
    (64, 64, 56, 56),
    (128, 512, 28, 28),
    (256, 2048, 7, 7),
    (64, 256, 56, 56),
    (256, 1024, 14, 14),
    (128, 16, 32, 32),
]
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
NORMS = {
    "l1": Estimator("l1", 1.25),
    "l2": Estimator("l2"),
    "linf": Estimator("topk", 0.25, 1),
    "topk": Estimator("topk", 0.3, 10),
}
# Forward and backward, reads and writes: of x, of x and the gradient.
PASSES = {"l1": 9, "l2": 8, "linf": 8, "topk": 9, "native": 8, "cudnn": 8, "compiled": 8, "copy": 2}
PEERS = ["native", "cudnn", "compiled"]
TOLERANCE = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1.6e-2}
COLUMNS = [
    "what",
    "arm",
    "shape",
    "layout",
    "dtype",
    "ms",
    "spread",
    "gb_per_s",
    "share",
    "of_best_peer",
    "error",
    "note",
]


@dataclass(frozen=True)
class Case:
    """An input: shape (N, C, H, W), the names of its layout and dtype."""

    shape: tuple[int, int, int, int]
    layout: str
    dtype: str

    @property
    def label(self) -> dict[str, str]:
        """What a row of the table says of it."""
        return {"shape": "x".join(map(str, self.shape)), "layout": self.layout, "dtype": self.dtype}

    @property
    def gigabytes(self) -> float:
        """The size of one tensor."""
        return torch.Size(self.shape).numel() * DTYPES[self.dtype].itemsize / 1e9

    def tensor(self, seed: int) -> Tensor:
        """Gaussian numbers."""
        generator = torch.Generator("cuda").manual_seed(seed)
        x = torch.randn(self.shape, device="cuda", dtype=DTYPES[self.dtype], generator=generator)
        return x.contiguous(memory_format=LAYOUTS[self.layout])


@dataclass
class Table:
    """The rows so far; each is printed as it comes."""

    rows: list[dict[str, Any]] = field(default_factory=list)

    def add(self, case: Case, **values: Any) -> None:
        """Add a row."""
        row = {**case.label, **values}
        self.rows.append(row)
        print("  ".join(str(row.get(column, "-")).ljust(12) for column in COLUMNS), flush=True)

    def text(self) -> str:
        """As CSV."""
        file = io.StringIO()
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        return file.getvalue()


def speed_cases() -> Iterator[Case]:
    """What is timed, the most telling first."""
    for shape in SHAPES:
        for dtype in DTYPES:
            for layout in LAYOUTS:
                yield Case(shape, layout, dtype)


def check_cases() -> Iterator[Case]:
    """What is compared with float64: wide and narrow channels, sizes that nothing divides, many parts."""
    for shape in [(8, 96, 28, 28), (16, 64, 56, 56), (5, 17, 7, 7), (64, 3, 14, 15), (32, 256, 1, 1)]:
        for dtype in [*DTYPES, "float16"]:
            for layout in LAYOUTS:
                yield Case(shape, layout, dtype)


def run_kernel(estimator: Estimator, tensors: tuple[Any, ...], *, relu: bool = True) -> tuple[Any, ...]:
    """Forward and backward by the backend: y, stats, dx, dweight, dbias, dresidual."""
    x, grad, weight, bias, residual = tensors
    y, stats = backend.forward(x, weight, bias, residual, estimator, eps=1e-5, relu=relu)
    masked = relu and residual is not None
    gradients = backend.backward(
        grad, x, y if masked else None, weight, bias, stats, estimator, eps=1e-5, relu=relu, has_residual=masked
    )
    return y, stats, *gradients


def largest_errors(case: Case, estimator: Estimator, *, residual: bool) -> dict[str, float]:
    """The largest error of each result over the largest number of the truth in float64, taken at the kernel's ties."""
    channels = case.shape[1]
    x, grad = case.tensor(0) + 0.5, case.tensor(1)
    weight, bias = (torch.linspace(0.5, 1.5, channels, device="cuda") for _ in range(2))
    added = case.tensor(2) if residual else None
    y, stats, *gradients = run_kernel(estimator, (x, grad, weight, bias, added))
    again = run_kernel(estimator, (x, grad, weight, bias, added))
    if not all(torch.equal(a, b) for a, b in zip((y, stats, *gradients), again, strict=True) if a is not None):
        raise AssertionError("two runs differ")
    wide = [tensor.double() for tensor in (x, weight, bias)]
    truth, true_stats = reference.forward(
        *wide, None if added is None else added.double(), estimator, eps=1e-5, relu=True
    )
    # The mask of the ReLU is the kernel's, for where y is 0 but for rounding either is right.
    mask = y > 0
    exact = reference.backward(
        torch.where(mask, grad, 0).double(),
        wide[0],
        None,
        *wide[1:],
        true_stats,
        estimator,
        eps=1e-5,
        relu=False,
        has_residual=False,
    )
    pairs = {
        "y": (y, truth),
        "mean": (stats[0], true_stats[0]),
        "sigma": (stats[1], true_stats[1]),
        "dx": (gradients[0], exact[0]),
        "dweight": (gradients[1], exact[1]),
        "dbias": (gradients[2], exact[2]),
    }
    if residual:
        pairs["dresidual"] = (gradients[3], torch.where(mask, grad, 0).double())
    return {name: ((a - b).abs().max() / b.abs().max().clamp(min=1)).item() for name, (a, b) in pairs.items()}


def check(table: Table, deadline: float) -> bool:
    """Compare every kernel with float64; whether all were right."""
    right = True
    for case in check_cases():
        for name, estimator in {**NORMS, "mean": Estimator("mean")}.items():
            for residual in (False, True):
                if time.monotonic() > deadline:
                    table.add(case, what="check", note="left out with all that follows: no time")
                    return right
                arm = f"{name}{' + add' if residual else ''} + relu"
                try:
                    errors = largest_errors(case, estimator, residual=residual)
                    worst = max(errors, key=lambda key: errors[key])
                    close = errors[worst] <= TOLERANCE[case.dtype]
                    note = worst if close else f"WRONG: {errors}"
                    table.add(case, what="check", arm=arm, error=f"{errors[worst]:.1e}", note=note)
                except Exception as error:
                    close = False
                    table.add(case, what="check", arm=arm, note=f"FAILED: {first_line(error)}")
                right &= close
    for name, estimator in NORMS.items():
        case = Case((8, 4, 9, 9), "contiguous", "float32")
        x = case.tensor(0)
        x[3, 1, 2, 2], x[:, 2] = float("nan"), 0.1
        try:
            y, *_ = run_kernel(estimator, (x, x, None, None, None), relu=False)
            finite = y.isfinite().flatten(2).all(2).all(0).tolist()
            good = finite == [True, False, True, True] and y[:, 1].isnan().all() and (y[:, 2] == 0).all()
            table.add(case, what="check", arm=f"{name}, NaN", note="" if good else f"WRONG: finite {finite}")
            right &= bool(good)
        except Exception as error:
            right = False
            table.add(case, what="check", arm=f"{name}, NaN", note=f"FAILED: {first_line(error)}")
    return right


def arms_of(case: Case) -> Iterator[tuple[str, Callable[[], Callable[[], object]]]]:
    """Each arm by name, with what prepares it and returns what is timed."""
    channels = case.shape[1]

    @functools.cache
    def inputs() -> tuple[Tensor, Tensor]:
        return case.tensor(0), case.tensor(1)

    def direct(estimator: Estimator, *, graph: bool) -> Callable[[], object]:
        weight, bias = torch.ones(channels, device="cuda"), torch.zeros(channels, device="cuda")
        tensors = (*inputs(), weight, bias, None)
        if not graph:
            return lambda: run_kernel(estimator, tensors)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            run_kernel(estimator, tensors)
        torch.cuda.synchronize()
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            kept = run_kernel(estimator, tensors)
        return lambda: (captured.replay(), kept)

    def module(build: Callable[[], Callable[[Tensor], Tensor]], *, cudnn: bool = True) -> Callable[[], object]:
        forward, x, grad = build(), inputs()[0].detach().requires_grad_(), inputs()[1]

        def step() -> None:
            x.grad = None
            with torch.backends.cudnn.flags(enabled=cudnn):
                forward(x).backward(grad)

        return step

    def own(spec: str) -> Callable[[Tensor], Tensor]:
        norm, activation = nm.create_norm(spec, channels, device="cuda"), nn.ReLU(inplace=True)
        return lambda x: normalise_and_activate(norm, activation, x)

    def native() -> nn.Module:
        return nn.Sequential(nn.BatchNorm2d(channels, device="cuda"), nn.ReLU(inplace=True))

    def copy() -> Callable[[], object]:
        y = torch.empty_like(inputs()[0])
        return lambda: y.copy_(inputs()[0])

    yield "copy", copy
    yield "native", lambda: module(native, cudnn=False)
    yield "cudnn", lambda: module(native)
    yield "compiled", lambda: module(lambda: torch.compile(native(), dynamic=False))
    for name, estimator in NORMS.items():
        yield f"kernel {name}", lambda estimator=estimator: direct(estimator, graph=False)
        yield f"graph {name}", lambda estimator=estimator: direct(estimator, graph=True)
        yield f"norm {name}", lambda name=name: module(lambda: own("topk:k=10" if name == "topk" else name))


def measure(table: Table, case: Case) -> None:
    """Time all arms of a case in turns."""
    arms: dict[str, Callable[[], object]] = {}
    for name, prepare in arms_of(case):
        try:
            arms[name] = prepare()
            arms[name]()
            torch.cuda.synchronize()
        except Exception as error:
            arms.pop(name, None)
            table.add(case, what="time", arm=name, note=f"FAILED: {first_line(error)}")
    inner = max(2, min(30, int(0.2 / case.gigabytes)))
    taken = time_in_turns(arms, repeats=7, inner=inner, synchronise=torch.cuda.synchronize)
    seconds = {name: statistics.median(rounds) for name, rounds in taken.items()}
    rates = {name: PASSES[name.split()[-1]] * case.gigabytes / value for name, value in seconds.items()}
    best = min((seconds[name] for name in PEERS if name in seconds), default=float("nan"))
    for name, value in seconds.items():
        table.add(
            case,
            what="time",
            arm=name,
            ms=f"{value * 1e3:.4f}",
            spread=f"{(max(taken[name]) - min(taken[name])) / value:.2f}",
            gb_per_s=f"{rates[name]:.0f}",
            share=f"{rates[name] / rates['copy']:.2f}" if "copy" in rates else "",
            of_best_peer=f"{best / value:.2f}",
        )
    torch.compiler.reset()
    torch.cuda.empty_cache()


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"[:200]


def main() -> int:
    """Check, time, write; 1 where a kernel was wrong or failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9.0, help="start nothing new after these")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_suffix(".csv"))
    parser.add_argument("--dry-run", action="store_true", help="list the cases and arms; needs no GPU")
    options = parser.parse_args()
    if options.dry_run:
        for case in check_cases():
            print("check", *case.label.values(), *NORMS, "mean")
        for case in speed_cases():
            print("time", *case.label.values(), f"{case.gigabytes * 1e3:.0f} MB:", *(name for name, _ in arms_of(case)))
        return 0
    if not torch.cuda.is_available():
        print("no GPU is at hand; --dry-run lists what would be done", file=sys.stderr)
        return 2
    import triton

    start = time.monotonic()
    deadline = start + 60 * options.minutes
    device = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}"
    table = Table([{"what": "device", "note": device}])
    print(device)
    # A third of the time at most, for most of it goes to compiling.
    right = check(table, start + 20 * options.minutes)
    write_file(options.output, table.text())
    for case in speed_cases():
        if time.monotonic() > deadline:
            table.add(case, what="time", note="left out: no time")
            continue
        try:
            measure(table, case)
        except Exception as error:
            table.add(case, what="time", note=f"FAILED: {first_line(error)}")
        # Whatever happens later, what was measured is kept.
        write_file(options.output, table.text())
    write_file(options.output, f"# {device}\n{table.text()}")
    print(
        f"\n{'All kernels were right.' if right else 'SOME KERNELS WERE WRONG OR FAILED: see above.'} {options.output}"
    )
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
