"""Plots of quantities that every layer has: one layer at a time, chosen by a slider, and all of them as a map.

The slider is an element of the page and its script one of the page's own (`style.SLIDER_SCRIPT`): bokeh's would need
code made from text, which the page forbids. All layers' values lie in the plot's data; the script says which are shown.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from bokeh.models import (
    BasicTicker,
    ColorBar,
    ColumnDataSource,
    DataRange1d,
    FixedTicker,
    HoverTool,
    Line,
    LogColorMapper,
    LogTickFormatter,
    Range1d,
    Rect,
    Scatter,
    VArea,
)
from bokeh.models.glyph import Glyph
from bokeh.palettes import Viridis256
from bokeh.plotting import figure

from norm_matters.report.page import Html, tag
from norm_matters.report.plots import Series, empty_plot, heading, spans_magnitudes

_VALUE, _BESIDE = Series("", 0), Series("", 1)
_DOTS_UP_TO = 60
_MAP_HEIGHT = (150, 560)
_MAP_ROW = 14


@dataclass(frozen=True)
class LayerPanel:
    """A plot of one quantity, for the layer that a slider chooses.

    Attributes:
        title: of ours.
        slider: key of the slider.
        epochs: (n,) counted from 1.
        values: (layers, n); what is not finite leaves a gap.
        bands: lower and upper edges (layers, n, 2) of bands around it, the innermost first.
        beside: (layers, n) for a dashed line, or None.
        labels: what hovering calls the columns: `value`, `beside`, and `low0`, `high0` ... of the bands.
    """

    title: str
    slider: str
    epochs: np.ndarray
    values: np.ndarray
    bands: Sequence[np.ndarray] = ()
    beside: np.ndarray | None = None
    labels: dict[str, str] = field(default_factory=lambda: {"value": "value"})

    @property
    def last_epoch(self) -> int:
        """See `plots.Drawing`."""
        return int(self.epochs.max())

    @property
    def drawable(self) -> bool:
        """Whether there is a finite value."""
        return bool(np.isfinite(self.values).any())

    def heading(self) -> Html:
        """See `plots.Drawing`."""
        return heading(self.title, log=self._log)

    def plot(self, epochs: Range1d) -> figure:
        """See `plots.Drawing`; the first layer is shown."""
        plot = empty_plot(epochs, log=self._log, name=self.slider)
        columns = self._columns()
        data: dict[str, Any] = {"epoch": self.epochs}
        for name, layers in columns.items():
            data[name] = layers[0]
            data |= {f"{name}-{index}": values for index, values in enumerate(layers)}
        source = ColumnDataSource(data)
        lines = [Line(x="epoch", y="value", line_color=_VALUE.colour, line_width=2)]
        if self.beside is not None:
            lines.append(Line(x="epoch", y="beside", line_color=_BESIDE.colour, line_width=2, line_dash=[6, 4]))
        dotted = lines if len(self.epochs) <= _DOTS_UP_TO else []
        dots = [
            Scatter(x="epoch", y=line.y, size=5, line_color=line.line_color, fill_color=line.line_color)
            for line in dotted
        ]
        bands = [
            VArea(
                x="epoch", y1=f"low{index}", y2=f"high{index}", fill_color=_VALUE.colour, fill_alpha=0.22 / (index + 1)
            )
            for index in range(len(self.bands))
        ]
        glyphs: list[Glyph] = [*reversed(bands), *reversed(lines), *reversed(dots)]
        drawn = [plot.add_glyph(source, glyph) for glyph in glyphs]
        size = np.abs(self.values[np.isfinite(self.values)]).max()
        plot.y_range = DataRange1d(renderers=[*drawn], default_span=float(size) or 1.0)
        tooltips = [("epoch", "@epoch"), *((label, f"@{name}{{%.4g}}") for name, label in self.labels.items())]
        formatters: dict[str, Any] = {f"@{name}": "printf" for name in self.labels}
        # The value's dots where there are any: one epoch has no line to be met.
        bearer = drawn[-1]
        plot.add_tools(
            HoverTool(renderers=[bearer], tooltips=tooltips, formatters=formatters, mode="vline", visible=False)
        )
        return plot

    @property
    def _log(self) -> bool:
        everything = [self.values] if self.beside is None else [self.values, self.beside]
        return spans_magnitudes(np.concatenate([values.ravel() for values in everything]))

    def _columns(self) -> dict[str, np.ndarray]:
        """Column -> (layers, n), in float32 as it was recorded, without what the axis cannot show."""
        columns = {"value": self.values}
        if self.beside is not None:
            columns["beside"] = self.beside
        for index, band in enumerate(self.bands):
            columns |= {f"low{index}": band[..., 0], f"high{index}": band[..., 1]}
        log = self._log
        return {
            name: np.where(np.isfinite(values) & ((values > 0) | (not log)), values, np.nan).astype(np.float32)
            for name, values in columns.items()
        }


@dataclass(frozen=True)
class LayerMap:
    """All layers at once: a cell per layer and epoch, its colour the (positive) value on a logarithmic scale.

    Attributes:
        title: of ours.
        layers: their names, from the input on.
        epochs: (n,) counted from 1.
        values: (layers, n); cells without a positive finite value stay empty.
    """

    title: str
    layers: Sequence[str]
    epochs: np.ndarray
    values: np.ndarray

    @property
    def last_epoch(self) -> int:
        """See `plots.Drawing`."""
        return int(self.epochs.max())

    @property
    def drawable(self) -> bool:
        """Whether there is a cell to colour."""
        return bool(self._known().any())

    def heading(self) -> Html:
        """See `plots.Drawing`."""
        return heading(self.title, log=True)

    def plot(self, epochs: Range1d) -> figure:
        """See `plots.Drawing`."""
        known = self._known()
        rows, columns = np.nonzero(known)
        values = self.values[known].astype(np.float32)
        count = len(self.layers)
        height = int(np.clip(90 + _MAP_ROW * count, *_MAP_HEIGHT))
        plot = empty_plot(epochs, height=height, y_range=Range1d(start=count + 0.5, end=0.5), y_axis_label="layer")
        mapper = LogColorMapper(palette=Viridis256, low=float(values.min()), high=float(values.max()))
        edges = np.concatenate([[self.epochs[0] - 1], self.epochs])
        source = ColumnDataSource(
            {
                "x": ((edges[:-1] + edges[1:] + 1) / 2)[columns],
                "y": rows + 1,
                "width": np.diff(edges)[columns],
                "epoch": self.epochs[columns],
                "value": values,
                "layer": [self.layers[row] for row in rows.tolist()],
            }
        )
        fill: Any = {"field": "value", "transform": mapper}
        cells = plot.add_glyph(source, Rect(x="x", y="y", width="width", height=1, fill_color=fill, line_color=None))
        tooltips = [("epoch", "@epoch"), ("layer", "@y: @layer"), ("value", "@value{%.4g}")]
        formatters: dict[str, Any] = {"@value": "printf"}
        hover = HoverTool(renderers=[cells], tooltips=tooltips, formatters=formatters, visible=False)
        plot.add_tools(hover)
        plot.add_layout(ColorBar(color_mapper=mapper, width=10, formatter=LogTickFormatter(min_exponent=2)), "right")
        plot.yaxis.ticker = FixedTicker(ticks=[1]) if count == 1 else BasicTicker(min_interval=1)
        plot.grid.visible = False
        return plot

    def _known(self) -> np.ndarray:
        return np.isfinite(self.values) & (self.values > 0)


def slider(key: str, label: str, names: Sequence[str]) -> Html:
    """An element that chooses among layers in all the `LayerPanel`s with that key.

    Args:
        names: of the layers, in the order of the panels' values.
    """
    control = tag(
        "input",
        type="range",
        min="0",
        max=str(len(names) - 1),
        value="0",
        # Browsers remember where it stood, but not what the plots showed.
        autocomplete="off",
        data_plots=key,
        data_names=json.dumps(names),
    )
    text = tag("span", f"{label} ", tag("output", _numbered(0, names[0])), f" of {len(names)}")
    return tag("label", text, control, class_="slider")


def _numbered(index: int, name: str) -> str:
    """As the script has it too."""
    return f"{index + 1}: {name}"
