"""Datasets as files: packed into shards, checked, and counted."""

from typing import TYPE_CHECKING

from norm_matters.core.lazy import lazy_attributes

if TYPE_CHECKING:
    from norm_matters.packing.check import check_packed
    from norm_matters.packing.pack import Packed, estimate_packing, pack_dataset, plan_packing
    from norm_matters.packing.settings import PackSettings, parse_bytes
    from norm_matters.packing.source import PackSource, open_source
    from norm_matters.packing.stats import DatasetStats, measure_dataset
    from norm_matters.packing.tables import stats_lines, write_stats

__all__ = [
    "DatasetStats",
    "PackSettings",
    "PackSource",
    "Packed",
    "check_packed",
    "estimate_packing",
    "measure_dataset",
    "open_source",
    "pack_dataset",
    "parse_bytes",
    "plan_packing",
    "stats_lines",
    "write_stats",
]

__getattr__ = lazy_attributes(
    __name__,
    {
        "check": ("check_packed",),
        "pack": ("Packed", "estimate_packing", "pack_dataset", "plan_packing"),
        "settings": ("PackSettings", "parse_bytes"),
        "source": ("PackSource", "open_source"),
        "stats": ("DatasetStats", "measure_dataset"),
        "tables": ("stats_lines", "write_stats"),
    },
)
