"""What the page of a run shows of its instruments, whatever state their files are in."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from bokeh.models import ColumnDataSource, Range1d

from norm_matters.record.instruments import Measurements, append_measurements, write_layout
from norm_matters.report import write_report
from norm_matters.report.instruments import thinned, view_instruments
from norm_matters.report.layers import LayerMap, LayerPanel, slider

TITLES = ["Weight norm per channel", "Angle per step (radians)", "Effective learning rate", "Sigma"]
MAP = "Angle per step of all layers, median over channels (radians)"
INPUTS = ["Largest input", "Largest sum of squares of inputs", "Largest sum of absolute inputs"]


def body(page: Path) -> str:
    """The page without bokeh's own code, in which any word can occur."""
    return page.read_text().partition("<script>")[0].partition("</style>")[2]


def source_of(panel: LayerPanel | LayerMap) -> ColumnDataSource:
    return panel.plot(Range1d()).select_one(ColumnDataSource)


def test_the_page_shows_what_was_measured(make_run: Callable[..., Path], add_measurements) -> None:
    run = make_run("run", [{}] * 3)
    add_measurements(run, [1, 2, 3])
    text = body(write_report(run))
    for title in [*TITLES, MAP]:
        assert f"<span>{title}</span>" in text
    assert text.count("<figure") == 5 + 5
    assert "Layer <output>1: conv1</output> of 2" in text
    assert "Norm <output>1: bn1</output> of 1" in text
    assert "can be scaled" not in text


def test_the_page_shows_inputs_and_invariance_where_they_were_measured(make_run, add_measurements) -> None:
    run = make_run("run", [{}] * 3)
    add_measurements(run, [1, 2], inputs=True)
    with (run / "instruments.f32").open("r+b") as file:
        file.seek(-4, 2)
        file.write(np.float32(np.nan).tobytes())  # of fc, in epoch 2
    text = body(write_report(run))
    for title in [*INPUTS, "Share of inputs outside float16"]:
        assert f"<span>{title}</span>" in text
    assert "Weights that can be scaled without changing the output (epoch 2): conv1." in text


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"a": 0.0, "b": 1e-3, "c": 1.0}, "all but c."),
        ({"a": 0.0, "b": 1.0}, ": a."),
        ({"a": 0.0}, ": all."),
        ({"a": 1.0, "b": np.nan}, ": none."),
    ],
)
def test_the_shorter_list_of_invariant_weights_is_told(tmp_path: Path, changes: dict[str, float], text: str) -> None:
    write_layout(tmp_path, [("scale_change", layer, 1) for layer in changes])
    append_measurements(tmp_path, 1, np.array([2.0] * len(changes)))
    append_measurements(tmp_path, 2, np.array(list(changes.values())))
    (line,) = view_instruments(tmp_path).notes
    assert text in line


def test_a_run_without_measurements_has_no_such_section(make_run, add_measurements) -> None:
    run = make_run("run", [{}])
    assert "Instruments" not in body(write_report(run))
    add_measurements(run, [])
    assert "Instruments" not in body(write_report(run))


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0, -1.0])
@pytest.mark.parametrize("epochs", [[1], [2, 5]])
def test_any_values_make_a_page(make_run, add_measurements, value: float, epochs: list[int]) -> None:
    run = make_run("run", [{}] * 5)
    add_measurements(run, epochs, inputs=True, value=value)
    text = body(write_report(run))
    assert ("<span>Sigma</span>" in text) == np.isfinite(value)
    assert MAP not in text


def test_measurements_before_the_first_row_of_the_table_make_a_page(make_run, add_measurements) -> None:
    run = make_run("run")
    add_measurements(run, [1])
    assert "<span>Sigma</span>" in body(write_report(run))


@pytest.mark.parametrize(("file", "content"), [("instruments.f32", b"123"), ("instruments.json", b"<b>")])
def test_damage_is_said_on_the_page_and_does_not_prevent_it(make_run, add_measurements, file, content) -> None:
    run = make_run("run", [{}])
    add_measurements(run, [1])
    (run / file).write_bytes(content)
    text = body(write_report(run))
    assert "What the instruments measured cannot be shown: " in text
    assert file in text
    assert text.count("<figure") == 5


def test_other_instruments_do_no_harm(make_run) -> None:
    run = make_run("run", [{}])
    write_layout(run, [("novelty", "a", 2), ("angle", "b", 5)])
    append_measurements(run, 1, np.arange(7.0))
    assert f"<span>{MAP}</span>" in body(write_report(run))


