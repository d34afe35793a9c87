"""How the ranks of a run meet, what they tell each other, and how one that fails takes the others with it.

Numbers and text travel as JSON, tensors as they are: nothing is pickled. What may go wrong on one rank alone is done
inside `Group.together` or `Group.alone`, which raise it on every rank; an error that leaves a rank without them ends
its process, and the others learn of it at their next exchange, where the connection to it is gone.
"""

import contextlib
import itertools
import json
import os
import socket
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

from norm_matters.core import stopping
from norm_matters.core.errors import LostRankError, NumericalError, RunInUseError, StorageError, UserError
from norm_matters.core.ranks import (
    ONE_PROCESS,
    Ranks,
    check_earlier_attempts,
    die_with_the_launcher,
    find_ranks,
    note_failure,
    words,
)

if TYPE_CHECKING:
    from torch import Tensor
    from torch._C._distributed_c10d import Store, TCPStore
    from torch.distributed import ProcessGroup

T = TypeVar("T")

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

_KINDS = {kind.exit_status: kind for kind in (UserError, RunInUseError, StorageError, NumericalError, LostRankError)}
# What torch raises when a rank is gone or silent: RuntimeErrors, some of them of no class of their own.
_LOST = ("gloo", "Connection closed by peer", "Connection reset by peer", "Broken pipe", "NCCL", "ncclUnhandled")
_SILENT = ("Timed out waiting", "Application timeout", "wait timeout", "timed out after")


