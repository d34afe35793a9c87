"""How the ranks of a run meet and part, and what an error means on one of several.

torch's own part in it is kept to this file: where its store listens, how long its client tries, what it raises.
"""

import contextlib
import itertools
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING, Any

from norm_matters.core import stopping
from norm_matters.core.distributed import Group
from norm_matters.core.errors import LostRankError, NumericalError, UserError
from norm_matters.core.ranks import (
    Ranks,
    check_earlier_attempts,
    die_with_the_launcher,
    find_ranks,
    note_failure,
    words,
)

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store, TCPStore

TIMEOUT = 600.0
"""Seconds that a rank waits for the others, where no setting says otherwise."""

PATIENCE = 10.0
"""Seconds that a rank which has lost another leaves the launcher to end it, so that the culprit has the last word."""

SECONDS_BETWEEN_TRIES = 0.05
"""How often a rank knocks where the ranks meet."""

_TRY = timedelta(seconds=1)
"""How long torch's client tries, each of two times."""

MOMENT = 1.0
"""Seconds that the other ranks leave the first to say why all of them end."""

_LOOPBACK = "127.0.0.1"
_THIS_MACHINE = ("localhost", _LOOPBACK)

# What torch raises when a rank is gone or silent: RuntimeErrors, some of them of no class of their own.
_LOST = ("gloo", "Connection closed by peer", "Connection reset by peer", "Broken pipe", "NCCL", "ncclUnhandled")
_SILENT = ("Timed out waiting", "Application timeout", "wait timeout", "timed out after")


@contextlib.contextmanager
def joined(*, timeout: float = TIMEOUT) -> Iterator[Group]:
    """The group that this process was launched into; with a launcher's help it is joined here and left at the end.

    A process group that is there already is used and left as it is.

    Args:
        timeout: seconds to wait for the others.

    Raises:
        LostRankError: at its end, in place of what torch raises when another rank is gone or silent.
        UserError: an earlier attempt of the same launch ended by it.
    """
    ranks = find_ranks()
    if ranks.launcher:
        die_with_the_launcher()
    try:
        check_earlier_attempts(ranks)
        with _group(ranks, timeout) as group:
            yield group
    except Exception as error:
        if ranks.launcher is None:
            raise
        told = explained(error, ranks)
        if isinstance(told, LostRankError):
            # The launcher ends us first where it watches; then the last words are those of the rank that was lost.
            stopping.wait(PATIENCE)
        else:
            note_failure(words(told), told.exit_status if isinstance(told, UserError) else 1)
            if getattr(told, "shared", False):
                _let_the_first_speak(ranks)
        if told is error:
            raise
        raise told from error


def _let_the_first_speak(ranks: Ranks) -> None:
    """Wait until the first rank has closed its record and said why all end.

    A launcher ends all the others as soon as one is gone.
    """
    import torch.distributed as dist

    if ranks.world == 1 or not dist.is_initialized():
        return
    with contextlib.suppress(RuntimeError):
        dist.barrier()
    if not ranks.first:
        time.sleep(MOMENT)


def explained(error: Exception, ranks: Ranks) -> Exception:
    """The error with the number of the rank that it hit; in place of torch's own, what is behind it."""
    if ranks.world == 1:
        return error
    if not isinstance(error, UserError):
        text = str(error)
        lost = isinstance(error, RuntimeError) and any(word in text for word in _LOST)
        if isinstance(error, RuntimeError) and any(word in text for word in _SILENT):
            error = LostRankError("waited in vain for another rank; train.rank_timeout says how long")
        elif lost or _is_of_distributed(error):
            error = LostRankError("lost another rank, whose own message says why")
    if isinstance(error, NumericalError):
        error.shared = True  # the engine decides such things by what all ranks know
    if not getattr(error, "shared", False):
        with contextlib.suppress(AttributeError):
            error.rank = ranks.rank  # type: ignore[attr-defined]
    return error


def _is_of_distributed(error: Exception) -> bool:
    import torch.distributed as dist

    return isinstance(error, dist.DistError)


