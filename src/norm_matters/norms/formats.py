"""Number formats of few bits, and rounding to them: simulated in float32, on any device, as torch's casts where it has
the format. Sums in them, and what a norm rounds, are in arithmetic.py.
"""

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from norm_matters.core.errors import UserError, nearest

Rounding = Literal["nearest", "stochastic"]

# Exponent and mantissa bits of the formats that have a name.
_NAMED = {"fp32": (8, 23), "tf32": (8, 10), "bf16": (8, 7), "fp16": (5, 10)}
_SPELT = re.compile(r"e([2-8])m([1-9]|1\d|2[0-3])")
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# The integer that a number is viewed as, and where in it the exponent is.
_EXPONENT_FIELD = {torch.float32: (torch.int32, 0xFF << 23), torch.float64: (torch.int64, 0x7FF << 52)}


@dataclass(frozen=True)
class NumberFormat:
    """A binary floating-point format with subnormal numbers, contained in float32.

    Attributes:
        exponent_bits: 2 to 8.
        mantissa_bits: 1 to 23, the leading one not counted.
        infinity: whether the largest exponent stands for infinity and NaN, as in IEEE 754; else it holds numbers too,
            its last code is NaN, and what is too large becomes the largest number (e4m3; Micikevicius et al. 2022,
            arXiv 2209.05433).
    """

    exponent_bits: int
    mantissa_bits: int
    infinity: bool = True

    def __str__(self) -> str:
        bits = self.exponent_bits, self.mantissa_bits
        return next((name for name, named in _NAMED.items() if named == bits), f"e{bits[0]}m{bits[1]}")

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype in which torch computes in this format, correctly rounded."""
        return _DTYPES.get(str(self))

    @property
    def smallest_normal(self) -> float:
        """2 to the lowest exponent."""
        return 2.0 ** (2 - 2 ** (self.exponent_bits - 1))

    @property
    def highest_power(self) -> float:
        """2 to the highest exponent."""
        return 2.0 ** (2 ** (self.exponent_bits - 1) - (1 if self.infinity else 0))

    @property
    def largest(self) -> float:
        """The largest finite number."""
        spacing = 2.0**-self.mantissa_bits
        return (2 - spacing * (1 if self.infinity else 2)) * self.highest_power

    def round(self, values: Tensor, rounding: Rounding = "nearest", generator: torch.Generator | None = None) -> Tensor:
        """Round to numbers of this format.

        Args:
            values: any floating dtype.
            rounding: "nearest": ties to even; "stochastic": to one of the two neighbours, such that the mean is the
                value (to 2^-24 of their distance). What is too large becomes infinite, or the largest number in a
                format without infinity.
            generator: of the stochastic rounding; torch's default one of the device.

        Returns:
            float32, or float64 where the values are.
        """
        wide = values.to(torch.promote_types(values.dtype, torch.float32))
        if values.dtype == self.dtype:
            return wide
        integer, field = _EXPONENT_FIELD[wide.dtype]
        # The power of two at or below |value|; below the normal numbers the spacing stays theirs.
        power = (wide.view(integer) & field).view(wide.dtype).clamp_(self.smallest_normal, self.highest_power)
        # In units of the spacing at the value. All these products and quotients are exact.
        units = wide / power * 2.0**self.mantissa_bits
        units = units.round_() if rounding == "nearest" else _round_stochastically(units, generator)
        rounded = units * 2.0**-self.mantissa_bits * power
        beyond = torch.full_like(wide, torch.inf if self.infinity else self.largest)
        return torch.where(rounded.abs() > self.largest, beyond.copysign_(wide), rounded)


def _round_stochastically(values: Tensor, generator: torch.Generator | None) -> Tensor:
    """Round to one of the two nearest integers, up in size with the probability of the fraction."""
    size = values.abs()
    lower = size.floor()
    chance = torch.rand(values.shape, generator=generator, dtype=values.dtype, device=values.device)
    return (lower + (chance < size - lower)).copysign(values)


@lru_cache
def parse_format(text: str) -> NumberFormat:
    """The format of a name: `fp16`, `bf16`, `tf32`, `fp32`, or `eXmY` with X exponent and Y mantissa bits.

    `e4m3` is torch's `float8_e4m3fn`: no infinity, and the saturating cast that torch has from 2.12 on. All others
    are as in IEEE 754.

    Raises:
        UserError: unknown; names the nearest.
    """
    if text == "e4m3":
        return NumberFormat(4, 3, infinity=False)
    spelt = _SPELT.fullmatch(text)
    bits = _NAMED.get(text) or (spelt and (int(spelt[1]), int(spelt[2])))
    if bits is None:
        names = [*_NAMED, "e4m3", "e5m2"]
        raise UserError(
            f"number format '{text}' is unknown{nearest(text, names)}; there are {', '.join(names)} "
            "and any eXmY with X from 2 to 8 and Y from 1 to 23"
        )
    return NumberFormat(*bits)
