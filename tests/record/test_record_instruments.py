"""What the instruments measured, on the disk: reads back, survives a cut, and names its damage."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from norm_matters.core.errors import StorageError, UserError
from norm_matters.record.instruments import (
    LAYOUT_FILE,
    VALUES_FILE,
    append_measurements,
    read_measurements,
    trim_measurements,
    write_layout,
)

COLUMNS = [("weight_norm", "conv1", 3), ("weight_norm", "fc", 2), ("angle", 'a "quoted" lÅyer', 1)]
ROWS = np.array([[1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 11, math.nan], [0.1, math.inf, -1, 1e-30, 0, 1]])


@pytest.fixture
def run(tmp_path: Path) -> Path:
    write_layout(tmp_path, COLUMNS)
    for epoch, row in enumerate(ROWS, start=1):
        append_measurements(tmp_path, epoch, row)
    return tmp_path


def test_what_is_appended_reads_back(run: Path) -> None:
    found = read_measurements(run)
    assert found is not None
    assert found.epochs.tolist() == [1, 2, 3]
    assert [(instrument, *layers) for instrument, layers in found.columns.items()] == [
        ("weight_norm", "conv1", "fc"),
        ("angle", 'a "quoted" lÅyer'),
    ]
    expected = ROWS.astype(np.float32)
    np.testing.assert_array_equal(found.columns["weight_norm"]["conv1"], expected[:, :3])
    np.testing.assert_array_equal(found.columns["weight_norm"]["fc"], expected[:, 3:5])
    np.testing.assert_array_equal(found.columns["angle"]['a "quoted" lÅyer'], expected[:, 5:])


def test_the_file_is_plain_little_endian_float32(run: Path) -> None:
    data = (run / VALUES_FILE).read_bytes()
    assert len(data) == 3 * 7 * 4
    np.testing.assert_array_equal(np.frombuffer(data, "<f4").reshape(3, 7)[:, 1:], ROWS.astype(np.float32))
    layout = json.loads((run / LAYOUT_FILE).read_text())
    assert [tuple(column.values()) for column in layout["columns"]] == COLUMNS
    assert sorted(path.name for path in run.iterdir()) == [VALUES_FILE, LAYOUT_FILE]


def test_a_run_without_instruments_has_no_measurements(tmp_path: Path) -> None:
    assert read_measurements(tmp_path) is None
    trim_measurements(tmp_path, 0)
    assert list(tmp_path.iterdir()) == []


def test_a_run_before_its_first_epoch_has_empty_ones(tmp_path: Path) -> None:
    write_layout(tmp_path, COLUMNS)
    found = read_measurements(tmp_path)
    assert found is not None
    assert len(found.epochs) == 0
    assert found.columns["weight_norm"]["fc"].shape == (0, 2)


def test_instruments_that_measure_nothing_have_rows_too(tmp_path: Path) -> None:
    write_layout(tmp_path, [])
    append_measurements(tmp_path, 1, np.array([]))
    found = read_measurements(tmp_path)
    assert found is not None
    assert found.epochs.tolist() == [1]
    assert found.columns == {}


def test_numbers_beyond_float32_are_infinite(tmp_path: Path) -> None:
    write_layout(tmp_path, [("a", "b", 1)])
    append_measurements(tmp_path, 1, np.array([1e300]))
    found = read_measurements(tmp_path)
    assert found is not None
    assert found.columns["a"]["b"] == np.inf


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 3 * 28), st.integers(0, 4))
def test_trimmed_rows_can_be_appended_to(tmp_path_factory: pytest.TempPathFactory, cut: int, epochs: int) -> None:
    """Killed after any byte, resumed from a checkpoint of any epoch, a run ends with an undisturbed one's bytes."""
    folder = tmp_path_factory.mktemp("run")
    write_layout(folder, COLUMNS)
    for epoch, row in enumerate(ROWS, start=1):
        append_measurements(folder, epoch, row)
    whole = (folder / VALUES_FILE).read_bytes()
    (folder / VALUES_FILE).write_bytes(whole[:cut])
    trim_measurements(folder, epochs)
    kept = min(epochs, cut // 28)
    assert (folder / VALUES_FILE).read_bytes() == whole[: 28 * kept]
    write_layout(folder, COLUMNS)
    for epoch, row in enumerate(ROWS[kept:], start=kept + 1):
        append_measurements(folder, epoch, row)
    assert (folder / VALUES_FILE).read_bytes() == whole


def test_a_layout_is_replaced_before_rows_only(run: Path) -> None:
    with pytest.raises(UserError, match="not the layout of this run"):
        write_layout(run, COLUMNS[:2])
    write_layout(run, COLUMNS)
    trim_measurements(run, 0)
    write_layout(run, COLUMNS[:2])
    append_measurements(run, 1, ROWS[0, :5])
    found = read_measurements(run)
    assert found is not None
    assert list(found.columns) == ["weight_norm"]


def columns_text(*columns) -> str:
    return json.dumps({"format": 1, "columns": list(columns)})


COLUMN = {"instrument": "a", "layer": "b", "size": 6}


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (VALUES_FILE, b"x" * 27, "cut short: 27 bytes"),
        (VALUES_FILE, np.arange(14, dtype="<f4").tobytes(), "damaged: the epochs"),
        (VALUES_FILE, np.full(7, np.nan, "<f4").tobytes(), "damaged: the epochs"),
        (VALUES_FILE, np.full(14, 1, "<f4").tobytes(), "damaged: the epochs"),
        (VALUES_FILE, np.full(7, 1.5, "<f4").tobytes(), "damaged: the epochs"),
        (LAYOUT_FILE, None, "is missing"),
        (LAYOUT_FILE, b"{", "is damaged"),
        (LAYOUT_FILE, b"\xff", "is damaged"),
        pytest.param(LAYOUT_FILE, b"[" * 100_000, "is damaged", id="deep"),
        (LAYOUT_FILE, b"[]", "is damaged"),
        (LAYOUT_FILE, b'{"format": 2, "columns": []}', "of format 2"),
        (LAYOUT_FILE, columns_text([1, 2, 3]).encode(), "is damaged"),
        (LAYOUT_FILE, columns_text(COLUMN | {"size": -1}).encode(), "a column is not"),
        (LAYOUT_FILE, columns_text(COLUMN | {"size": True}).encode(), "a column is not"),
        (LAYOUT_FILE, columns_text(COLUMN | {"layer": None}).encode(), "a column is not"),
        (LAYOUT_FILE, columns_text(COLUMN | {"size": 3}, COLUMN | {"size": 3}).encode(), "occurs twice"),
        (LAYOUT_FILE, columns_text(COLUMN | {"size": 2**62}).encode(), "a column is not"),
        (LAYOUT_FILE, columns_text(COLUMN | {"size": 7}).encode(), f"{VALUES_FILE} is cut short"),
    ],
)
def test_damage_is_named_in_one_line(run: Path, file: str, content: bytes | None, message: str) -> None:
    (run / file).unlink()
    if content is not None:
        (run / file).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read_measurements(run)
    assert str(caught.value).startswith(str(run / "instruments."))
    assert len(str(caught.value).splitlines()) == 1


def test_what_cannot_be_read_is_a_storage_error(run: Path) -> None:
    (run / VALUES_FILE).unlink()
    (run / VALUES_FILE).mkdir()
    with pytest.raises(StorageError, match=VALUES_FILE):
        read_measurements(run)
