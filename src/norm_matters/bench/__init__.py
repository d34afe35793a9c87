"""What the command `bench` measures. Importing this package imports no torch."""

from typing import TYPE_CHECKING

from norm_matters.core.lazy import lazy_attributes

if TYPE_CHECKING:
    from norm_matters.bench.numerics import Case, Measurement, numerics_cases
    from norm_matters.bench.numerics_page import ratio_text, write_numerics

__all__ = ["Case", "Measurement", "numerics_cases", "ratio_text", "write_numerics"]

__getattr__ = lazy_attributes(
    __name__,
    {"numerics": ("Case", "Measurement", "numerics_cases"), "numerics_page": ("ratio_text", "write_numerics")},
)
