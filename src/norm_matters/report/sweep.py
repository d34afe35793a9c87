"""The page of a sweep: its arms with intervals, their differences from the baseline, and their curves."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from bokeh.models import ColumnDataSource, FactorRange, HoverTool, Range1d, Scatter, Segment, Span
from bokeh.models.tickers import BasicTicker
from bokeh.plotting import figure

from norm_matters.record.files import write_file
from norm_matters.report.comparison import PANELS, curves_section, group_panel
from norm_matters.report.groups import Group
from norm_matters.report.page import Html, note, numbers_table, page, section, tag
from norm_matters.report.plots import Series, draw, drawable, empty_plot, heading, value_text
from norm_matters.report.read import show

_REMARK = (
    "Mean and sample standard deviation over the n finished runs of an arm, and the 95% t interval of the mean. "
    "Differences are those of pairs, runs of the same seed: arm less baseline, with their 95% t interval; p: paired t "
    "test, two-sided; p (Holm): adjusted for all the tests of this table. They assume that seeds are independent and "
    "differences roughly normal."
)
_ROW = 26  # pixels of height of an arm in the plot of intervals


@dataclass(frozen=True)
class SweepArm:
    """What the page needs to know of an arm.

    Attributes:
        group: its label, and its runs that have ended an epoch.
        values: of its finished runs, which its mean is over.
        row: its row of summary.csv.
    """

    group: Group
    values: Sequence[float]
    row: Mapping[str, Any]


@dataclass(frozen=True)
class Intervals:
    """The plot of arms: a dot per run, mean and interval of each arm, and a line at `reference`."""

    title: str
    metric: str
    arms: Sequence[SweepArm]
    series: Sequence[Series]
    reference: float | None

    @property
    def last_epoch(self) -> int:
        """See `Drawing`: it has no epochs."""
        return 1

    def heading(self) -> Html:
        """See `Drawing`."""
        return heading(self.title, log=False)

    def plot(self, epochs: Range1d) -> figure:
        """See `Drawing`."""
        # Numbered, for labels come from users and may be equal in their beginning; the tick shows the label.
        labels = [arm.group.label[:40] for arm in self.arms]
        factors = [f"{index + 1}. {text}" for index, text in enumerate(labels)]
        drawn = [value for arm in self.arms for value in (*arm.values, *_edges(arm.row, self.metric))]
        margin = 0.05 * (max(drawn) - min(drawn)) or 0.5
        plot = empty_plot(
            Range1d(start=min(drawn) - margin, end=max(drawn) + margin),
            y_range=FactorRange(factors=factors[::-1]),
            height=90 + _ROW * len(factors),
        )
        plot.xaxis.axis_label = self.metric
        plot.xaxis.ticker = BasicTicker(desired_num_ticks=6)  # not whole numbers, as of epochs
        dots = [self._draw(plot, *item) for item in zip(factors, self.arms, self.series, strict=True)]
        plot.add_tools(HoverTool(renderers=dots, tooltips=[("", "@text")], visible=False))
        if self.reference is not None:
            plot.add_layout(Span(location=self.reference, dimension="height", line_color="#b6c0ca", line_dash=[4, 4]))
        return plot

    def _draw(self, plot: figure, factor: str, arm: SweepArm, series: Series) -> Any:
        """Add one arm; returns its dots."""
        edges = _edges(arm.row, self.metric)
        if len(edges) == 2:
            bar = {"low": [edges[0]], "high": [edges[1]], "arm": [factor]}
            glyph = Segment(x0="low", x1="high", y0="arm", y1="arm", line_color=series.colour, line_width=3)
            plot.add_glyph(ColumnDataSource(bar), glyph, name=series.key)
        if arm.values:
            mean = ColumnDataSource({"value": [float(np.mean(arm.values))], "arm": [factor]})
            diamond = Scatter(
                x="value", y="arm", size=13, marker="diamond", fill_color=series.colour, line_color="#fff"
            )
            plot.add_glyph(mean, diamond, name=series.key)
        seeds = arm.group.seeds
        texts = [f"{arm.group.label}: {value_text(value)}" for value in arm.values]
        if len(seeds) == len(texts):
            texts = [f"{text}, seed {seed}" for text, seed in zip(texts, seeds, strict=True)]
        source = ColumnDataSource({"value": list(arm.values), "arm": [factor] * len(arm.values), "text": texts})
        dots = Scatter(x="value", y="arm", size=7, fill_color="#fff", fill_alpha=0.7, line_color=series.colour)
        return plot.add_glyph(source, dots, name=series.key)


def write_sweep_page(
    path: Path,
    title: str,
    subtitle: str,
    arms: Sequence[SweepArm],
    *,
    metric: str,
    measured: str,
    runs: Sequence[Mapping[str, Any]],
    notes: Sequence[str] = (),
) -> None:
    """Write the page.

    Args:
        path: the HTML file; replaced in one go.
        title, subtitle: its heading.
        arms: in the order of the sweep.
        metric: column of results.csv that is compared.
        measured: what the values are, in words.
        runs: rows of runs.csv.
        notes: what a reader should know first.

    Raises:
        StorageError: the page cannot be written.
    """
    series = [Series(arm.group.label, index) for index, arm in enumerate(arms)]
    name = PANELS.get(metric, metric)
    panels = [group_panel(each, [arm.group for arm in arms], series) for each in PANELS]
    panels = [panel for panel in panels if any(len(curve.epochs) for curve in panel.curves) and drawable(panel)]
    baselines = {arm.row.get("baseline") for arm in arms} - {None}
    means: list[float | None] = [arm.row[f"{metric}_mean"] for arm in arms if baselines == {arm.group.label}]
    plot = Intervals(f"{name}, {measured}", metric, arms, series, means[0] if means else None)
    intervals = [plot] if any(arm.values for arm in arms) else []
    elements, scripts = draw([*intervals, *panels])
    parts = [*elements[: len(intervals)], _arms_table(arms, series, metric), tag("p", _REMARK, class_="soft")]
    sections = [
        *map(note, notes),
        section("Arms", *(tag("div", part, class_="part") for part in parts)),
        *curves_section([arm.group for arm in arms], series, elements[len(intervals) :]),
        section("Runs", _runs_table(runs)),
    ]
    write_file(path, page(title, subtitle, sections, scripts))


def _edges(row: Mapping[str, Any], metric: str) -> list[float]:
    """The ends of an arm's interval, where it has one."""
    return [edge for side in ("low", "high") if (edge := row.get(f"{metric}_{side}")) is not None]