def test_a_panel_has_the_values_of_every_layer_and_shows_the_first(make_run, add_measurements) -> None:
    run = make_run("run", [{}])
    add_measurements(run, [1, 2, 4])
    norms, angles = view_instruments(run).panels[:2]
    data = source_of(norms).data
    # The columns of a row are 1, 2, 3 ... millionths of the epoch: conv1 has 1, 2, 3, and fc 4, 5, 6, 7.
    np.testing.assert_allclose(data["value-0"], 1e-6 * np.array([2, 4, 8]))
    np.testing.assert_allclose(data["value-1"], 1e-6 * 5.5 * np.array([1, 2, 4]))
    np.testing.assert_allclose(data["low1-1"], 1e-6 * 4 * np.array([1, 2, 4]))
    np.testing.assert_allclose(data["low0-1"], 1e-6 * 4.75 * np.array([1, 2, 4]))
    np.testing.assert_allclose(data["high0-1"], 1e-6 * 6.25 * np.array([1, 2, 4]))
    np.testing.assert_allclose(data["high1-1"], 1e-6 * 7 * np.array([1, 2, 4]))
    for name in ("value", "low0", "high0", "low1", "high1"):
        np.testing.assert_array_equal(data[name], data[f"{name}-0"])
    data = source_of(angles).data
    # Effective rates are 8 and 9; angles 10 to 14 and 15 to 19; whole layers' 20 and 21; equilibria 22 and 23.
    np.testing.assert_allclose(data["value-1"], 1e-6 * 17 * np.array([1, 2, 4]))
    np.testing.assert_allclose(data["beside-1"], 1e-6 * 23 * np.array([1, 2, 4]))
    cells = source_of(view_instruments(run).panels[-1]).data
    np.testing.assert_allclose(cells["value"], 1e-6 * np.array([12, 24, 48, 17, 34, 68]))
    assert list(cells["layer"]) == ["conv1"] * 3 + ["fc"] * 3
    assert list(cells["epoch"]) == [1, 2, 4] * 2
    # A cell reaches back to the epoch before.
    assert list(cells["x"] - cells["width"] / 2) == [0.5, 1.5, 2.5] * 2
    assert list(cells["x"] + cells["width"] / 2) == [1.5, 2.5, 4.5] * 2


def test_a_logarithmic_panel_leaves_out_what_it_cannot_show() -> None:
    values = np.array([[1.0, 1e-3]])
    panel = LayerPanel("a", "b", np.array([1, 2]), values, [np.stack([values - 1e-3, values], -1)])
    assert "logarithmic" in panel.heading()
    data = source_of(panel).data
    np.testing.assert_array_equal(np.isnan(data["low0"]), [False, True])
    linear = LayerPanel("a", "b", np.array([1, 2]), np.array([[1.0, 0.0]]))
    assert "logarithmic" not in linear.heading()
    np.testing.assert_array_equal(source_of(linear).data["value"], [1, 0])


@pytest.mark.slow
def test_a_long_run_of_a_deep_network_makes_a_page_of_bounded_size(make_run, add_measurements) -> None:
    sizes = {}
    for name, layers, epochs in (("small", 2, 2), ("resnet50", 54, 90), ("huge", 160, 150)):
        run = make_run(name, [{}])
        add_measurements(run, range(1, epochs + 1), weights=[f"layer{i}" for i in range(layers)])
        sizes[name] = write_report(run).stat().st_size
    assert sizes["resnet50"] < sizes["small"] + 700_000
    assert sizes["huge"] < sizes["small"] + 1_500_000


def test_thinning_keeps_the_ends_and_the_values() -> None:
    found = Measurements(np.arange(1, 101), {"a": {"b": np.arange(100.0)[:, None]}})
    assert thinned(found, 100) is found
    few = thinned(found, 7)
    assert len(few.epochs) == 7
    assert (few.epochs[0], few.epochs[-1]) == (1, 100)
    np.testing.assert_array_equal(few.columns["a"]["b"][:, 0], few.epochs - 1)


def test_names_are_escaped(make_run, add_measurements) -> None:
    hostile = "\"'><script>alert(1)</script>"
    run = make_run("run", [{}])
    add_measurements(run, [1], weights=[hostile, "b"], norms=[hostile], inputs=True)
    text = write_report(run).read_text()
    assert hostile not in text
    assert text.count("<script>") == text.count("</script>") == 3
    assert "&lt;script&gt;" in slider("key", "Layer", [hostile])
