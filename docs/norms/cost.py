"""What each norm costs: memory traffic, what it keeps for the backward pass, and time beside nn.BatchNorm2d.

`python docs/norms/cost.py` writes cost.csv; then `python docs/norms/plots.py --tables` puts it into the cards. Traffic
and bytes kept are counted and come out the same every time. Time is that of this machine, one thread, float32. All is
of the norms in plain torch: nobody can look into the kernels, and benchmarks/norms.csv has their time.
"""

import argparse
import csv
import io
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tables import COSTS, NATIVE
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from norm_matters.norms import create_norm
from norm_matters.norms.kernels.dispatch import set_kernels
from norm_matters.record.files import write_file

SPECS = (
    "l2",
    "l1",
    "linf",
    "topk:k=10",
    "lp:p=3",
    "mean",
    "rms",
    "range",
    "ghost:size=8,base=l2",
    "ghost:size=8,base=l1",
    "smooth:base=(topk:k=10),beta=0.75",
    "renorm:base=l2",
    "renorm:base=l1",
    "noisy:base=l2,like=linf",
    "frozen",
    "timm:frn",
    "timm:groupnorm",
    "none",
    "group:groups=8",
    "group:groups=8,statistic=l1",
    "layer",
    "layer:statistic=l1",
    "instance",
    "instance:statistic=l1",
    "position",
    "position:statistic=l1",
)
SHAPE = (32, 64, 28, 28)
# Operators that touch no element.
_FREE = ("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "detach", "alias")


def reads_of(name: str, argument: str, given: dict[str, Any]) -> int:
    """How often an operator goes over one of its inputs.

    Once, but for those that torch 2.13's ATen/native/cpu/{batch,group}_norm_kernel.cpp is seen to do in steps.
    """
    if name == "native_batch_norm":
        # The mean, the variance, the output; by running statistics the output only.
        return 3 if given["training"] else 1
    if name == "native_batch_norm_backward":
        # The sums; then the input's gradient, where it is wanted, of which x is a part in training only.
        again = given["output_mask"][0] and (given["train"] or argument == "grad_out")
        return 2 if again else 1
    # The moments, the output; the sums, the input's gradient.
    return 2 if name in ("native_group_norm", "native_group_norm_backward") else 1


class Traffic(TorchDispatchMode):
    """Counts the bytes that operators read and write, as if nothing stayed in a cache between two of them."""

    def __init__(self) -> None:
        super().__init__()
        self.read = self.written = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator and count."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        schema, name = func._schema, func._schema.name.removeprefix("aten::")
        views = any(r.alias_info is not None and not r.alias_info.is_write for r in schema.returns)
        if views or name in _FREE:
            return out
        given = dict(zip((a.name for a in schema.arguments), args, strict=False)) | kwargs
        for argument in schema.arguments:
            tensors = [t for t in tree_leaves(given.get(argument.name)) if isinstance(t, Tensor)]
            size = sum(_bytes(t) for t in tensors)
            written = argument.alias_info is not None and argument.alias_info.is_write
            self.written += size if written else 0
            overwritten = written and (argument.name == "out" or name in ("copy_", "fill_", "zero_"))
            self.read += 0 if overwritten else size * reads_of(name, argument.name, given)
        fresh = [r for r, info in zip(_as_tuple(out), schema.returns, strict=False) if info.alias_info is None]
        self.written += sum(_bytes(t) for t in tree_leaves(fresh) if isinstance(t, Tensor))
        return out


def _as_tuple(values: Any) -> tuple[Any, ...]:
    return tuple(values) if isinstance(values, (tuple, list)) else (values,)


def _bytes(values: Tensor) -> int:
    """What the values take, each once however often it is expanded."""
    return min(values.numel() * values.element_size(), values.untyped_storage().nbytes())


def build(spec: str) -> nn.Module:
    """The norm of a spec for SHAPE, or torch's batch norm."""
    return nn.BatchNorm2d(SHAPE[1]) if spec == NATIVE else create_norm(spec, SHAPE[1])


def count(spec: str) -> dict[str, float]:
    """Reads and writes of the forward and the backward pass and bytes kept between, in sizes of the activation."""
    norm, x, g = build(spec), *_tensors()
    unit = x.numel() * x.element_size()
    # Twice: what is computed once per n is no cost of a step.
    norm(x.detach())
    kept: dict[int, int] = {}

    def pack(values: Tensor) -> Tensor:
        kept[values.untyped_storage().data_ptr()] = values.untyped_storage().nbytes()
        return values

    with Traffic() as forward, torch.autograd.graph.saved_tensors_hooks(pack, lambda values: values):
        # As an operator between others has it: x is no leaf, so that nothing is added for its gradient.
        y = norm(x)
    with Traffic() as backward:
        torch.autograd.grad(y, x, g) if spec != "none" else None
    return {
        "forward_reads": forward.read / unit,
        "forward_writes": forward.written / unit,
        "backward_reads": backward.read / unit,
        "backward_writes": backward.written / unit,
        "kept": sum(kept.values()) / unit,
    }


def _tensors() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, g = (torch.randn(SHAPE, generator=generator) for _ in range(2))
    return x.requires_grad_(), g


def ratios(spec: str, rounds: int) -> tuple[float, float, float]:
    """Time forward and backward over that of nn.BatchNorm2d, in turns: median and quartiles over the rounds.

    Time is the processor's, so that it does not count while others have it.
    """
    x, g = _tensors()
    norms = build(spec), build(NATIVE)

    def seconds(norm: Callable[[Tensor], Tensor]) -> float:
        start = time.process_time()
        torch.autograd.grad(norm(x), x, g)
        return time.process_time() - start

    for norm in norms * 5:
        seconds(norm)
    values = []
    for turn in range(rounds):
        first = turn % 2
        taken = {i: seconds(norms[i]) for i in (first, 1 - first)}
        values.append(taken[0] / taken[1])
    low, median, high = statistics.quantiles(values, n=4)
    return median, low, high


def device() -> str:
    """The processor, in words."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "unknown processor")
    return f"{model}, one thread, torch {torch.__version__}"


def main() -> None:
    """Write cost.csv."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=25, help="turns of each norm and nn.BatchNorm2d")
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    set_kernels("reference")
    table = []
    for spec in (NATIVE, *SPECS):
        median, low, high = ratios(spec, rounds) if spec != "none" else (0.0, 0.0, 0.0)
        times = {"time": median, "time_low": low, "time_high": high}
        row = {key: f"{value:.2f}" for key, value in {**count(spec), **times}.items()}
        table.append({"spec": spec, **row, "device": device()})
    text = io.StringIO()
    writer = csv.DictWriter(text, list(table[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    write_file(COSTS, text.getvalue())


if __name__ == "__main__":
    main()
