"""What the instruments cost: resnet20 with L1 norms, 28 x 28 images, batch 128, one thread.

    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/instruments.py [PAIRS]

Short epochs of 20 steps, in which one step is measured, are trained with and without instruments in turn, in one
process; the ratio is the median over the pairs. All times are processor time, which other processes disturb least; even
so they vary by more than what is to be measured, and the time inside the instruments is the figure to trust. Epochs of
20 steps are the dearest case (one step in 20 is measured, and every epoch ends once); the figure for Fashion-MNIST (468
steps, 16 of them measured) follows from the cost of a measured step and of an epoch's end.

MEASURED
"""

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

import norm_matters as nm
from norm_matters.core.clock import Clock
from norm_matters.core.config import RegimeConfig
from norm_matters.engine.instruments.collect import Instruments, measured_steps
from norm_matters.engine.metrics import Meter
from norm_matters.engine.state import TrainingState
from norm_matters.engine.step import StepOptions, train_step
from norm_matters.regimes import build_regime

STEPS = 20
FASHION_MNIST_STEPS = 468


class Stopwatch:
    """Counts the processor seconds inside the methods of an object."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}

    def watch(self, owner: Any, name: str) -> None:
        """Time every call of `owner.name` from now on."""
        method: Callable[..., Any] = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.process_time()
            try:
                return method(*args, **kwargs)
            finally:
                self.seconds.setdefault(name, []).append(time.process_time() - start)

        setattr(owner, name, timed)


def make_state() -> TrainingState:
    torch.manual_seed(0)
    module = nm.create_model("resnet20", num_classes=10, in_channels=1, norm="l1")
    phases = [{"epoch": 0, "optimizer": "SGD", "lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}]
    regime = build_regime(RegimeConfig(phases=phases), default="constant")
    return TrainingState(module, regime, Clock(0, STEPS, 10**6), device=torch.device("cpu"))


def epoch_seconds(state: TrainingState, images: Tensor, labels: Tensor, instruments: Instruments | None) -> float:
    """Train one epoch of `STEPS` steps on one batch."""
    meter = Meter(state.device)
    start = time.process_time()
    for number in range(1, STEPS + 1):
        if instruments is None:
            train_step(state, images, labels, options=StepOptions(), meter=meter)
        else:
            with instruments.step(number):
                train_step(state, images, labels, options=StepOptions(), meter=meter)
    if instruments is not None:
        instruments.end_epoch(images)
    return time.process_time() - start


def measure(level: Literal["default", "all"], pairs: int) -> None:
    """Print the cost of one set of instruments."""
    state = make_state()
    images = torch.randn(128, 1, 28, 28).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, 10, (128,))
    instruments, stopwatch = Instruments(state, level=level), Stopwatch()
    for part in instruments._parts:
        for name in ("before_step", "after_step", "end_epoch"):
            stopwatch.watch(part, name)
    epoch_seconds(state, images, labels, instruments)  # warms up
    stopwatch.seconds.clear()
    ratios, plain = [], []
    for pair in range(pairs):
        order = (None, instruments) if pair % 2 else (instruments, None)
        seconds = {one is None: epoch_seconds(state, images, labels, one) for one in order}
        plain.append(seconds[True])
        ratios.append(seconds[False] / seconds[True])
    inside = sum(map(sum, stopwatch.seconds.values())) / pairs
    step = statistics.median(plain) / STEPS
    sample = sum(sum(stopwatch.seconds[name]) for name in ("before_step", "after_step")) / pairs
    end = sum(stopwatch.seconds["end_epoch"]) / pairs
    samples = len(measured_steps(FASHION_MNIST_STEPS))
    usual = (samples * sample + end) / (FASHION_MNIST_STEPS * step)
    print(
        f"{level}: a step {1e3 * step:.1f} ms, a measured step {1e3 * sample:.2f} ms more, an epoch's end "
        f"{1e3 * end:.2f} ms; epochs of {STEPS} steps: ratio {statistics.median(ratios):.4f}, inside the instruments "
        f"{100 * inside / (STEPS * step):.3f}%; of {FASHION_MNIST_STEPS} steps: {100 * usual:.3f}%"
    )


if __name__ == "__main__":
    for chosen in ("default", "all"):
        measure(chosen, int(sys.argv[1]) if len(sys.argv) > 1 else 6)