class Group:
    """The ranks of a run; with one process, that process alone, and then nothing here costs anything.

    Every method is called by all ranks, in the same order, unless it says otherwise.

    Args:
        ranks: who this process is.
        control: what bytes in memory travel by; torch's own group where that can carry them.
    """

    def __init__(self, ranks: Ranks, control: "ProcessGroup | None" = None) -> None:
        self.ranks = ranks
        self._control = control

    @property
    def rank(self) -> int:
        """This process's number."""
        return self.ranks.rank

    @property
    def world(self) -> int:
        """How many there are."""
        return self.ranks.world

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes the record."""
        return self.ranks.first

    def wait_no_longer_than(self, seconds: float) -> None:
        """Set how long a rank waits for the others before it gives them up."""
        if self.world > 1:
            from torch.distributed.distributed_c10d import _set_pg_timeout

            _set_pg_timeout(timedelta(seconds=seconds))

    def together(self, action: Callable[[], T]) -> T:
        """Do the same on every rank; what one of them raises, all raise.

        Args:
            action: exchanges nothing with other ranks.
        """
        if self.world == 1:
            return action()
        result, error = _outcome(action)
        found = [(rank, failure) for rank, failure in enumerate(self.gather(_described(error))) if failure]
        if found:
            same = len(found) == self.world and all(failure == found[0][1] for _, failure in found)
            raise _rebuilt(found[0][1], None if same else found[0][0]) from error
        return result  # type: ignore[return-value]

    def alone(self, action: Callable[[], T]) -> T:
        """Do something on the first rank only; all get what it returns (JSON types), or raise what it raises."""
        if self.world == 1:
            return action()
        result, error = _outcome(action) if self.first else (None, None)
        answer = json.loads(self._broadcast_bytes(json.dumps([_described(error), result]).encode()))
        if answer[0]:
            raise _rebuilt(answer[0], None) from error
        return answer[1]

    def gather(self, value: Any) -> list[Any]:
        """The values (JSON types, floats to the last digit) of all ranks, in their order, on all."""
        if self.world == 1:
            return [value]
        return [json.loads(data) for data in self._gather_bytes(json.dumps(value).encode())]

    def gather_tensors(self, tensors: "Mapping[str, Tensor]") -> "list[dict[str, Tensor]]":
        """The tensors of all ranks, in their order, on the first rank (the others' on the CPU); no others elsewhere."""
        if self.world == 1:
            return [dict(tensors)]
        from safetensors.torch import load

        parts = self._gather_bytes(_packed(tensors), everywhere=False)
        return [dict(tensors), *map(load, parts[1:])] if self.first else []

    def tensors_of_first(self, tensors: "Mapping[str, Tensor]") -> "dict[str, Tensor]":
        """The tensors that the first rank gives, on all; on the CPU."""
        if self.first:
            found = dict(tensors)
            if self.world > 1:
                self._broadcast_bytes(_packed(tensors))
            return found
        from safetensors.torch import load

        return load(self._broadcast_bytes(b""))

    def copy_from(self, rank: int, tensors: "Sequence[Tensor]") -> None:
        """Overwrite the tensors by that rank's; in one exchange for all of a dtype."""
        if self.world == 1:
            return
        import torch
        import torch.distributed as dist

        by_kind: dict[Any, list[Tensor]] = {}
        for tensor in tensors:
            by_kind.setdefault((tensor.dtype, tensor.device), []).append(tensor.detach())
        for alike in by_kind.values():
            flat = torch.cat([tensor.flatten() for tensor in alike])
            # As bytes, since not every backend knows every dtype.
            dist.broadcast(flat.view(torch.uint8), src=rank)
            if rank != self.rank:
                for tensor, part in zip(alike, flat.split([tensor.numel() for tensor in alike]), strict=True):
                    tensor.copy_(part.view(tensor.shape))

    def all_true(self, flag: "Tensor") -> "Tensor":
        """Whether a flag (no dimension) is true on every rank, as a flag on its device; the host need not wait."""
        if self.world == 1:
            return flag
        import torch
        import torch.distributed as dist

        least = flag.to(torch.int32).reshape(1)
        dist.all_reduce(least, dist.ReduceOp.MIN)
        return least[0] > 0

    def largest(self, number: float) -> float:
        """The largest of the ranks' numbers."""
        return max(self.gather(number))

    def begin_largest(self, numbers: Sequence[int]) -> Callable[[], list[int]]:
        """Begin to find the largest of the ranks' numbers, each in its place; what is returned waits for the outcome.

        Whole numbers only. Meanwhile this rank may go on, and exchange other things.
        """
        if self.world == 1:
            return lambda: list(numbers)
        import torch
        import torch.distributed as dist

        largest = torch.tensor(numbers, dtype=torch.int64)
        work = dist.all_reduce(largest, dist.ReduceOp.MAX, group=self._control, async_op=True)

        def outcome() -> list[int]:
            assert work is not None
            work.wait()
            return largest.tolist()

        return outcome

    def sums(self, numbers: Sequence[float]) -> list[float]:
        """The ranks' numbers added in float64, in the order of the ranks; the same on all."""
        return [sum(values) for values in zip(*self.gather(list(numbers)), strict=True)]

    def _gather_bytes(self, data: bytes, *, everywhere: bool = True) -> list[bytes]:
        """The ranks' bytes, on all of them or on the first, where the others get none."""
        import torch
        import torch.distributed as dist

        sizes = torch.zeros(self.world, dtype=torch.int64)
        sizes[self.rank] = len(data)
        dist.all_reduce(sizes, group=self._control)
        longest = int(sizes.max())
        own = torch.frombuffer(bytearray(data.ljust(longest, b"\0")), dtype=torch.uint8)
        receives = everywhere or self.first
        parts = [torch.empty_like(own) for _ in range(self.world)] if receives else None
        if everywhere:
            dist.all_gather(parts, own, group=self._control)
        else:
            dist.gather(own, parts, dst=0, group=self._control)
        return [part.numpy().tobytes()[:size] for part, size in zip(parts or [], sizes.tolist(), strict=receives)]

    def _broadcast_bytes(self, data: bytes) -> bytes:
        """The first rank's bytes, on all."""
        import torch
        import torch.distributed as dist

        size = torch.tensor([len(data)])
        dist.broadcast(size, src=0, group=self._control)
        sent = bytearray(data) if self.first else bytearray(int(size))
        dist.broadcast(torch.frombuffer(sent, dtype=torch.uint8), src=0, group=self._control)
        return bytes(sent)


ALONE = Group(ONE_PROCESS)
"""The group of a process that trains by itself."""


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


def _outcome(action: Callable[[], T]) -> tuple[T | None, Exception | None]:
    """What an action returns, or raises."""
    try:
        return action(), None
    except Exception as error:
        if not isinstance(error, UserError):
            # The other ranks, and the user, are told in one line.
            traceback.print_exc()
        return None, error


def _described(error: Exception | None) -> dict[str, Any] | None:
    """An error as JSON."""
    if error is None:
        return None
    if isinstance(error, UserError):
        return {"status": error.exit_status, "problems": list(error.problems)}
    return {"status": 1, "problems": [f"{type(error).__name__}: {error}"]}


def _rebuilt(failure: Mapping[str, Any], rank: int | None) -> UserError:
    """The error that all ranks raise together, of the kind that one of them met."""
    error = _KINDS.get(failure["status"], UserError)(*failure["problems"])
    error.exit_status, error.shared, error.rank = failure["status"], True, rank
    return error


def _packed(tensors: "Mapping[str, Tensor]") -> bytes:
    from safetensors.torch import save

    return save({name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()})
