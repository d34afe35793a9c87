"""Curves over epochs, drawn with bokeh: linked x axes, values on hovering, series that a legend switches.

Names that come from users reach the plots as data only (never as titles, templates or code).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from bokeh.document import Document
from bokeh.embed import components
from bokeh.models import (
    ColumnDataSource,
    DataRange1d,
    GlyphRenderer,
    HoverTool,
    Line,
    LogTickFormatter,
    Range1d,
    Scatter,
    VArea,
)
from bokeh.models.glyph import Glyph
from bokeh.models.tickers import BasicTicker
from bokeh.plotting import figure
from bokeh.resources import Resources

from norm_matters.report.page import Html, tag

# Okabe and Ito's colours, which the colour-blind tell apart, without the yellow that is unreadable on white.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#333333")
_DASHES = ((), (8, 3), (2, 3), (8, 3, 2, 3))
_LOG_FROM = 50.0  # a positive quantity that spans this factor or more is drawn on a logarithmic axis
_DOTS_UP_TO = 120  # a plot with more points than this is drawn without a dot on each
_HOVER_ALL_UP_TO = 6  # in a plot with more curves, hovering shows the curve under the pointer only


@dataclass(frozen=True)
class Series:
    """What one colour stands for in all plots.

    Attributes:
        label: its name in the legend and on hovering.
        index: chooses colour and dashes, and is unique on the page.
    """

    label: str
    index: int

    @property
    def key(self) -> str:
        """The name that its lines bear, by which the legend finds them."""
        return f"series-{self.index}"

    @property
    def colour(self) -> str:
        """CSS colour."""
        return _COLOURS[self.index % len(_COLOURS)]

    @property
    def dash(self) -> tuple[int, ...]:
        """Lengths of strokes and gaps in pixels; empty for a solid line."""
        return _DASHES[self.index // len(_COLOURS) % len(_DASHES)]

    def swatch(self) -> Html:
        """A short piece of its line."""
        stroke = tag(
            "line", x1="0", y1="5", x2="26", y2="5",
            stroke=self.colour, stroke_width="3", stroke_dasharray=" ".join(map(str, self.dash)) or "none",
        )  # fmt: skip
        return tag("svg", stroke, width="26", height="10", aria_hidden="true")


@dataclass(frozen=True)
class Curve:
    """One line of a plot.

    Attributes:
        series: what it belongs to.
        epochs: (n,) epochs, counted from 1.
        values: (n,) values; those that are not finite leave a gap.
        low, high: (n,) edges of the band around it, or None.
    """

    series: Series
    epochs: np.ndarray
    values: np.ndarray
    low: np.ndarray | None = None
    high: np.ndarray | None = None


class Drawing(Protocol):
    """Whatever can be drawn as one plot of a page."""

    @property
    def last_epoch(self) -> int:
        """The last epoch on its x axis."""
        ...

    def heading(self) -> Html:
        """What stands above the plot."""
        ...

    def plot(self, epochs: Range1d) -> figure:
        """The plot, on the x range that the page's plots share."""
        ...


@dataclass(frozen=True)
class Panel:
    """One plot: a title of ours, and its lines; linear: on no logarithmic axis, whatever they span."""

    title: str
    curves: Sequence[Curve]
    linear: bool = False

    @property
    def last_epoch(self) -> int:
        """See `Drawing`."""
        return max(int(curve.epochs.max()) for curve in self.curves if len(curve.epochs))

    def heading(self) -> Html:
        """See `Drawing`."""
        return heading(self.title, log=_is_log(self))

    def plot(self, epochs: Range1d) -> figure:
        """See `Drawing`."""
        return _plot(self, epochs)


def drawable(panel: Panel) -> bool:
    """Whether any curve of the panel has a finite value."""
    return any(np.isfinite(curve.values).any() for curve in panel.curves)


