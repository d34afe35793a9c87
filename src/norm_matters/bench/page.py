"""The page that a benchmark leaves behind: ratios against a peer as dots, the whole table, and its provenance."""

import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from bokeh.document import Document
from bokeh.embed import components
from bokeh.models import ColumnDataSource, FactorRange, FixedTicker, HoverTool, Range1d, Span
from bokeh.plotting import figure
from bokeh.resources import Resources
from bokeh.transform import dodge

from norm_matters.bench.norm_arms import BATCH, NATIVE
from norm_matters.bench.norms import NormRow, median_speedups, norms_csv
from norm_matters.record.files import make_folder, write_file
from norm_matters.report.page import Html, facts_table, note, numbers_table, page, section, tag
from norm_matters.report.plots import Series, value_text
from norm_matters.report.read import flatten, show

if TYPE_CHECKING:
    from norm_matters.bench.input import InputRow
    from norm_matters.bench.train import TrainMeasurement

# The shape tells the series apart whose colours come a second time: bokeh's name, and a character for the legend.
_MARKERS = (("circle", "●"), ("triangle", "▲"), ("square", "■"), ("diamond", "◆"))
_TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500)
_COLOURS = 7  # of `Series`
_DOT = 9  # pixels of height for each series at a place


class Ratio(NamedTuple):
    """One dot.

    Attributes:
        panel: the plot that it is in; its heading.
        place: the line of the plot that it is on.
        series: what it is a ratio of; colour and shape.
        value: how many times as fast as the peer, or as whatever the line at 1 stands for.
        text: shown on hovering.
    """

    panel: str
    place: str
    series: str
    value: float
    text: str


def bench_page(
    title: str,
    subtitle: str,
    ratios: Sequence[Ratio],
    rows: Sequence[Mapping[str, Any]],
    provenance: Mapping[str, Any],
    *,
    axis: str,
    notes: Sequence[str] = (),
    summary: Sequence[Html] = (),
) -> bytes:
    """A page that loads nothing from anywhere.

    Args:
        title, subtitle: its heading.
        ratios: the dots, a panel for each of their panels, a line for each place, all in the order given.
        rows: the whole table, column -> value; columns that are empty throughout are left out.
        provenance: of `collect_provenance`.
        axis: what a ratio is, for the axis.
        notes: sentences on what was measured and how.
        summary: what comes before the plots.
    """
    series = {name: Series(name, index) for index, name in enumerate(dict.fromkeys(ratio.series for ratio in ratios))}
    panels = list(dict.fromkeys(ratio.panel for ratio in ratios))
    sections = [*map(note, notes), *summary]
    scripts = []
    if ratios:
        shared = _x_range([ratio.value for ratio in ratios])
        plots = [_dots([ratio for ratio in ratios if ratio.panel == name], series, shared, axis) for name in panels]
        document = Document()
        for plot in plots:
            document.add_root(plot)
        script, divs = components(plots, wrap_script=False)
        figures = (
            tag("figure", tag("h3", name, style="margin: 0 0 6px"), Html(div), class_="panel")
            for name, div in zip(panels, divs, strict=True)
        )
        sections.append(section("Ratios", _legend(series.values()), tag("div", *figures, class_="panels")))
        scripts = ["\n".join(Resources(mode="inline", components=["bokeh"]).js_raw), script]
    facts = [(key, shlex.join(value) if key == "command" else show(value)) for key, value in flatten(dict(provenance))]
    sections += [section("All figures", _table(rows)), section("Provenance", facts_table(facts))]
    return page(title, subtitle, sections, scripts)


def write_norms(folder: Path, rows: Sequence[NormRow], provenance: Mapping[str, Any]) -> tuple[Path, Path]:
    """Write `norms.csv` and `norms.html`; what was there is replaced.

    Args:
        folder: made if it does not exist.
        rows: in the order to show them.
        provenance: facts in JSON types.

    Returns:
        Both files.

    Raises:
        StorageError: they cannot be written.
    """
    make_folder(folder)
    table = folder / "norms.csv"
    write_file(table, norms_csv(rows))
    return table, write_page(folder, "norms.html", norms_page(rows, provenance))


