"""Runs as tasks of ray: on this machine, or on a cluster whose machines share the output folder."""

import os
import signal
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

from norm_matters.core.errors import UserError
from norm_matters.experiments.executors.base import LOST, Executor, Job, Task, first_line, run_task


@final
@dataclass
class RayJob(Job):
    """A task of ray."""

    reference: Any

    def status(self) -> int | None:
        """See `Job`."""
        import ray
        from ray.exceptions import RayError

        if not ray.wait([self.reference], timeout=0)[0]:
            return None
        try:
            return ray.get(self.reference)
        except RayError:
            return LOST


@final
class RayExecutor(Executor):
    """Hands tasks to ray.

    Args:
        address: of a cluster, or None for a ray of its own on this machine, ended with the sweep.
        jobs: tasks at a time; None: all, and ray queues them.
        threads: cores that each takes.
        gpus: GPUs that each takes.
        cores: that ray may use on this machine, where it is one of its own.
    """

    def __init__(self, *, address: str | None, jobs: int | None, threads: int, gpus: float, cores: int) -> None:
        try:
            import ray
        except ImportError:
            raise UserError("--executor ray: ray is not installed; pip install 'norm-matters[ray]'") from None
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # The newer meaning; without a word ray warns that it will change.
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": "error"}
        if address is None:
            options |= {"num_cpus": cores, "include_dashboard": False}
        terminated = signal.getsignal(signal.SIGTERM)
        try:
            ray.init(address=address or "local", **options)
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise UserError(f"--ray-address '{address}': {first_line(error)}") from None
        # ray has this process end at once at SIGTERM, whatever it was told before.
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, terminated)
        self._run = ray.remote(run_task).options(num_cpus=threads, num_gpus=gpus, max_retries=0)
        self.capacity = jobs or 10**6

    def start(self, task: Task) -> RayJob:
        """See `Executor`."""
        arguments = (task.name, list(task.arguments), dict(task.environment), task.log, task.folder)
        return RayJob(self._run.remote(*arguments))

    def stop(self, jobs: Sequence[Job]) -> None:
        """See `Executor`."""
        import ray

        references = [job.reference for job in jobs if isinstance(job, RayJob)]
        for reference in references:
            ray.cancel(reference, force=False)
        if references:
            ray.wait(references, num_returns=len(references), timeout=60)

    def close(self) -> None:
        """See `Executor`."""
        import ray

        ray.shutdown()
