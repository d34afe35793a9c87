"""Many runs: grids, sweeps, where they run, and the statistics of what comes out. Importing it imports no torch."""

from typing import TYPE_CHECKING

from norm_matters.core.lazy import lazy_attributes

if TYPE_CHECKING:
    from norm_matters.experiments.cells import Cell, make_cells
    from norm_matters.experiments.claims.performing import reproduce
    from norm_matters.experiments.executors import Placement, make_executor
    from norm_matters.experiments.grid import Grid, parse_grid, read_grid
    from norm_matters.experiments.runner import run_cells, runs_of
    from norm_matters.experiments.statistics import compare_pairs, holm, mean_interval
    from norm_matters.experiments.summary import Arm, Measure, Outcome, summarise
    from norm_matters.experiments.sweeping import SweepPlan, SweepResult, plan_sweep, run_sweep, sweep

__all__ = [
    "Arm",
    "Cell",
    "Grid",
    "Measure",
    "Outcome",
    "Placement",
    "SweepPlan",
    "SweepResult",
    "compare_pairs",
    "holm",
    "make_cells",
    "make_executor",
    "mean_interval",
    "parse_grid",
    "plan_sweep",
    "read_grid",
    "reproduce",
    "run_cells",
    "run_sweep",
    "runs_of",
    "summarise",
    "sweep",
]

__getattr__ = lazy_attributes(
    __name__,
    {
        "cells": ("Cell", "make_cells"),
        "claims.performing": ("reproduce",),
        "executors": ("Placement", "make_executor"),
        "grid": ("Grid", "parse_grid", "read_grid"),
        "runner": ("run_cells", "runs_of"),
        "statistics": ("compare_pairs", "holm", "mean_interval"),
        "summary": ("Arm", "Measure", "Outcome", "summarise"),
        "sweeping": ("SweepPlan", "SweepResult", "plan_sweep", "run_sweep", "sweep"),
    },
)