def draw(panels: Sequence[Drawing]) -> tuple[list[Html], list[str]]:
    """Draw panels that share their x axis.

    Args:
        panels: each must have something to draw (`drawable`).

    Returns:
        one HTML element per panel, and the scripts that the page must run for them (bokeh itself, then the data).
    """
    if not panels:
        return [], []
    last = max(panel.last_epoch for panel in panels)
    margin = 0.5 if last == 1 else 0.02 * last
    epochs = Range1d(start=1 - margin, end=last + margin, bounds=(1 - margin, last + margin))
    plots = [panel.plot(epochs) for panel in panels]
    document = Document()
    with document.models.freeze():  # else bokeh looks through all models once per plot
        for plot in plots:
            document.add_root(plot)
    script, divs = components(plots, wrap_script=False)
    elements = [
        tag("figure", tag("h3", panel.heading()), Html(div), class_="panel")
        for panel, div in zip(panels, divs, strict=True)
    ]
    library = Resources(mode="inline", components=["bokeh"]).js_raw
    return elements, ["\n".join(library), script]


def legend(series: Iterable[Series]) -> Html:
    """Return buttons that show and hide the series in all plots of the page."""
    buttons = (
        tag("button", item.swatch(), item.label, type="button", aria_pressed="true", data_series=item.key)
        for item in series
    )
    return tag("div", *buttons, tag("span", "click to hide", class_="soft"), class_="legend")


def value_text(value: float) -> str:
    """A value for the eye: four significant digits, or all before the point."""
    return f"{value:,.0f}" if 1e4 <= abs(value) < 1e9 else f"{value:.4g}"


def _is_log(panel: Panel) -> bool:
    """Whether the values are all positive and span orders of magnitude (learning rates, a loss that explodes)."""
    return not panel.linear and spans_magnitudes(np.concatenate([curve.values for curve in panel.curves]))


def spans_magnitudes(values: np.ndarray) -> bool:
    """Whether the finite values, of which there must be one, are all positive and span orders of magnitude."""
    values = values[np.isfinite(values)]
    # Logarithms rather than a quotient, which can overflow.
    return bool(values.min() > 0 and np.log(values.max()) - np.log(values.min()) >= np.log(_LOG_FROM))


def heading(title: str, *, log: bool) -> Html:
    """The heading of a plot, which says where an axis is logarithmic."""
    scale = " (logarithmic)" if log else ""
    return Html(tag("span", title) + tag("span", scale, class_="soft"))


def empty_plot(epochs: Range1d, *, log: bool = False, **options: Any) -> figure:
    """A plot over epochs with nothing in it yet; `options` are bokeh's."""
    plot = figure(
        sizing_mode="stretch_width",
        x_range=epochs,
        y_axis_type="log" if log else "auto",  # linear, or a name at each tick
        x_axis_label="epoch",
        tools="xbox_zoom,xpan,reset,save",
        # No tool takes over dragging and the wheel before it is asked to: on a phone they scroll the page.
        active_drag=None,
        toolbar_location="above",
        **{"height": 270, **options},
    )
    _style(plot)
    if log:
        plot.yaxis.formatter = LogTickFormatter(min_exponent=3)
    return plot


def _plot(panel: Panel, epochs: Range1d) -> figure:
    """Draw one panel on the given x range."""
    plot = empty_plot(epochs, log=_is_log(panel))
    dotted = sum(len(curve.epochs) for curve in panel.curves) <= _DOTS_UP_TO
    drawn = [renderer for curve in panel.curves for renderer in _draw_curve(plot, curve, dotted=dotted)]
    # Equal values have no span to fit an axis to: they get that of their size.
    size = max(abs(value) for curve in panel.curves for value in curve.values if np.isfinite(value))
    plot.y_range = DataRange1d(renderers=[*drawn], only_visible=True, default_span=float(size) or 1.0)
    if len(panel.curves) <= _HOVER_ALL_UP_TO:
        _hover_all(plot, panel.curves)
    else:
        tooltips = [("epoch", "@epoch"), ("", "@text")]
        plot.add_tools(HoverTool(renderers=[*drawn], tooltips=tooltips, line_policy="nearest", visible=False))
    return plot


