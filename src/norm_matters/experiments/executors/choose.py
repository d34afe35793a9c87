"""From the user's words (`--executor`, `--jobs` ...) to an executor."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from norm_matters.core.config import RunConfig
from norm_matters.core.errors import UserError, nearest
from norm_matters.experiments.executors.base import Executor

EXECUTORS = ("local", "slurm", "ray", "inline")
ON_THIS_MACHINE = ("local", "inline")
"""Those that do not leave it, so that a device that is asked for must be here."""


@dataclass(frozen=True)
class Placement:
    """Where and how many at a time.

    Attributes:
        executor: one of `EXECUTORS`.
        jobs: runs side by side, or in the queue; None: as many as there are cores or GPUs for, or all.
        threads: of each run. Results are equal to the bit for the same number only, so it never depends on the machine.
        slurm: options of the jobs (see `executors.slurm`); `cluster=local` tries them out on this machine.
        ray_address: of a cluster.
    """

    executor: str = "local"
    jobs: int | None = None
    threads: int = 1
    slurm: Mapping[str, Any] = field(default_factory=dict)
    ray_address: str | None = None

    def check(self) -> None:
        """Raise UserError with everything that is wrong."""
        problems = []
        if self.executor not in EXECUTORS:
            hint = nearest(self.executor, EXECUTORS)
            problems.append(f"--executor: value '{self.executor}' is not valid; it takes {_either(EXECUTORS)}{hint}")
        problems += [
            f"{option}: value {value} is not valid; it takes a whole number from 1"
            for option, value in (("--jobs", self.jobs), ("--threads", self.threads))
            if value is not None and value < 1
        ]
        if self.slurm and self.executor != "slurm":
            problems.append("--slurm: it needs --executor slurm")
        if self.ray_address and self.executor != "ray":
            problems.append("--ray-address: it needs --executor ray")
        if problems:
            raise UserError(*problems)


def make_executor(placement: Placement, configs: Sequence[RunConfig], output: Path) -> Executor:
    """Make the executor for runs of these configurations.

    Raises:
        UserError: wrong options, or a library that is not installed.
    """
    placement.check()
    cores = _cores()
    threads, jobs = placement.threads, placement.jobs
    gpus = _gpus(configs)
    if placement.executor == "inline":
        from norm_matters.experiments.executors.inline import InlineExecutor

        return InlineExecutor(threads=threads)
    if placement.executor == "local":
        from norm_matters.experiments.executors.local import LocalExecutor

        return LocalExecutor(jobs=parallel_runs(placement, configs), threads=threads, cores=cores, gpus=gpus)
    if placement.executor == "ray":
        from norm_matters.experiments.executors.ray import RayExecutor

        gpu = any(config.device.startswith("cuda") for config in configs) or (
            placement.ray_address is None and bool(gpus)
        )
        # As many as are asked for, also where there are fewer: else a task would wait for ever.
        offered = parallel_runs(placement, configs) * threads
        return RayExecutor(address=placement.ray_address, jobs=jobs, threads=threads, gpus=int(gpu), cores=offered)
    from norm_matters.experiments.executors.slurm import SlurmExecutor

    options = dict(placement.slurm)
    cluster = options.pop("cluster", "slurm")
    return SlurmExecutor(folder=output / "slurm", jobs=jobs, threads=threads, options=options, cluster=cluster)


def parallel_runs(placement: Placement, configs: Sequence[RunConfig]) -> int:
    """How many runs there will be side by side; where a cluster decides, all that are asked for."""
    if placement.executor == "inline":
        return 1
    on_cluster = placement.executor == "slurm" or placement.ray_address is not None
    if placement.jobs or on_cluster:
        return placement.jobs or len(configs)
    gpus = _gpus(configs)
    return len(gpus) or max(1, len(_cores()) // placement.threads)


def _either(words: Sequence[str]) -> str:
    return f"{', '.join(words[:-1])} or {words[-1]}"


def _cores() -> list[int]:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _gpus(configs: Sequence[RunConfig]) -> list[str]:
    """This machine's GPUs by the names that CUDA_VISIBLE_DEVICES has for them, if the runs take any that they get."""
    if not all(config.device in ("auto", "cuda") for config in configs):
        return []
    import torch

    if not torch.cuda.is_available():
        return []
    given = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    return given or [str(index) for index in range(torch.cuda.device_count())]
