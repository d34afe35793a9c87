"""Pages made from the files of runs: read, plots, page of one run (`write_report`) or several (`compare`). No torch."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from norm_matters.report.comparison import Comparison, compare
    from norm_matters.report.single import write_report

__all__ = ["Comparison", "compare", "write_report"]

_HOMES = {"Comparison": "comparison", "compare": "comparison", "write_report": "single"}


def __getattr__(name: str) -> Any:
    # Lazy, so that `norm-matters --help` does not wait for bokeh and pandas.
    if name not in _HOMES:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