def _arms_table(arms: Sequence[SweepArm], series: Sequence[Series], metric: str) -> Html:
    baselines = list(dict.fromkeys(base for arm in arms if (base := arm.row.get("baseline"))))
    header = ["arm", "n", f"{metric}, mean ± SD", "95% interval", "best, mean ± SD"]
    if len(baselines) > 1:
        header.append("baseline")
    if baselines:
        whose = baselines[0] if len(baselines) == 1 else "its baseline"
        header += [f"difference from {whose}, 95% interval", "pairs", "p", "p (Holm)"]
    rows = []
    for arm, item in zip(arms, series, strict=True):
        row = arm.row
        cells: list[str] = [
            tag("span", item.swatch(), f" {item.label}"),
            f"{row['n']} of {row['runs']}",
            _mean_sd(row, metric),
            _interval(row, metric),
            _mean_sd(row, f"best_{metric}"),
        ]
        if len(baselines) > 1:
            cells.append(row["baseline"] or "–")
        if baselines:
            difference = "–" if row["difference"] is None else f"{row['difference']:+.4g}"
            between = f" ({_interval(row, 'difference')})" if row["difference_low"] is not None else ""
            cells += [f"{difference}{between}", show(row["pairs"]), _p(row["p_t"]), _p(row["p_holm"])]
        rows.append(cells)
    return numbers_table(header, rows)


def _runs_table(runs: Sequence[Mapping[str, Any]]) -> Html:
    """runs.csv, without the columns that are empty throughout."""
    columns = [column for column in (runs[0] if runs else {}) if any(run[column] not in (None, "") for run in runs)]
    cells = ([value_text(v) if isinstance(v := run[column], float) else show(v) for column in columns] for run in runs)
    return numbers_table(columns, cells)


def _interval(row: Mapping[str, Any], name: str) -> str:
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    return "–" if low is None or high is None else f"{low:.4g} to {high:.4g}"


def _mean_sd(row: Mapping[str, Any], name: str) -> str:
    mean, deviation = row[f"{name}_mean"], row[f"{name}_sd"]
    if mean is None:
        return "–"
    return f"{mean:.4g}" if deviation is None else f"{mean:.4g} ± {deviation:.2g}"


def _p(value: float | None) -> str:
    return "–" if value is None else "< 0.0001" if value < 1e-4 else f"{value:.2g}"
