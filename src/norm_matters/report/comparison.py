"""One page for several runs: their last epochs in a table, all their curves, and what sets them apart."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from norm_matters.core.errors import UserError
from norm_matters.record.files import write_file
from norm_matters.report.groups import Group, differing_keys, group_runs
from norm_matters.report.page import Html, note, numbers_table, page, section, tag
from norm_matters.report.plots import Curve, Panel, Series, draw, drawable, legend, value_text
from norm_matters.report.read import read_run, show

PANELS = {
    "val_error1": "Validation error@1 (%)",
    "val_loss": "Validation loss",
    "train_error1": "Training error@1 (%)",
    "train_loss": "Training loss",
    "val_error5": "Validation error@5 (%)",
    "train_error5": "Training error@5 (%)",
    "lr": "Learning rate",
    "images_per_second": "Training images per second",
}
_TABLE = {
    "val_error1": "val error@1 (%)",
    "val_loss": "val loss",
    "train_error1": "train error@1 (%)",
    "train_loss": "train loss",
    "val_error5": "val error@5 (%)",
    "images_per_second": "images per second",
}
_TABLE_REMARK = (
    "Mean ± sample standard deviation over the n runs of the group, at the last epoch that all of them have ended "
    "(never at the best one)."
)


@dataclass(frozen=True)
class Comparison:
    """What `compare` found and wrote.

    Attributes:
        table: one row per group of runs: `run` (its label), `n` (runs counted), `seeds`, `epoch` (the last one that all
            of them have), then each metric as its mean and, as `{metric}_std`, its standard deviation (of a sample; NaN
            for one run).
        page: the HTML page.
        notes: what a reader of the table should know, one sentence each (runs without rows, of unequal length ...).
    """

    table: pd.DataFrame
    page: Path
    notes: Sequence[str]


def compare(runs: Sequence[Path], output: Path) -> Comparison:
    """Compare runs: runs that differ in the seed only are one group, shown as their mean and the band from min to max.

    Args:
        runs: run folders; one named twice counts once.
        output: the HTML file to write; replaced in one go.

    Raises:
        UserError: no run is given, a folder is no run, or `output` is a folder.
        StorageError: the page cannot be written.
    """
    folders = list({run.resolve(): run for run in runs}.values())
    if not folders:
        raise UserError("no runs to compare; name at least one run folder")
    if output.is_dir():
        raise UserError(f"output '{output}' is a folder; name the HTML file to write")
    groups = group_runs([read_run(folder) for folder in folders])
    rows = [group.row() for group in groups]
    notes = [text for group in groups for text in group.notes()]
    write_file(output, _page(groups, rows, notes))
    return Comparison(pd.DataFrame(rows).astype({"epoch": "Int64"}), output, notes)


def _page(groups: Sequence[Group], rows: Sequence[Mapping[str, Any]], notes: Sequence[str]) -> bytes:
    """The page of the groups, their rows of the table, and notes."""
    series = [Series(group.label, index) for index, group in enumerate(groups)]
    panels = [group_panel(metric, groups, series) for metric in PANELS]
    elements, scripts = draw([panel for panel in panels if drawable(panel)])
    count = sum(len(group.runs) for group in groups)
    subtitle = f"{_count(len(groups), 'group')}: runs that differ in the seed only are taken together"
    sections = [
        *map(note, notes),
        section("Last epoch", _last_epochs(series, rows), tag("p", _TABLE_REMARK, class_="soft")),
        *curves_section(groups, series, elements),
        section("Settings that differ", _differences(groups, series)),
        section("Runs", _members(groups)),
    ]
    return page(f"Comparison of {_count(count, 'run')}", subtitle, sections, scripts)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def group_panel(metric: str, groups: Sequence[Group], series: Sequence[Series]) -> Panel:
    """The plot of one metric of `PANELS`: a line per group, with a band where the group has several runs."""
    curves = []
    for group, item in zip(groups, series, strict=True):
        epochs, (mean, low, high) = group.curve(metric)
        curves.append(Curve(item, epochs, mean, *((low, high) if len(group.counted) > 1 else ())))
    return Panel(PANELS[metric], curves)


def curves_section(groups: Sequence[Group], series: Sequence[Series], elements: Sequence[Html]) -> list[Html]:
    """The section of the drawn panels, with their legend."""
    if not elements:
        return [note("No run has ended an epoch: there is nothing to draw.")]
    text = "Line: the mean of the group's runs. Band: from their minimum to their maximum."
    remark = [tag("p", text, class_="soft")] if any(len(group.counted) > 1 for group in groups) else []
    return [section("Curves", *remark, legend(series), tag("div", *elements, class_="panels"))]


def _last_epochs(series: Sequence[Series], rows: Sequence[Mapping[str, Any]]) -> Html:
    """The table of the page: its metrics as mean ± standard deviation."""
    metrics = [metric for metric in _TABLE if not all(math.isnan(row[metric]) for row in rows)]
    cells = [
        [
            _name(item),
            str(row["n"]),
            show(row["epoch"]),
            *(_mean_std(row[metric], row[f"{metric}_std"]) if row["n"] else "–" for metric in metrics),
        ]
        for item, row in zip(series, rows, strict=True)
    ]
    return numbers_table(["group", "n", "epoch", *(_TABLE[metric] for metric in metrics)], cells)


def _mean_std(mean: float, std: float) -> str:
    """The mean with its deviation in two significant digits (whole numbers from 100 on)."""
    if math.isnan(std):
        return value_text(mean)
    return f"{value_text(mean)} ± {std:.2g}" if std < 100 else f"{value_text(mean)} ± {std:,.0f}"


def _name(series: Series) -> Html:
    return tag("span", series.swatch(), f" {series.label}")


def _differences(groups: Sequence[Group], series: Sequence[Series]) -> Html:
    """What sets the groups apart: a column per key."""
    keys = differing_keys(groups)
    if not keys:
        return tag("p", "None: the runs differ in nothing but the seed.")
    settings = ([show(group.runs[0].config.get(key)) for key in keys] for group in groups)
    rows = ([_name(item), *values] for item, values in zip(series, settings, strict=True))
    return numbers_table(["group", *keys], rows)


def _members(groups: Sequence[Group]) -> Html:
    """The runs behind each group."""
    rows = (
        [run.name, group.label, show(run.config.get("seed")), str(run.last_epoch)]
        for group in groups
        for run in group.runs
    )
    return numbers_table(["run", "group", "seed", "epochs"], rows)