@contextlib.contextmanager
def _group(ranks: Ranks, timeout: float) -> Iterator[Group]:
    """torch's process group: NCCL for tensors on GPUs, gloo for what lies in memory."""
    import torch
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        there = replace(ranks, rank=dist.get_rank(), world=dist.get_world_size())
        control: Any = dist.new_group(backend="gloo") if there.world > 1 else None
        yield Group(there, control)
        return
    if ranks.world == 1:
        yield Group(ranks)
        return
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(int(os.environ.get("SLURM_CPUS_PER_TASK", "1")))
    gpus = torch.cuda.device_count()
    if gpu_of(ranks, gpus) < gpus:
        torch.cuda.set_device(gpu_of(ranks, gpus))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    wait = timedelta(seconds=timeout)
    if ranks.address in _THIS_MACHINE:
        _stay_on_this_machine()
    store = _own_part(_store(ranks, wait), ranks)
    dist.init_process_group(backend, store=store, rank=ranks.rank, world_size=ranks.world, timeout=wait)
    yield Group(ranks)
    # Only where all went well: after an error, leaving in good order could wait for those who do not.
    dist.barrier()
    dist.destroy_process_group()


def gpu_of(ranks: Ranks, count: int) -> int:
    """The number of a rank's own GPU among the `count` that it sees.

    srun may show each task its own alone (`--gpus-per-task=1`), as number 0.
    """
    return 0 if ranks.launcher == "srun" and count == 1 else ranks.local_rank


@cache
def _store(ranks: Ranks, wait: timedelta) -> "Store":
    """Where the ranks of a launch find each other; kept as long as the process, since one of them may house it."""
    from torch._C._distributed_c10d import TCPStore

    # torchrun's own process may house it; then no rank does.
    housed = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    is_master, alone = ranks.first and not housed, ranks.address in _THIS_MACHINE
    address = _LOOPBACK if alone else ranks.address
    if not is_master:
        return find_store(address, ranks.port, ranks.world, wait)
    return TCPStore(
        address,
        ranks.port,
        ranks.world,
        is_master=True,
        timeout=wait,
        multi_tenant=True,
        wait_for_workers=False,
        master_listen_fd=_listening_to_this_machine(ranks.port) if alone else None,
    )


def find_store(address: str, port: int, world: int, wait: timedelta) -> "TCPStore":
    """The store that another process houses, as soon as that has come up.

    torch's own client would wait several times as long, and so it tries only where somebody answers, and not for long:
    who answered may have died since.

    Raises:
        LostRankError: nobody answers for so long.
    """
    from torch._C._distributed_c10d import TCPStore
    from torch.distributed import DistNetworkError

    deadline = time.monotonic() + wait.total_seconds()
    while True:
        try:
            socket.create_connection((address, port), timeout=max(1.0, deadline - time.monotonic())).close()
            store = TCPStore(address, port, world, timeout=_TRY, multi_tenant=True, wait_for_workers=False)
            store.set_timeout(wait)
            return store
        except (OSError, DistNetworkError) as error:
            if time.monotonic() >= deadline:
                reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
                raise LostRankError(
                    f"nobody answers at {address}:{port}, where the ranks meet ({reason}); "
                    "train.rank_timeout says how long to wait"
                ) from error
        time.sleep(SECONDS_BETWEEN_TRIES)


def _listening_to_this_machine(port: int) -> int:
    """A socket that no other machine reaches: by itself a store listens to the whole network, and trusts everybody."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((_LOOPBACK, port))
        listener.listen()
        return listener.detach()


def _stay_on_this_machine() -> None:
    """Have gloo and NCCL listen to this machine alone, unless somebody has said where."""
    with contextlib.suppress(OSError):
        loopback = next((name for _, name in socket.if_nameindex() if name.startswith("lo")), None)
        for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME") if loopback else ():
            os.environ.setdefault(variable, str(loopback))


_joins = itertools.count()


def _own_part(store: "Store", ranks: Ranks) -> "Store":
    """A part of the store that no earlier attempt, and no earlier run of this process, has left anything in.

    Where torchrun houses the store, it outlives the ranks: https://github.com/pytorch/pytorch/issues/135712.
    """
    from torch._C._distributed_c10d import PrefixStore

    return PrefixStore(f"norm-matters/{ranks.attempt}/{next(_joins)}", store)
