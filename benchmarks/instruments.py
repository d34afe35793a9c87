"""What the instruments cost: resnet20 with L1 norms, 28 x 28 images, batch 128, one thread.

    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/instruments.py [PAIRS]

Steps are measured and not measured in turn, in one process, and so are compared in pairs; the median over the pairs is
what a measured step costs more. Besides, the time inside the instruments is taken, which is the figure to trust: on a
shared machine steps differ by more than what is to be found. All times are processor time, which other processes
disturb least. One step in 20 at most is measured: the dearest case is epochs of 20 steps with one of them measured and
an end of the epoch each; in Fashion-MNIST's 468 steps 16 are.

On a virtual machine of two cores that others kept busy (load 8 to 10; a step took 710 ms of processor time):
a measured step cost 8.7 ms and an epoch's end 7.0 ms of the default set: 0.11% in epochs of 20 steps, 0.044% in
Fashion-MNIST's; by pairs of steps a measured one took 0.998 times as long (median of 16). Of the set `all`, the
scale-invariance check cost 5.3 steps an epoch (22 weights, 64 images), and a step that listens to the norms' inputs
took 1.9 times as long: in Fashion-MNIST's epochs 1.1% and 3.1%.
"""

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

import norm_matters as nm
from norm_matters.core.clock import Clock
from norm_matters.core.config import RegimeConfig
from norm_matters.engine.instruments.collect import STEPS_PER_SAMPLE, Instruments, measured_steps
from norm_matters.engine.instruments.invariance import ScaleInvariance
from norm_matters.engine.instruments.norms import NormInputs
from norm_matters.engine.metrics import Meter
from norm_matters.engine.state import TrainingState
from norm_matters.engine.step import StepOptions, train_step
from norm_matters.regimes import build_regime

FASHION_MNIST_STEPS = 468


def timed(method: Callable[..., Any], seconds: list[float]) -> Callable[..., Any]:
    """The method, adding its processor seconds to a list at every call."""

    def call(*args: Any, **kwargs: Any) -> Any:
        start = time.process_time()
        try:
            return method(*args, **kwargs)
        finally:
            seconds.append(time.process_time() - start)

    return call


def make_state() -> TrainingState:
    torch.manual_seed(0)
    module = nm.create_model("resnet20", num_classes=10, in_channels=1, norm="l1")
    phases = [{"epoch": 0, "optimizer": "SGD", "lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}]
    regime = build_regime(RegimeConfig(phases=phases), default="constant")
    return TrainingState(module, regime, Clock(0, 1, 10**6), device=torch.device("cpu"))


def main(pairs: int) -> None:
    """Print the costs."""
    state, meter = make_state(), Meter(torch.device("cpu"))
    images = torch.randn(128, 1, 28, 28).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, 10, (128,))
    instruments = Instruments(state)
    inside: list[float] = []
    for part in instruments._parts:
        for name in ("before_step", "after_step"):
            setattr(part, name, timed(getattr(part, name), inside))

    def step_seconds(number: int) -> float:
        """One step; the only step of an epoch, number 1, is one to be measured."""
        start = time.process_time()
        with instruments.step(number):
            train_step(state, images, labels, options=StepOptions(), meter=meter)
        return time.process_time() - start

    for number in (0, 1):
        step_seconds(number)  # warms up
    inside.clear()
    plain, ratios = [], []
    for pair in range(pairs):
        seconds = {number: step_seconds(number) for number in ((0, 1) if pair % 2 else (1, 0))}
        plain.append(seconds[0])
        ratios.append(seconds[1] / seconds[0])
    ends: list[float] = []
    # As many measured steps as Fashion-MNIST's epochs have lie behind this end.
    timed(instruments.end_epoch, ends)(images)
    step, sample = statistics.median(plain), sum(inside) / pairs
    often = 100 * (sample + ends[0]) / (STEPS_PER_SAMPLE * step)
    usual = 100 * (len(measured_steps(FASHION_MNIST_STEPS)) * sample + ends[0]) / (FASHION_MNIST_STEPS * step)
    print(f"a step: {1e3 * step:.0f} ms; measured: {statistics.median(ratios):.3f} times as long, by pairs")
    print(
        f"inside the default instruments: {1e3 * sample:.1f} ms a measured step, {1e3 * ends[0]:.1f} ms an epoch's end"
    )
    print(f"of all time: {often:.3f}% in epochs of {STEPS_PER_SAMPLE} steps, {usual:.3f}% in Fashion-MNIST's")
    check, inputs = ScaleInvariance(state), NormInputs(state.module)
    seconds = []
    timed(check.end_epoch, seconds)(images)
    inputs.before_step()
    listening = step_seconds(0)
    inputs.after_step(made=True)
    print(f"all: the scale-invariance check {seconds[0] / step:.1f} steps an epoch; a step that listens to the norms' ")
    print(f"inputs {listening / step:.2f} times as long")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 16)
