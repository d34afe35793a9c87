"""Sums over a channel as a machine with few bits would take them.

What a norm with `stats_format` or another accumulator than "fp32" rounds, and nothing else:

- every term of a sum over a channel, before it is added: x for the mean; |d|, d^2 or the like for sigma; the output's
  gradient g, g d and the slope of sigma in the backward pass;
- every partial sum, unless the accumulator is "fp32", which adds the rounded terms in float32;
- the largest and the smallest deviation, and the k largest of Top(k), which are chosen before they are rounded;
- the mean, sigma, and the variance where sigma is its root.

Deviations, sigma^2 + eps, the output and all else that is done value by value stay in float32. A number too large for a
format becomes infinite, and so does every sum that it enters; in e4m3, which has no infinity, it becomes the largest.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from norm_matters.norms.formats import NumberFormat, Rounding
from norm_matters.norms.reduce import Accumulator, accumulator, channel_sum

# A carrier's integer of the same size, its mantissa bits, and its highest exponent.
_CARRIERS = {np.dtype(np.float32): (np.int32, 23, 127), np.dtype(np.float64): (np.int64, 52, 1023)}


def _sum_and_round(rows: np.ndarray, form: NumberFormat, noise: np.ndarray | None) -> np.ndarray:
    """Add rows (n, C) one after the other and round every sum to a format.

    Numbers are scaled such that what overflows the format overflows the carrier, and sums below the format's normal
    numbers are exact. So all that rounding has to do is to clear low bits of the mantissa, after adding half of what
    they can hold, or noise; a carry goes on into the exponent, as it should.

    Args:
        rows: numbers of the format in float32 or float64.
        form: the format.
        noise: (n, C) integers, uniform in the bits to clear, for stochastic rounding; None rounds to nearest, ties to
            even.

    Returns:
        (C,) in the dtype of the rows.
    """
    integer, mantissa_bits, highest_exponent = _CARRIERS[rows.dtype]
    dropped = mantissa_bits - form.mantissa_bits
    low_bits = (1 << dropped) - 1
    scale = 2.0**highest_exponent / form.highest_power
    total = np.zeros_like(rows[0])
    bits = total.view(integer)
    largest = form.largest * scale
    with np.errstate(over="ignore", invalid="ignore"):
        for step, row in enumerate(rows * rows.dtype.type(scale)):
            total += row
            bits += ((bits >> dropped) & 1) + (low_bits >> 1) if noise is None else noise[step]
            bits &= ~low_bits
            if not form.infinity:
                np.clip(total, -largest, largest, out=total)
    return total / rows.dtype.type(scale)


@dataclass(frozen=True)
class Arithmetic:
    """Sums over a channel in simulated formats.

    Attributes:
        format: of the terms and of what is made of the sums.
        accumulate: "fp32": the terms are added in float32, by torch's sum; "pairwise": neighbours are added, then
            neighbouring sums and so on, an odd last one waiting for the next round; "sequential": one after the other,
            image by image.
        rounding: to the formats.
        accumulator_format: of the partial sums of "pairwise" and "sequential", and of the terms as they enter them.
    """

    format: NumberFormat
    accumulate: Accumulator
    rounding: Rounding
    accumulator_format: NumberFormat

    def round(self, values: Tensor) -> Tensor:
        """Round to the format; float32, or float64 where the values are."""
        return self.format.round(values, self.rounding)

    def sum(self, x: Tensor) -> Tensor:
        """Sum x (N, C, *) per channel; (C,) in float32, or float64 where x is."""
        terms = self.round(x.detach())
        if self.accumulate == "fp32" or not terms.numel():
            return channel_sum(terms.float()).to(accumulator(x))
        if self.accumulator_format != self.format:
            terms = self.accumulator_format.round(terms, self.rounding)
        rows = terms.movedim(1, -1).reshape(-1, x.shape[1]).to(self._carrier())
        total = self._pairwise(rows) if self.accumulate == "pairwise" else self._sequential(rows)
        return total.to(accumulator(x))

    def _carrier(self) -> torch.dtype:
        """The dtype in which adding two numbers and then rounding the sum is rounding once.

        To nearest, numbers of p bits need a carrier of 2 p + 2 (Figueroa 1995). Stochastic rounding needs the sum
        itself: a small term that the carrier loses would have had its chance.
        """
        if self.rounding == "nearest" and self.accumulator_format.dtype is not None:
            return self.accumulator_format.dtype
        narrow = self.rounding == "nearest" and self.accumulator_format.mantissa_bits <= 10
        return torch.float32 if narrow else torch.float64

    def _pairwise(self, rows: Tensor) -> Tensor:
        """Sum rows (n, C) to (C,)."""
        rounded = rows.dtype == self.accumulator_format.dtype and self.rounding == "nearest"
        while len(rows) > 1:
            half = len(rows) // 2
            sums = rows[: 2 * half : 2] + rows[1 : 2 * half : 2]
            sums = sums if rounded else self.accumulator_format.round(sums, self.rounding)
            rows = torch.cat([sums, rows[2 * half :]])
        return rows[0]

    def _sequential(self, rows: Tensor) -> Tensor:
        """Sum rows (n, C) to (C,), on the host: no device has anything to do in parallel here."""
        if rows.dtype in (torch.float16, torch.float32) and rows.dtype == self.accumulator_format.dtype:
            with np.errstate(over="ignore", invalid="ignore"):
                return torch.from_numpy(np.add.accumulate(rows.cpu().numpy())[-1]).to(rows.device)
        # numpy knows no bfloat16, which float32 carries like other formats.
        rows = rows.float() if rows.dtype == torch.bfloat16 else rows
        noise = None
        if self.rounding == "stochastic":
            values = 1 << (52 - self.accumulator_format.mantissa_bits)
            noise = torch.randint(values, rows.shape, device=rows.device).cpu().numpy()
        total = _sum_and_round(rows.cpu().numpy(), self.accumulator_format, noise)
        return torch.from_numpy(total).to(rows.device)
