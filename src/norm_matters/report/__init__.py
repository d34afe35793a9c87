"""Pages made from the files of runs: read, plots, page of one run (`write_report`) or several (`compare`). No torch."""

from typing import TYPE_CHECKING

from norm_matters.core.lazy import lazy_attributes

if TYPE_CHECKING:
    from norm_matters.report.comparison import Comparison, compare
    from norm_matters.report.single import write_report

__all__ = ["Comparison", "compare", "write_report"]

__getattr__ = lazy_attributes(__name__, {"comparison": ("Comparison", "compare"), "single": ("write_report",)})
