"""A network that many ranks train together: gradients averaged, statistics shared, optimizer state shared out.

Each rank has the whole network and sees its share of every batch. The gradient that a step goes by is that of the whole
batch, the same on all ranks to the bit, so their weights stay the same.
"""

import contextlib
import inspect
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from norm_matters.core.distributed import Group
from norm_matters.core.errors import UserError
from norm_matters.core.seeding import derive_seed, seed_everything
from norm_matters.core.shares import chunk_sizes
from norm_matters.engine.rng import restore_rng, rng_state
from norm_matters.norms import norms_of

_DDP = nn.parallel.DistributedDataParallel
# The argument by which buffers are sent before every forward pass has another name since torch 2.13.
_NO_BUFFERS: dict[str, Any] = {
    next(
        name for name in ("forward_sync_buffers", "broadcast_buffers") if name in inspect.signature(_DDP).parameters
    ): False
}


class Replicas:
    """What the ranks exchange while they train.

    Args:
        module: the network; the first rank's weights and buffers become those of all.
        forward: the network or its compiled form.
        group: more than one rank.

    Attributes:
        forward: what a step calls in place of `forward`: a backward pass behind it averages the gradients.
    """

    def __init__(self, module: nn.Module, forward: nn.Module, group: Group) -> None:
        # A weight of 1x1 has two sets of strides for one order in memory: torch wonders, but nothing is moved for it.
        warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
        self.group = group
        self._module = module
        self.forward = _DDP(
            forward,
            **_NO_BUFFERS,  # `share_statistics` sends them, once per epoch
            # Some networks have parameters that the loss does not reach. And torch then keeps the buckets that it
            # began with: with three ranks or more the last bits of a sum depend on them, and a resumed run begins anew.
            find_unused_parameters=True,
        )

    def exchanging(self, wanted: bool) -> contextlib.AbstractContextManager:
        """A context whose backward passes average the gradients, or only add to this rank's own."""
        return contextlib.nullcontext() if wanted else self.forward.no_sync()

    def share_statistics(self) -> float:
        """Make the first rank's running statistics, and all else a checkpoint has besides weights, those of all ranks.

        Returns:
            The largest difference there was between any rank's and the first's, relative to the largest number in
            the tensor.
        """
        own = list(self._statistics().values())
        before = [tensor.clone() for tensor in own]
        self.group.copy_from(0, own)
        pairs = [(old.double(), new.double()) for old, new in zip(before, own, strict=True) if new.is_floating_point()]
        found = [
            ((old - new).abs().max() / new.abs().max().clamp(min=1e-30)).item() for old, new in pairs if old.numel()
        ]
        return self.group.largest(max(found, default=0.0))

    def gather_statistics(self) -> dict[str, Tensor]:
        """Of all that `share_statistics` shares, what differs now: `rank1/...` and so on; on the first rank only."""
        first, *others = self.group.gather_tensors(self._statistics()) or [{}]
        first = {name: tensor.cpu() for name, tensor in first.items()}
        return {
            f"rank{rank}/{name}": tensor
            for rank, part in enumerate(others, start=1)
            for name, tensor in part.items()
            if not torch.equal(tensor, first[name])
        }

    def load_statistics(self, tensors: Mapping[str, Tensor]) -> None:
        """Take what `gather_statistics` gave for this rank; the network has the first rank's already."""
        with torch.no_grad():
            for name, tensor in self._statistics().items():
                own = tensors.get(f"rank{self.group.rank}/{name}")
                if own is not None:
                    tensor.copy_(own)

    def _statistics(self) -> dict[str, Tensor]:
        """What a checkpoint has of the network besides its weights."""
        parameters = {name for name, _ in self._module.named_parameters(remove_duplicate=False)}
        return {name: tensor for name, tensor in self._module.state_dict().items() if name not in parameters}


@contextlib.contextmanager
def unsynchronised(module: nn.Module) -> Iterator[None]:
    """A context in which the norms of a network take the statistics of this rank's images alone."""
    norms = [norm for _, norm in norms_of(module) if getattr(norm, "sync", False)]
    for norm in norms:
        norm.sync = False  # type: ignore[assignment]
    try:
        yield
    finally:
        for norm in norms:
            norm.sync = True  # type: ignore[assignment]


