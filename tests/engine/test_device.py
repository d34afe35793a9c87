"""What is a rank's own: its GPU, and its cores."""

import pytest
import torch

from norm_matters import plan
from norm_matters.core import joining
from norm_matters.core.errors import UserError
from norm_matters.core.ranks import Ranks
from norm_matters.engine.device import resolve_device


def rank(launcher) -> Ranks:
    return Ranks(rank=11, world=16, local_rank=3, local_world=8, launcher=launcher)


@pytest.mark.parametrize(
    ("launcher", "seen", "own"),
    [("torchrun", 8, 3), ("srun", 8, 3), ("srun", 1, 0), ("srun", 2, None), ("torchrun", 1, None)],
)
def test_the_gpu_of_a_rank(monkeypatch, launcher, seen, own):
    """With --gpus-per-task=1 srun shows each task its own alone, as number 0."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: seen)
    if own is None:
        with pytest.raises(UserError, match=f"process 3 of this machine has no GPU of its own: torch sees {seen} CUDA"):
            resolve_device("auto", rank(launcher))
    else:
        assert (
            resolve_device("auto", rank(launcher))
            == resolve_device("cuda", rank(launcher))
            == torch.device("cuda", own)
        )
    # The same is the current one when the ranks meet.
    chosen: list[int] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(joining, "_store", lambda *given: pytest.fail("met"))
    with pytest.raises(pytest.fail.Exception, match="met"), joining._group(rank(launcher), 1):
        pass
    assert chosen == ([] if own is None else [own])


@pytest.mark.parametrize(
    ("launcher", "cores", "per_task", "own"),
    [
        ("srun", 12, "12", 12),  # bound to the task
        ("srun", 96, "12", 12),  # all of the machine's
        ("srun", 4, "12", 4),
        ("srun", 96, None, 12),
        ("srun", 4, None, 1),
        ("torchrun", 96, "96", 12),  # of which srun started one on this machine
        ("torchrun", 96, None, 12),
    ],
)
def test_the_cores_of_a_rank(monkeypatch, launcher, cores, per_task, own):
    monkeypatch.delenv("SLURM_CPUS_PER_TASK", raising=False)
    if per_task:
        monkeypatch.setenv("SLURM_CPUS_PER_TASK", per_task)
    monkeypatch.setattr(plan, "available_cores", lambda: cores)
    assert plan.cores_of_rank(rank(launcher)) == own
