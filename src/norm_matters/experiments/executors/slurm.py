"""Runs as jobs of SLURM, submitted by submitit; the machines share the output folder."""

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from norm_matters.core.errors import UserError
from norm_matters.experiments.executors.base import LOST, Executor, Job, Task, first_line, run_task

# What submitit knows for every kind of cluster, and what a job asks for unless told otherwise.
_SHARED = {"name", "timeout_min", "mem_gb", "cpus_per_task", "gpus_per_node"}
_ONE = ("nodes", "ntasks", "tasks_per_node", "ntasks_per_node")
_DEFAULTS = {"timeout_min": 24 * 60, "nodes": 1, "tasks_per_node": 1, "name": "norm-matters"}
_CLUSTERS = ("slurm", "local")
_TIME = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?")
_GRACE = 60.0


@final
@dataclass
class SlurmJob(Job):
    """A job of submitit."""

    job: Any

    def status(self) -> int | None:
        """See `Job`."""
        if not self.job.done():
            return None
        try:
            return self.job.result()
        except RuntimeError:  # whatever it was: there is no result
            return LOST


@final
class SlurmExecutor(Executor):
    """Submits tasks.

    Args:
        folder: where submitit keeps its files; on a disk that all machines share.
        jobs: in the queue at a time; None: all at once.
        threads: cores that each takes.
        options: submitit's `timeout_min`, `mem_gb`, `gpus_per_node`, `name`; and those of `sbatch`.
        cluster: `slurm`, or `local` for submitit's own processes on this machine, which is for trying things out.
    """

    def __init__(
        self,
        *,
        folder: Path,
        jobs: int | None,
        threads: int,
        options: Mapping[str, Any],
        cluster: str = "slurm",
    ) -> None:
        if cluster not in _CLUSTERS:
            raise UserError(f"--slurm cluster: value '{cluster}' is not valid; it takes slurm or local")
        try:
            import submitit
        except ImportError:
            raise UserError("--executor slurm: submitit is not installed; pip install 'norm-matters[slurm]'") from None
        parameters = {"cpus_per_task": threads, **_DEFAULTS, **submitit_options(options)}
        try:
            self._executor = submitit.AutoExecutor(folder=folder, cluster=cluster)
            self._executor.update_parameters(**parameters)
        except (RuntimeError, ValueError, NameError, TypeError, AssertionError) as error:
            raise UserError(f"--executor slurm: {first_line(error)}") from None
        self.capacity = jobs or 10**6

    def start(self, task: Task) -> SlurmJob:
        """See `Executor`; UserError where SLURM does not take the job."""
        arguments = (task.name, list(task.arguments), dict(task.environment), task.log, task.folder)
        try:
            return SlurmJob(self._executor.submit(run_task, *arguments))
        except RuntimeError as error:
            raise UserError(f"--executor slurm: {' '.join(str(error).split())}") from None

    def stop(self, jobs: Sequence[Job]) -> None:
        """See `Executor`."""
        submitted = [job for job in jobs if isinstance(job, SlurmJob)]
        for job in submitted:
            job.job.cancel(check=False)
        end = time.monotonic() + _GRACE
        while time.monotonic() < end and any(job.status() is None for job in submitted):
            time.sleep(0.2)

    def close(self) -> None:
        """See `Executor`."""


def submitit_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options in submitit's words: its own as they are, `time` as minutes, all others for sbatch.

    Raises:
        UserError: a time that is none of SLURM's forms, or several processes for a run.
    """
    if several := [name.replace("-", "_") for name in options if name.replace("-", "_") in _ONE]:
        raise UserError(f"--slurm {several[0]}: a run of a sweep is one process; leave this option out")
    options = dict(options)
    own = {name: value for name, value in options.items() if name in _SHARED}
    if "time" in options:
        own["timeout_min"] = _minutes(str(options.pop("time")))
    further = {name.replace("_", "-"): value for name, value in options.items() if name not in _SHARED}
    return own | ({"slurm_additional_parameters": further} if further else {})


def _minutes(text: str) -> int:
    """SLURM's `90`, `90:00`, `4:00:00`, `1-12`, `1-12:30` as minutes, rounded up."""
    match = _TIME.fullmatch(text)
    if not match:
        raise UserError(f"--slurm time: value '{text}' is not valid; it takes minutes, H:MM:SS or D-HH")
    days, first, second, third = (int(part) if part else None for part in match.groups())
    assert first is not None
    if days is not None:
        hours, minutes, seconds = first, second or 0, third or 0
    elif third is not None:
        hours, minutes, seconds = first, second or 0, third
    else:
        hours, minutes, seconds = 0, first, second or 0
    return -(-(((days or 0) * 24 + hours) * 3600 + minutes * 60 + seconds) // 60)