def write_page(folder: Path, name: str, content: bytes) -> Path:
    """Write a page into a folder, made if it does not exist; return its path. StorageError if it cannot be."""
    make_folder(folder)
    write_file(folder / name, content)
    return folder / name


def norms_page(rows: Sequence[NormRow], provenance: Mapping[str, Any]) -> bytes:
    """The page of `bench norms`."""
    several = len({row.dtype for row in rows}) > 1
    ratios = [
        Ratio(
            f"{row.form}, {row.layout}" + (f", {row.dtype}" if several else ""),
            row.shape,
            f"{row.norm} · {row.implementation}",
            row.speedup,
            f"{value_text(row.milliseconds)} ms",
        )
        for row in rows
        if row.speedup is not None
        and row.milliseconds is not None
        and (row.norm, row.implementation) != (BATCH, NATIVE)
    ]
    medians = median_speedups(rows)
    norms = list(dict.fromkeys(norm for group in medians.values() for norm in group))
    cells = (
        [
            ", ".join(place if several else place[:2]),
            *(f"{group[norm]:.2f}" if norm in group else "–" for norm in norms),
        ]
        for place, group in medians.items()
    )
    summary = section("Times as fast as native, median over the shapes", numbers_table(["", *norms], cells))
    return bench_page(
        "Norms: forward and backward",
        f"against nn.BatchNorm2d in the same layout · {_count(len(rows), 'measurement')}",
        ratios,
        [row._asdict() for row in rows],
        provenance,
        axis="times as fast as nn.BatchNorm2d",
        notes=[
            "Times are medians; ratios are medians over rounds in which all implementations were timed in turns. "
            "The floor is the time of the fewest passes over memory at the bandwidth of a copy: a tensor that fits "
            "into a cache can be faster. kept_bytes counts the input where it is kept for the backward pass; "
            "peak_bytes counts what forward and backward allocate."
        ],
        summary=[summary] if medians else [],
    )


def train_page(rows: "Sequence[TrainMeasurement]", provenance: Mapping[str, Any]) -> bytes:
    """The page of `bench train`."""
    first, *others = rows
    ratios = [
        Ratio(
            f"{row.model}, {row.what}",
            f"{row.layout}, {'compiled' if row.compiled else 'eager'}",
            f"{row.side} · {row.norm} · pages {row.pages}" + (f" · {row.workers} workers" if row.workers else ""),
            row.ours_is_faster_by,
            f"{value_text(row.images_per_second)} images/s",
        )
        for row in others
    ]
    return bench_page(
        f"Training {first.model}",
        f"{first.what} · batches of {first.batch_size} · {first.dataset} · {first.device}, {first.threads} threads",
        ratios,
        [asdict(row) for row in rows],
        provenance,
        axis="our engine is faster by",
        notes=[f"Ours, {first.layout} and eager, makes {value_text(first.images_per_second)} images per second."],
    )


