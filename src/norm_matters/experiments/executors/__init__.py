"""Where runs are: processes of this machine, this process, SLURM (submitit) or ray. One small protocol for all."""

from typing import TYPE_CHECKING

from norm_matters.core.lazy import lazy_attributes

if TYPE_CHECKING:
    from norm_matters.experiments.executors.base import Executor, Job, Task
    from norm_matters.experiments.executors.choose import (
        EXECUTORS,
        ON_THIS_MACHINE,
        Placement,
        make_executor,
        parallel_runs,
    )

__all__ = [
    "EXECUTORS",
    "ON_THIS_MACHINE",
    "Executor",
    "Job",
    "Placement",
    "Task",
    "make_executor",
    "parallel_runs",
]

__getattr__ = lazy_attributes(
    __name__,
    {
        "base": ("Executor", "Job", "Task"),
        "choose": ("EXECUTORS", "ON_THIS_MACHINE", "Placement", "make_executor", "parallel_runs"),
    },
)
