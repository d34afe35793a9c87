"""The part of a run's page that shows what its instruments measured."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from norm_matters.core.errors import UserError
from norm_matters.record.instruments import Measurements, read_measurements
from norm_matters.report.layers import LayerMap, LayerPanel, slider
from norm_matters.report.page import Html, note, section, tag

# A page carries this many points of each line at most, all layers taken together, but 30 epochs at least: a thousand
# is 40 to 70 kB.
_POINTS = 6_000
_FEWEST_EPOCHS = 30
_MAP_EPOCHS = 60
# As in the engine's check, which this room cannot import: it needs torch.
_UNCHANGED = 1e-3

_MOTION_REMARK = (
    "Line: the median over the layer's output channels; bands: their quartiles, and from the smallest to the largest. "
    "Dashed: the equilibrium of weight decay, to which the angle of a scale-invariant weight tends."
)
_SIGMA_REMARK = "Sigma is the root of running_var; line: the median over the channels; bands: quartiles, least to most."
_INPUT_REMARK = (
    " Sums go over the values that share a statistic: a channel of the batch, or (without a sigma) an image."
)


@dataclass(frozen=True)
class Part:
    """Plots that belong together.

    Attributes:
        panels: what to draw; all of it drawable.
        before: what stands above them.
    """

    panels: Sequence[LayerPanel | LayerMap]
    before: Sequence[Html]


@dataclass(frozen=True)
class View:
    """What the page shows of the instruments: plots by parts, and sentences."""

    parts: Sequence[Part]
    notes: Sequence[Html] = ()

    @property
    def panels(self) -> list[LayerPanel | LayerMap]:
        """All plots, in order."""
        return [panel for part in self.parts for panel in part.panels]

    def sections(self, elements: Sequence[Html]) -> list[Html]:
        """The section of the page, around the drawn `panels`; none where there is nothing to say."""
        rest, children = list(elements), []
        for part in self.parts:
            drawn, rest = rest[: len(part.panels)], rest[len(part.panels) :]
            children.append(tag("div", *part.before, tag("div", *drawn, class_="panels"), class_="part"))
        return [section("Instruments", *children, *self.notes)] if children or self.notes else []


def view_instruments(run: Path) -> View:
    """Read what a run measured; damage becomes a sentence on the page, never a page that is not written."""
    try:
        found = read_measurements(run)
    except UserError as error:
        return View([], [note(f"What the instruments measured cannot be shown: {error}")])
    if found is None or not len(found.epochs):
        return View([])
    shown = thinned(found, max(_FEWEST_EPOCHS, _POINTS // max(map(len, found.columns.values()), default=1)))
    return View(
        [part for part in (_weights(shown), _norms(shown), _overview(found)) if part.panels], _invariance(found)
    )


def thinned(found: Measurements, count: int) -> Measurements:
    """At most that many of the epochs, spread evenly, the first and the last among them."""
    if len(found.epochs) <= count:
        return found
    rows = np.unique(np.linspace(0, len(found.epochs) - 1, count).round().astype(int))
    columns = {
        instrument: {layer: values[rows] for layer, values in layers.items()}
        for instrument, layers in found.columns.items()
    }
    return Measurements(found.epochs[rows], columns)


def _weights(found: Measurements) -> Part:
    layers = found.columns.get("weight_norm", {})
    key = "slider-weights"

    def one(instrument: str) -> np.ndarray:
        return np.array([values[:, 0] for values in found.columns[instrument].values()])

    panels = []
    if layers:
        norms = np.array([_quantiles(values) for values in layers.values()])
        panels.append(_spread("Weight norm per channel", key, found, norms))
    if _has(found, "angle", layers) and _has(found, "equilibrium", layers):
        panels.append(
            _spread("Angle per step (radians)", key, found, _stack(found, "angle"), beside=one("equilibrium"))
        )
    if _has(found, "effective_lr", layers):
        panels.append(LayerPanel("Effective learning rate", key, found.epochs, one("effective_lr")))
    return _part(panels, key, "Layer", list(layers), _MOTION_REMARK)


def _norms(found: Measurements) -> Part:
    titles = {
        "input_max": "Largest input",
        "input_sum_squares": "Largest sum of squares of inputs",
        "input_sum_abs": "Largest sum of absolute inputs",
        "input_outside_float16": "Share of inputs outside float16",
    }
    key = "slider-norms"
    names = max((list(found.columns.get(name, {})) for name in ("sigma", *titles)), key=len)
    panels = []

    def of_all(instrument: str, width: int) -> np.ndarray:
        """The values of every norm in `names`; NaN for those that the instrument does not know."""
        nothing = np.full((len(found.epochs), width), np.nan)
        return np.array([found.columns[instrument].get(name, nothing) for name in names])

    if found.columns.get("sigma"):
        panels.append(_spread("Sigma", key, found, of_all("sigma", 5)))
    panels += [
        LayerPanel(title, key, found.epochs, of_all(instrument, 1)[..., 0])
        for instrument, title in titles.items()
        if found.columns.get(instrument)
    ]
    remark = _SIGMA_REMARK + _INPUT_REMARK * any(found.columns.get(name) for name in titles)
    return _part(panels, key, "Norm", names, remark)


def _overview(found: Measurements) -> Part:
    """The angle of every layer in every epoch."""
    shown = thinned(found, _MAP_EPOCHS)
    layers = shown.columns.get("angle", {})
    if not layers:
        return Part([], [])
    angles = _stack(shown, "angle")[..., 2]
    chart = LayerMap("Angle per step of all layers, median over channels (radians)", list(layers), shown.epochs, angles)
    return Part([chart] if chart.drawable else [], [tag("p", "All layers, the first at the top:", class_="soft")])


def _invariance(found: Measurements) -> list[Html]:
    changes = found.columns.get("scale_change", {})
    if not changes:
        return []
    # A change that is NaN tells nothing: it is not below the limit.
    same = [layer for layer, values in changes.items() if values[-1, 0] <= _UNCHANGED]
    others = [layer for layer in changes if layer not in same]
    names = f"all but {', '.join(others)}" if 0 < len(others) < len(same) else ", ".join(same) or "none"
    text = f"Weights that can be scaled without changing the output (epoch {found.epochs[-1]})"
    return [tag("p", f"{text}: {names if others else 'all'}.", class_="soft")]


def _part(panels: Sequence[LayerPanel], key: str, label: str, names: Sequence[str], remark: str) -> Part:
    shown = [panel for panel in panels if panel.drawable]
    return Part(shown, [slider(key, label, names), tag("p", remark, class_="soft")] if shown else [])


def _spread(
    title: str, key: str, found: Measurements, five: np.ndarray, beside: np.ndarray | None = None
) -> LayerPanel:
    """A panel of five numbers (layers, epochs, 5) per epoch."""
    labels = {"value": "median", "low0": "lower quartile", "high0": "upper quartile", "low1": "least", "high1": "most"}
    labels |= {} if beside is None else {"beside": "equilibrium"}
    return LayerPanel(title, key, found.epochs, five[..., 2], (five[..., [1, 3]], five[..., [0, 4]]), beside, labels)


def _stack(found: Measurements, instrument: str) -> np.ndarray:
    """(layers, epochs, numbers)."""
    return np.array(list(found.columns[instrument].values()))


def _has(found: Measurements, instrument: str, layers: dict[str, np.ndarray]) -> bool:
    return bool(layers) and list(found.columns.get(instrument, {})) == list(layers)


def _quantiles(values: np.ndarray) -> np.ndarray:
    """Five numbers over the channels: (epochs, channels) to (epochs, 5)."""
    with np.errstate(invalid="ignore"):
        return np.quantile(values, [0, 0.25, 0.5, 0.75, 1], axis=1).T
