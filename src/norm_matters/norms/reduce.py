"""How the numbers of a channel are brought together: in which number format, and over which ranks.

Sums of a training step can be taken in a simulated number format (formats.py), and shared by the ranks of a
distributed run, so that each normalises by the statistics of the whole batch.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from norm_matters.core.errors import UserError

Accumulator = Literal["fp32", "pairwise", "sequential"]


def number_format(text: str) -> str:
    """The canonical name of a number format; UserError for one that is unknown."""
    from norm_matters.norms.formats import parse_format

    return str(parse_format(text))


def accumulator(x: Tensor) -> torch.dtype:
    """The dtype that sums over x, and numbers per channel, are kept in: float32 or wider."""
    return torch.promote_types(x.dtype, torch.float32)


def channel_sum(x: Tensor) -> Tensor:
    """Sum x (N, C, *) over all but the channels, accumulated in float32 or wider."""
    return x.sum((0, *range(2, x.dim())), dtype=accumulator(x))


def channel_count(x: Tensor) -> int:
    """The number n of values per channel of x (N, C, *)."""
    return x.numel() // x.shape[1]


@dataclass(frozen=True)
class Reducer:
    """Reductions per channel.

    Attributes:
        arithmetic: the simulated arithmetic of sums and of the numbers they are made of; None for the machine's own.
        group: the ranks that share the batch; None for this one alone.
    """

    arithmetic: Any = None
    group: "dist.ProcessGroup | None" = None

    @staticmethod
    def of(
        stats_format: str | None,
        accumulate: Accumulator,
        accumulator_format: str | None,
        rounding: Literal["nearest", "stochastic"],
    ) -> "Reducer":
        """The reductions that the options of a norm ask for, on one rank.

        Raises:
            UserError: an option has no meaning beside the others.
        """
        if accumulate == "fp32" and accumulator_format is not None:
            raise UserError(
                f"accumulator_format={accumulator_format} needs accumulator=pairwise or sequential; fp32 has its own"
            )
        if stats_format is None and accumulate == "fp32":
            if rounding == "stochastic":
                raise UserError("rounding=stochastic needs a format to round to, such as stats_format=fp16")
            return PLAIN
        from norm_matters.norms.arithmetic import Arithmetic
        from norm_matters.norms.formats import parse_format

        terms = parse_format(stats_format or "fp32")
        sums = parse_format(accumulator_format) if accumulator_format else terms
        return Reducer(Arithmetic(terms, accumulate, rounding, sums))

    @property
    def plain(self) -> bool:
        """Whether the machine's own kernels do the same."""
        return self.arithmetic is None and self.group is None

    def count(self, x: Tensor) -> int:
        """Values per channel of x (N, C, *), over all ranks."""
        n = channel_count(x)
        if self.group is None:
            return n
        return int(self._all_reduce(torch.tensor(n, device=x.device), dist.ReduceOp.SUM))

    def sum(self, x: Tensor) -> Tensor:
        """Sum x (N, C, *) per channel; (C,) in `accumulator(x)`."""
        total = channel_sum(x) if self.arithmetic is None else self.arithmetic.sum(x)
        return self._all_reduce(total, dist.ReduceOp.SUM)

    def sum_gathered(self, values: Tensor) -> Tensor:
        """Sum values (C, k), which are those of all ranks already, per channel; (C,) in `accumulator(values)`."""
        if self.arithmetic is None:
            return values.sum(1, dtype=accumulator(values))
        return self.arithmetic.sum(values.t())

    def share(self, totals: Tensor) -> Tensor:
        """Add numbers that are sums already over the ranks."""
        return self._all_reduce(totals, dist.ReduceOp.SUM)

    def max(self, values: Tensor) -> Tensor:
        """The largest over the ranks, element by element."""
        return self._all_reduce(values, dist.ReduceOp.MAX)

    def of_first_rank(self, values: Tensor) -> Tensor:
        """The values of the first rank, on all."""
        if self.group is None:
            return values
        values = values.clone()
        dist.broadcast(values, group=self.group, group_src=0)
        return values

    def round(self, values: Tensor) -> Tensor:
        """Round a statistic to the simulated format."""
        return values if self.arithmetic is None else self.arithmetic.round(values)

    def gather(self, values: Tensor) -> Tensor:
        """Bring together the values (C, k) of all ranks, (C, K); k may differ, and be 0."""
        if self.group is None:
            return values
        sizes = torch.zeros(dist.get_world_size(self.group), dtype=torch.long, device=values.device)
        sizes[dist.get_rank(self.group)] = values.shape[1]
        sizes = self._all_reduce(sizes, dist.ReduceOp.SUM).tolist()
        padded = torch.nn.functional.pad(values, (0, max(sizes) - values.shape[1])).contiguous()
        parts = [torch.empty_like(padded) for _ in sizes]
        dist.all_gather(parts, padded, group=self.group)
        return torch.cat([part[:, :size] for part, size in zip(parts, sizes, strict=True)], dim=1)

    def _all_reduce(self, values: Tensor, how: Any) -> Tensor:
        if self.group is None:
            return values
        # In place, and on a copy: what came in may be the caller's.
        values = values.clone()
        dist.all_reduce(values, how, group=self.group)
        return values


PLAIN = Reducer()
"""On one rank, by the machine's own arithmetic."""
