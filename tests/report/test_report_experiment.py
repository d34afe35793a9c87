"""The page of an experiment: curves that its tables ask for, and long tables folded."""

from pathlib import Path

import numpy as np
import pytest

from norm_matters.report.experiment import (
    ArmView,
    ExperimentView,
    TableView,
    TestView,
    _table_panels,
    write_experiment_page,
)
from norm_matters.report.plots import Series

ROWS = [
    {"arm": arm, "epoch": epoch, "layer": layer, "angle": value * epoch}
    for arm, values in (("on", (1.0, 2.0, 9.0)), ("off", (4.0, 4.0, 4.0)))
    for epoch in (1, 2)
    for layer, value in enumerate(values)
]
TABLE = TableView("Angles", "A note.", ROWS, {"angle": "Angle, median over the layers"})


def test_a_tables_curve_is_the_median_of_an_arms_rows_at_each_epoch() -> None:
    (panel,) = _table_panels(TABLE, [Series("on", 0), Series("off", 1), Series("not run", 2)])
    assert [curve.series.label for curve in panel.curves] == ["on", "off"]
    on, off = panel.curves
    np.testing.assert_array_equal(on.epochs, [1, 2])
    np.testing.assert_array_equal(on.values, [2.0, 4.0])
    np.testing.assert_array_equal(off.values, [4.0, 8.0])
    assert _table_panels(TableView("Angles", "", ROWS), [Series("on", 0)]) == []


@pytest.mark.parametrize(("copies", "folded"), [(1, False), (4, True)])
def test_the_page_draws_it_and_folds_long_tables(tmp_path: Path, copies: int, folded: bool) -> None:
    test = TestView("C-1", "off less on", "paired t", 5, -1.0, -2.0, -0.5, "points", "worse", "0.01", "", 0.5)
    view = ExperimentView(
        title="wd, small scale",
        question="Does it?",
        claims=[],
        tests=[test],
        arms=[ArmView(name, name, "", "5 done", None) for name in ("on", "off")],
        tables=[TableView(TABLE.title, TABLE.note, ROWS * copies, TABLE.curves)],
        differs=[],
        setup={},
        provenance={},
    )
    write_experiment_page(tmp_path / "page.html", view)
    text = (tmp_path / "page.html").read_text()
    assert "<span>Angle, median over the layers</span>" in text
    assert ("<summary>48 rows</summary>" in text) == folded
    header = text[text.index("<th") : text.index("</tr>", text.index("<th"))]
    assert header.index("test") < header.index("comes to") < header.index("estimate, interval")