def _draw_curve(plot: figure, curve: Curve, *, dotted: bool) -> list[GlyphRenderer]:
    """Add the band, the line and the dots of one curve; returns what was added."""
    series = curve.series
    finite = np.isfinite(curve.values)
    values = np.where(finite, curve.values, np.nan)
    # A value between two gaps has no line: without a dot it would not be seen.
    beside = np.concatenate([[False], finite, [False]])
    lonely = finite & ~beside[:-2] & ~beside[2:]
    data = {
        "epoch": curve.epochs,
        "value": values,
        "dot": values if dotted else np.where(lonely, values, np.nan),
        "text": _hover_texts(curve, curve.epochs),
    }
    band = VArea(x="epoch", y1="low", y2="high", fill_color=series.colour, fill_alpha=0.18)
    line = Line(x="epoch", y="value", line_color=series.colour, line_width=2, line_dash=list(series.dash))
    dots = Scatter(x="epoch", y="dot", size=5, line_color=series.colour, fill_color=series.colour)
    glyphs: list[Glyph] = [line]
    if curve.low is not None and curve.high is not None:
        data |= {"low": curve.low, "high": curve.high}
        glyphs.insert(0, band)
    if dotted or lonely.any():
        glyphs.append(dots)
    # Not `plot.line()` and the like, which make three more glyphs each, for selections, that nobody sees.
    source = ColumnDataSource(data)
    return [plot.add_glyph(source, glyph, name=series.key) for glyph in glyphs]


def _hover_all(plot: figure, curves: Sequence[Curve]) -> None:
    """Show the values of all curves at the pointer's epoch in one box (a box per curve would hide the others)."""
    epochs = np.unique(np.concatenate([curve.epochs for curve in curves]))
    # An invisible line along the first curve that can be seen bears the texts of all.
    curve = next(curve for curve in curves if np.isfinite(curve.values).any())
    known = np.isfinite(curve.values)
    height = np.interp(epochs, curve.epochs[known], curve.values[known])
    texts = {f"text{index}": _hover_texts(curve, epochs) for index, curve in enumerate(curves)}
    source = ColumnDataSource({"epoch": epochs, "height": height, **texts})
    glyph = Line(x="epoch", y="height", line_alpha=0)
    if len(epochs) == 1:  # no line to be met
        glyph = Scatter(x="epoch", y="height", size=20, line_alpha=0, fill_alpha=0)
    tooltips = [("epoch", "@epoch"), *(("", f"@{name}") for name in texts)]
    bearer = plot.add_glyph(source, glyph)
    plot.add_tools(HoverTool(renderers=[bearer], tooltips=tooltips, mode="vline", line_policy="nearest", visible=False))


def _hover_texts(curve: Curve, epochs: np.ndarray) -> list[str]:
    """The label and value of a curve at each of the epochs; a dash where it has none."""
    known = {epoch: value_text(value) for epoch, value in zip(curve.epochs.tolist(), curve.values, strict=True)}
    label = f"{curve.series.label}: " if curve.series.label else ""
    return [label + known.get(epoch, "–") for epoch in epochs.tolist()]


def _style(plot: figure) -> None:
    """Quiet axes, so that the lines are what one sees."""
    plot.toolbar.logo = None
    plot.toolbar.autohide = True
    plot.outline_line_color = None
    plot.border_fill_color = None  # the panel's heading lies behind it
    plot.min_border_right = 12
    plot.xaxis.ticker = BasicTicker(min_interval=1, desired_num_ticks=6)
    plot.grid.grid_line_color = "#e6ebf0"
    for axis in plot.axis:
        axis.minor_tick_line_color = None
        axis.major_tick_line_color = None
        axis.axis_line_color = "#b6c0ca"
        axis.major_label_text_color = "#5b6875"
        axis.axis_label_text_color = "#5b6875"
        axis.axis_label_text_font_style = "normal"
