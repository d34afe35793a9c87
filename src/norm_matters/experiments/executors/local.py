"""Runs on this machine: processes side by side, each on cores, or on a GPU, of its own."""

import os
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from norm_matters.experiments.executors.base import Executor, Job, Task, interrupt, spawn

GRACE = 60.0
"""Seconds that a training has to end in, with its report, before it is killed."""


@final
@dataclass
class LocalJob(Job):
    """A process, and the slot that it takes."""

    process: subprocess.Popen[bytes]
    slot: int

    def status(self) -> int | None:
        """See `Job`."""
        return self.process.poll()


@final
class LocalExecutor(Executor):
    """Starts processes here.

    Args:
        jobs: processes at a time.
        threads: cores of each; they are pinned to them where they take all cores, and no more: else another sweep
            may have some, and would take the same.
        cores: to deal out.
        gpus: values of CUDA_VISIBLE_DEVICES to deal out, one for each process in turns; none: it is left alone. With
            them, each process takes an equal share of the cores, for the threads that read images.
    """

    def __init__(self, *, jobs: int, threads: int, cores: Sequence[int], gpus: Sequence[str] = ()) -> None:
        self.capacity = jobs
        self._gpus = gpus
        self._free = list(range(jobs))
        width = max(threads, len(cores) // jobs) if gpus else threads
        self._cores = [cores[slot * width : (slot + 1) * width] for slot in range(jobs)]
        if jobs * width > len(cores) or (not gpus and (jobs + 1) * width <= len(cores)):
            self._cores = [[] for _ in range(jobs)]
        self._jobs: list[LocalJob] = []

    def start(self, task: Task) -> LocalJob:
        """See `Executor`."""
        self._reclaim()
        slot = self._free.pop(0)
        cores = ",".join(map(str, self._cores[slot]))
        environment = {"CUDA_VISIBLE_DEVICES": self._gpus[slot % len(self._gpus)]} if self._gpus else {}
        job = LocalJob(spawn(task, *(["--cores", cores] if cores else []), environment=environment), slot)
        self._jobs.append(job)
        return job

    def stop(self, jobs: Sequence[Job]) -> None:
        """See `Executor`; who has not ended after `GRACE` seconds, or at a second Ctrl-C, is killed."""
        processes = [job.process for job in jobs if isinstance(job, LocalJob)]
        try:
            for process in processes:
                interrupt(process)
            end = time.monotonic() + GRACE
            while time.monotonic() < end and any(process.poll() is None for process in processes):
                time.sleep(0.05)
        finally:
            for process in processes:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()

    def close(self) -> None:
        """See `Executor`; stops what an interrupt has kept from being known as a job."""
        self.stop(self._running())

    def _running(self) -> list[LocalJob]:
        return [job for job in self._jobs if job.status() is None]

    def _reclaim(self) -> None:
        """Free the slots of the jobs that have ended, the lowest first."""
        taken = self._running()
        ended = [job.slot for job in self._jobs if job not in taken]
        self._free = sorted({*self._free, *ended})
        self._jobs = taken
