"""Weak scaling on the cores of this machine: images/s of one process with batch B and of N with batch N x B.

    python benchmarks/scaling.py [--model resnet20] [--batch 64] [--rounds 9] [--processes 2]

N ranks (gloo), a thread each. In every round three arms take their turn: the first rank by itself while the others
wait; all ranks each by itself, which says what they take from each other (memory, caches, cores that are half of one);
and all together, gradients exchanged. The figure is the median over rounds of images/s together over images/s alone.
What a step costs more together than by itself has two parts. A rank that is done waits for the slowest: predicted by
the mean over steps of the largest time of any rank, where each is by itself, less the mean of all. And the gradients'
bytes travel: predicted by an all-reduce of so many bytes, measured on idle ranks. Prints CSV.
"""

import argparse
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from norm_matters.core.clock import Clock
from norm_matters.core.config import RegimeConfig
from norm_matters.core.distributed import ALONE, Group
from norm_matters.core.joining import joined
from norm_matters.engine.metrics import Meter
from norm_matters.engine.state import TrainingState
from norm_matters.engine.step import StepOptions, train_step
from norm_matters.models import MODELS
from norm_matters.norms import norm_factory
from norm_matters.regimes import build_regime

CPU = torch.device("cpu")


def training(model: str, norm: str, batch: int, group: Group) -> Callable[[], None]:
    """A function that trains one step on `batch` images of this rank."""
    torch.manual_seed(0)
    module = MODELS.get(model).build(num_classes=10, in_channels=3, norm=norm_factory(norm))
    regime = build_regime(RegimeConfig(phases=[{"lr": 0.01, "momentum": 0.9}]), default="constant")
    state = TrainingState(module, regime, Clock(0, 10**6, 1, batch * group.world), device=CPU)
    state.join(group, seed=0)
    state.module.train()
    images = torch.randn(batch, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    labels = torch.arange(batch) % 10
    meter = Meter(CPU)

    def step() -> None:
        train_step(state, images, labels, options=StepOptions(), meter=meter)

    step.bytes = 4 * sum(tensor.numel() for tensor in state.module.parameters())  # type: ignore[attr-defined]
    return step


def step_times(step: Callable[[], object], steps: int) -> list[float]:
    """Seconds of each step."""
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    return times


def seconds_of(step: Callable[[], object], steps: int) -> float:
    """Seconds per step."""
    return statistics.fmean(step_times(step, steps))


def waiting_seconds(own: list[float], group: Group) -> float:
    """What a step takes longer when all wait for the slowest rank at each, by the times of each rank by itself."""
    times = torch.tensor(group.gather(own), dtype=torch.float64)
    return (times.amax(0).mean() - times.mean()).item()


def all_reduce_seconds(size: int) -> float:
    """Seconds that an all-reduce of so many bytes takes: the median of thirty."""
    data: Tensor = torch.ones(size // 4)
    times = []
    for _ in range(33):
        dist.barrier()
        times.append(seconds_of(lambda: dist.all_reduce(data), 1))
    return statistics.median(times[3:])


def measure(model: str, norm: str, batch: int, rounds: int, steps: int) -> None:
    """What each rank does; the first prints."""
    torch.set_num_threads(1)
    with joined() as group:
        single, together = training(model, norm, batch, ALONE), training(model, norm, batch, group)
        for step in (single, together):
            seconds_of(step, 2)
        found: list[tuple[float, float, float]] = []
        by_itself: list[float] = []
        for _ in range(rounds):
            dist.barrier()
            alone = seconds_of(single, steps) if group.first else 0.0
            dist.barrier()
            times = step_times(single, steps)
            by_itself += times
            dist.barrier()
            found.append((alone, statistics.fmean(times), seconds_of(together, steps)))
        size = together.bytes  # type: ignore[attr-defined]
        exchange, waiting = all_reduce_seconds(size), waiting_seconds(by_itself, group)
        if not group.first:
            return
        scaling = [group.world * alone / both for alone, _, both in found]
        print("model,norm,batch,processes,images_per_second_alone,images_per_second_together,scaling,least,most")
        alone, each, both = (statistics.median(times) for times in zip(*found, strict=True))
        print(
            f"{model},{norm},{batch},{group.world},{batch / alone:.1f},{group.world * batch / both:.1f},"
            f"{statistics.median(scaling):.3f},{min(scaling):.3f},{max(scaling):.3f}"
        )
        cost = statistics.median(pair[2] - pair[1] for pair in found)
        traffic = 2 * (group.world - 1) / group.world * size
        columns = "step_ms_alone,step_ms_beside_others,step_ms_together,extra_ms,predicted_waiting_ms"
        print(f"{columns},predicted_exchange_ms,gradient_bytes,gb_per_s")
        numbers = (alone, each, both, cost, waiting, exchange)
        print(",".join(f"{1e3 * number:.2f}" for number in numbers), size, f"{traffic / exchange / 1e9:.3f}", sep=",")


def start(arguments: list[str], processes: int) -> int:
    """Start the ranks, pinned to a core each where there are enough."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    cores = sorted(os.sched_getaffinity(0))
    ranks = []
    for rank in range(processes):
        place = {"RANK": rank, "WORLD_SIZE": processes, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1"}
        environment = {**os.environ, **{key: str(value) for key, value in place.items()}, "MASTER_PORT": str(port)}
        environment |= {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
        ranks.append(subprocess.Popen([sys.executable, __file__, *arguments], env=environment))
        if len(cores) >= processes:
            os.sched_setaffinity(ranks[-1].pid, {cores[rank]})
    return max(rank.wait() for rank in ranks)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--norm", default="l2")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--processes", type=int, default=2)
    given = parser.parse_args()
    if "RANK" not in os.environ:
        return start(sys.argv[1:], given.processes)
    measure(given.model, given.norm, given.batch, given.rounds, given.steps)
    return 0


if __name__ == "__main__":
    sys.exit(main())