class Shards:
    """Optimizer state shared out among the ranks (ZeRO, stage 1: Rajbhandari et al. 2020, arXiv 1910.02054).

    Each tensor that is optimised is moved on one rank only, which alone has its momentum and the like, and sends the
    others the result. The numbers are those of a run without: only who works them out, and who remembers, is different.

    Args:
        parameters: what is optimised, by name.
        group: the ranks.
    """

    def __init__(self, parameters: Mapping[str, Tensor], group: Group) -> None:
        self._group = group
        self._parameters = dict(parameters)
        loads = [0] * group.world
        self._owner: dict[str, int] = {}
        # The largest first, each to the rank that has least so far.
        for name, tensor in sorted(parameters.items(), key=lambda item: -item[1].numel()):
            rank = loads.index(min(loads))
            self._owner[name], loads[rank] = rank, loads[rank] + tensor.numel()

    def owns(self, name: str) -> bool:
        """Whether this rank moves the tensor of that name."""
        return self._owner[name] == self._group.rank

    def forget_foreign_gradients(self) -> None:
        """Leave only the gradients of tensors that this rank moves: an optimizer passes over the others."""
        for name, parameter in self._parameters.items():
            if not self.owns(name):
                parameter.grad = None

    def share_results(self) -> None:
        """Give every rank what the others have moved."""
        for rank in range(self._group.world):
            moved = [tensor for name, tensor in self._parameters.items() if self._owner[name] == rank]
            if moved:
                self._group.copy_from(rank, moved)

    def gather_tensors(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The optimizer's tensors (`PARAMETER/ENTRY`) of all ranks, on the first."""
        return {name: tensor for part in self._group.gather_tensors(tensors) for name, tensor in part.items()}

    def gather_numbers(self, numbers: dict[str, Any]) -> dict[str, Any]:
        """The rest of the optimizer's state, with each parameter's from the rank that moves it."""
        parts = self._group.gather(numbers["state"])
        return {**numbers, "state": {name: parts[rank][name] for name, rank in self._owner.items()}}

    def own_part(
        self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Of a whole optimizer's state what this rank keeps."""
        kept = {name: entries if self.owns(name) else {} for name, entries in numbers["state"].items()}
        own = {f"{name}/{entry}" for name, entries in kept.items() for entry in entries}
        return {name: tensor for name, tensor in tensors.items() if name in own}, {**numbers, "state": kept}


def gather_rng(group: Group) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The random streams of all ranks: tensors by `rng/...` and `rng.rank1/...` (on the first rank only), and JSON."""
    tensors, numbers = rng_state()
    parts = group.gather_tensors(tensors)
    named = {f"{_streams(rank)}/{name}": tensor for rank, part in enumerate(parts) for name, tensor in part.items()}
    first, *others = group.gather(numbers)
    return named, {"rng": first} | ({"rng_of_ranks": others} if others else {})


def restore_own_rng(
    group: Group, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any], *, seed: int, step: int
) -> None:
    """Restore this rank's random streams; one that had none in the run as it was saved starts new ones.

    Args:
        tensors, numbers: what `gather_rng` gave.
        seed: of the run, for new streams.
        step: optimizer steps done, likewise.
    """
    saved = [numbers["rng"], *numbers.get("rng_of_ranks", [])]
    if group.rank < len(saved):
        prefix = f"{_streams(group.rank)}/"
        own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        restore_rng(own, saved[group.rank])
    else:
        seed_everything(derive_seed(seed, "rank", group.rank, step))


def seed_rank(group: Group, seed: int) -> None:
    """Give every rank but the first random streams of its own; the first has those of a run on one process."""
    if group.rank:
        seed_everything(derive_seed(seed, "rank", group.rank))


def check_ranks(*, images: int, chunks: int, world: int) -> None:
    """Raise UserError where a rank would get no image of some chunk of a batch.

    Args:
        images: in a batch of all ranks.
        chunks: that it is taken in.
    """
    smallest = min(chunk_sizes(images, chunks))
    if smallest < world:
        taken = f" taken in chunks of {smallest} at least (train.accumulate={chunks})" if chunks > 1 else ""
        raise UserError(f"data.batch_size: {images} images per batch{taken} are too few for {world} processes")


def _streams(rank: int) -> str:
    return f"rng.rank{rank}" if rank else "rng"