def input_page(rows: "Sequence[InputRow]", provenance: Mapping[str, Any]) -> bytes:
    """The page of `bench input`."""
    first = rows[0].library
    ratios = [
        Ratio(
            row.task,
            f"{row.workers} {'worker' if row.workers == 1 else 'workers'}",
            row.library,
            row.ours_over_this,
            f"{value_text(row.images_per_second)} images/s, {value_text(row.per_core)} per core",
        )
        for row in rows
        if row.library != first
    ]
    return bench_page(
        "Images per second",
        "our loader beside torchvision's transforms and timm's loader",
        ratios,
        [asdict(row) for row in rows],
        provenance,
        axis="ours is faster by, per core",
    )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def _marker(series: Series) -> tuple[str, str]:
    """The shape of its dots, as a name and as a character; series of one colour have different ones."""
    return _MARKERS[series.index // _COLOURS % len(_MARKERS)]


def _legend(series: Iterable[Series]) -> Html:
    """Buttons that hide and show the series in all plots."""
    buttons = (
        tag(
            "button",
            tag("span", _marker(item)[1], style=f"color: {item.colour}", aria_hidden="true"),
            item.label,
            type="button",
            aria_pressed="true",
            data_series=item.key,
        )
        for item in series
    )
    return tag("div", *buttons, tag("span", "click to hide", class_="soft"), class_="legend")


def _x_range(values: Sequence[float]) -> tuple[float, float]:
    """The range that all plots share, with 1 in it."""
    low, high = min(*values, 1, 1), max(*values, 1, 1)
    return low / 1.15, high * 1.15


def _ticks(low: float, high: float) -> list[float]:
    """Ticks of a logarithmic axis: 1, 2, 5 and their likes, or tenths where these are too few."""
    usual = [tick for tick in _TICKS if low <= tick <= high]
    return usual if len(usual) > 2 else [tick / 10 for tick in range(1, 40) if low <= tick / 10 <= high]


def _dots(ratios: Sequence[Ratio], series: Mapping[str, Series], shared: tuple[float, float], axis: str) -> figure:
    """A line for each place, a dot for each series at it, and a rule at 1."""
    places = list(dict.fromkeys(ratio.place for ratio in ratios))
    here = [name for name in series if any(ratio.series == name for ratio in ratios)]
    plot = figure(
        height=80 + len(places) * (14 + _DOT * len(here)),
        sizing_mode="stretch_width",
        x_axis_type="log",
        x_range=Range1d(start=shared[0], end=shared[1]),
        y_range=FactorRange(factors=places[::-1]),
        x_axis_label=axis,
        tools="save",
        toolbar_location=None,
    )
    plot.add_layout(Span(location=1, dimension="height", line_color="#1b2733", line_width=1.5))
    step = 0.8 / len(here)
    for index, name in enumerate(here):
        dots = [ratio for ratio in ratios if ratio.series == name]
        item = series[name]
        source = ColumnDataSource(
            {
                "place": [ratio.place for ratio in dots],
                "value": [ratio.value for ratio in dots],
                "series": [name] * len(dots),
                "ratio": [value_text(ratio.value) for ratio in dots],
                "text": [ratio.text for ratio in dots],
            }
        )
        drawn = plot.scatter(
            "value",
            dodge("place", 0.4 - step * (index + 0.5), range=plot.y_range),
            source=source,
            size=8,
            marker=_marker(item)[0],
            color=item.colour,
            name=item.key,
        )
        tooltips = [("", "@series"), (axis, "@ratio"), ("", "@text")]
        plot.add_tools(HoverTool(renderers=[drawn], tooltips=tooltips, visible=False))
    ticks = _ticks(*shared)
    plot.xaxis.ticker = FixedTicker(ticks=ticks)
    plot.outline_line_color = None
    plot.border_fill_color = None
    plot.grid.grid_line_color = "#e6ebf0"
    plot.axis.axis_line_color = "#b6c0ca"
    plot.axis.major_tick_line_color = None
    plot.axis.minor_tick_line_color = None
    plot.xaxis.major_label_overrides = {tick: f"{tick:g}" for tick in ticks}
    plot.axis.axis_label_text_font_style = "normal"
    return plot


def _table(rows: Sequence[Mapping[str, Any]]) -> Html:
    """All rows; a column for each key whose value is not always the same, and a line with the others."""
    keys = [key for key in rows[0] if any(row[key] not in (None, "") for row in rows)] if rows else []
    same = [key for key in keys if len(rows) > 1 and all(row[key] == rows[0][key] for row in rows)]
    columns = [key for key in keys if key not in same]
    cells = ([_cell(row[column]) for column in columns] for row in rows)
    # Long headings are not broken within words.
    headings = [tag("span", column.replace("_", " "), style="overflow-wrap: normal") for column in columns]
    told = "; ".join(f"{key.replace('_', ' ')}: {_cell(rows[0][key])}" for key in same)
    note = [tag("p", f"In all rows: {told}.", class_="soft")] if same else []
    return tag("div", *note, numbers_table(headings, cells))


def _cell(value: Any) -> str:
    if value is None or value == "":
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return value_text(value) if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
