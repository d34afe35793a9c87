"""What reaches the plots: gaps where values are not finite, dots where a line would not be seen, data never as code."""

import math
from dataclasses import replace

import numpy as np
import pytest

from norm_matters.report.plots import Curve, Panel, Series, draw, drawable, legend, value_text
from norm_matters.report.plots import _plot as plot_panel

NAN = math.nan


def a_panel(*values: list[float]) -> Panel:
    curves = [
        Curve(Series(f"run {index}", index), np.arange(1, len(some) + 1), np.array(some, float))
        for index, some in enumerate(values)
    ]
    return Panel("Loss", curves)


def sources(panel: Panel) -> list[dict[str, list]]:
    """The data of each line, as bokeh has them."""
    from bokeh.models import Line, Range1d

    plot = plot_panel(panel, Range1d(start=0, end=9))
    lines = [renderer for renderer in plot.renderers if renderer.name and isinstance(renderer.glyph, Line)]
    return [line.data_source.data for line in lines]


def test_values_that_are_not_finite_are_gaps() -> None:
    (data,) = sources(a_panel([1.0, math.inf, NAN, -math.inf, 2.0]))
    np.testing.assert_equal(data["value"], [1.0, NAN, NAN, NAN, 2.0])
    assert list(data["text"]) == [f"run 0: {text}" for text in ("1", "inf", "nan", "-inf", "2")]


def test_few_points_have_dots_and_of_many_only_the_lonely_ones() -> None:
    (data,) = sources(a_panel([1.0, 2.0]))
    np.testing.assert_equal(data["dot"], [1.0, 2.0])
    many = [1.0] * 200
    many[1] = many[10] = many[12] = NAN
    (data,) = sources(a_panel(many))
    assert np.flatnonzero(np.isfinite(data["dot"])).tolist() == [0, 11]


@pytest.mark.parametrize(
    ("values", "log"), [([0.1, 0.001], True), ([0.1, 0.0], False), ([2.0, 1.0], False), ([1.0, NAN, 1e9], True)]
)
def test_orders_of_magnitude_have_a_logarithmic_axis(values: list[float], log: bool) -> None:
    elements, _ = draw([a_panel(values)])
    assert ("(logarithmic)" in elements[0]) == log


def test_a_linear_panel_stays_linear() -> None:
    elements, _ = draw([replace(a_panel([0.1, 90.0]), linear=True)])
    assert "(logarithmic)" not in elements[0]


def test_only_finite_values_are_drawable() -> None:
    assert drawable(a_panel([NAN], [NAN, 1.0]))
    assert not drawable(a_panel([NAN], [math.inf]))
    assert not drawable(a_panel())
    assert draw([]) == ([], [])


def test_all_plots_share_one_axis() -> None:
    elements, (_, script) = draw([a_panel([1.0]), a_panel([1.0, 2.0, 3.0])])
    assert len(elements) == 2
    assert script.count('"name":"Range1d"') == 1


def test_a_hostile_label_reaches_a_script_as_data_only() -> None:
    label = "</script><script>alert('1')//`${1}\\"
    panel = Panel("Loss", [Curve(Series(label, 0), np.array([1]), np.array([1.0]))])
    _, (_, script) = draw([panel])
    assert "</script" not in script
    assert "alert('" not in script
    assert "</script" not in legend([Series(label, 0)])


def test_series_can_be_told_apart() -> None:
    series = [Series("", index) for index in range(28)]
    assert len({(item.colour, item.dash) for item in series}) == 28
    assert len({item.swatch() for item in series}) == 28


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.123456, "0.1235"),
        (1e-5, "1e-05"),
        (12345.6, "12,346"),
        (1e308, "1e+308"),
        (NAN, "nan"),
        (math.inf, "inf"),
        (-0.5, "-0.5"),
    ],
)
def test_values_have_four_digits(value: float, text: str) -> None:
    assert value_text(value) == text
