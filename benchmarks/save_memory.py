"""What `--save-memory` saves and costs: resnet50 (stem=small) on 64 x 64 images, forward and backward, on a CPU.

    .venv/bin/python benchmarks/save_memory.py [BATCH]

Peaks are taken in a process of their own for each arm: the largest resident memory during one step (Linux's VmHWM,
reset just before) less what was resident before, with an allocator that returns every freed page, so that nothing that
was freed counts. Weights are in what was there before; their gradients are part of the peak, on both sides.

Times are taken in turns in one process, pages kept, after a step that does not count; the ratio is the median over
the rounds. The peer is the same network with nn.BatchNorm2d and an in-place ReLU. Gradients are compared bit by bit.
"""

import contextlib
import ctypes
import json
import subprocess
import sys
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from norm_matters.bench.timing import speedup, time_in_turns
from norm_matters.core.allocator import keep_pages
from norm_matters.models import MODELS
from norm_matters.norms import norm_factory, saving_memory

ARMS = {"native": ("native", False), "l1": ("l1", False), "l1 saving": ("l1", True), "l2 saving": ("l2", True)}
LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}


def network(norm: str, layout: str) -> nn.Module:
    torch.manual_seed(0)
    factory: Any = nn.BatchNorm2d if norm == "native" else norm_factory(norm)
    module = MODELS.get("resnet50").build(num_classes=10, in_channels=3, norm=factory, stem="small")
    return module.to(memory_format=LAYOUTS[layout])  # pyright: ignore[reportCallIssue]


def batch(size: int, layout: str) -> Tensor:
    return torch.randn(size, 3, 64, 64).contiguous(memory_format=LAYOUTS[layout])


def step(module: nn.Module, images: Tensor, *, saving: bool) -> None:
    for parameter in module.parameters():
        parameter.grad = None
    with saving_memory() if saving else contextlib.nullcontext():
        loss = module(images).square().sum()
    loss.backward()


def resident(key: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    with open("/proc/self/status") as status:
        return next(1024 * int(line.split()[1]) for line in status if line.startswith(key))


def peak(arm: str, layout: str, size: int) -> int:
    """Bytes, in this process."""
    ctypes.CDLL(None).mallopt(-3, 2**16)  # M_MMAP_THRESHOLD: everything larger goes back when it is freed
    norm, saving = ARMS[arm]
    module, images = network(norm, layout), batch(size, layout)
    step(module, batch(2, layout), saving=saving)
    for parameter in module.parameters():
        parameter.grad = None
    before = resident("VmRSS")
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    step(module, images, saving=saving)
    return resident("VmHWM") - before


def gradients_are_equal(norm: str, layout: str) -> bool:
    found = []
    for saving in (False, True):
        module = network(norm, layout)
        step(module, torch.ones(4, 3, 64, 64).cumsum(2).sin(), saving=saving)
        found.append([parameter.grad for parameter in module.parameters()])
    return all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def main(size: int) -> None:
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, batch {size}")
    for layout in LAYOUTS:
        peaks = {}
        for arm in ARMS:
            command = [sys.executable, __file__, "--peak", arm, layout, str(size)]
            peaks[arm] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        for arm, value in peaks.items():
            print(f"{layout:14} {arm:10} peak {value / 1e6:7.0f} MB, {value / peaks['native']:.3f} of native")
    keep_pages()
    for layout in LAYOUTS:
        images = batch(size, layout)
        arms = {
            arm: partial(step, network(norm, layout), images, saving=saving) for arm, (norm, saving) in ARMS.items()
        }
        seconds = time_in_turns(arms, repeats=7, warm_up=1)
        for arm in arms:
            ratio = 1 / speedup(seconds, arm, "native")
            print(f"{layout:14} {arm:10} {min(seconds[arm]):6.2f} s at best, {ratio:.3f} of native's time")
    for norm in ("l1", "l2"):
        for layout in LAYOUTS:
            print(f"{layout:14} {norm}: gradients equal to the bit: {gradients_are_equal(norm, layout)}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--peak"]:
        print(peak(sys.argv[2], sys.argv[3], int(sys.argv[4])))
    else:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 16)
