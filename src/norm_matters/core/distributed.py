"""What the ranks of a run tell each other, and how one that fails takes the others with it.

Numbers and text travel as JSON, tensors as they are: nothing is pickled. What may go wrong on one rank alone is done
inside `Group.together` or `Group.alone`, which raise it on every rank; an error that leaves a rank without them ends
its process, and the others learn of it at their next exchange, where the connection to it is gone.
"""

import json
import traceback
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from norm_matters.core.errors import LostRankError, NumericalError, RunInUseError, StorageError, UserError
from norm_matters.core.ranks import (
    ONE_PROCESS,
    Ranks,
)

if TYPE_CHECKING:
    from torch import Tensor
    from torch.distributed import ProcessGroup

T = TypeVar("T")

_KINDS = {kind.exit_status: kind for kind in (UserError, RunInUseError, StorageError, NumericalError, LostRankError)}


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
