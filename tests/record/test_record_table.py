"""results.csv: whole lines, numbers that read back exactly, and a resume that repeats no epoch."""

import contextlib
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from norm_matters.core.errors import StorageError, UserError
from norm_matters.record import COLUMNS, TIMING_COLUMNS, append_row, read_table, trim_table

HEADER = (
    "epoch,step,train_loss,val_loss,train_error1,val_error1,train_error5,val_error5,lr,seconds,images_per_second,"
    "val_seconds,loss_scale,skipped_steps,rejected_updates\n"
)


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "results.csv"
    for epoch in (1, 2, 3):
        append_row(path, {"epoch": epoch, "step": 10 * epoch, "train_loss": 0.1 * epoch, "val_error5": None})
    return path


def test_the_header_comes_once_and_in_the_promised_order(table):
    lines = table.read_text().splitlines(keepends=True)
    assert lines == [
        HEADER,
        "1,10,0.1,,,,,,,,,,,,\n",
        "2,20,0.2,,,,,,,,,,,,\n",
        "3,30,0.30000000000000004,,,,,,,,,,,,\n",
    ]
    assert set(TIMING_COLUMNS) < set(COLUMNS)


@settings(deadline=None, max_examples=50)
@given(rows=st.lists(st.dictionaries(st.sampled_from(COLUMNS), st.none() | st.integers() | st.floats()), max_size=4))
def test_numbers_read_back_exactly(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("table") / "results.csv"
    for row in rows:
        append_row(path, row)
    expected = [{column: row.get(column) for column in COLUMNS} for row in rows]
    assert [{c: repr(v) for c, v in row.items()} for row in read_table(path)] == [
        {c: repr(v) for c, v in row.items()} for row in expected
    ]


def test_numpy_numbers_and_non_finite_ones(tmp_path):
    path = tmp_path / "results.csv"
    append_row(path, {"epoch": np.int64(1), "train_loss": np.float64(0.1), "val_loss": math.nan, "lr": np.float32(0.1)})
    (row,) = read_table(path)
    assert row["epoch"] == 1
    assert type(row["epoch"]) is int
    assert row["train_loss"] == 0.1
    assert row["val_loss"] is not None
    assert math.isnan(row["val_loss"])
    assert row["lr"] == float(np.float32(0.1))


def test_an_unknown_column_is_our_mistake(tmp_path):
    with pytest.raises(AssertionError, match="accuracy"):
        append_row(tmp_path / "results.csv", {"accuracy": 1})
    assert not (tmp_path / "results.csv").exists()


@pytest.mark.parametrize("epochs", [0, 1, 2, 3, 9])
def test_trimming_keeps_the_epochs_of_the_checkpoint(table, epochs):
    lines = table.read_text().splitlines(keepends=True)
    trim_table(table, epochs)
    assert table.read_text().splitlines(keepends=True) == lines[: 1 + epochs]


def test_a_table_cut_anywhere_reads_and_resumes(table):
    """A kill leaves any prefix: complete rows are read, the rest is dropped, and appending goes on."""
    whole = table.read_bytes()
    for length in range(0, len(whole) + 1, 3):
        table.write_bytes(whole[:length])
        rows = read_table(table)
        assert len(rows) == max(0, whole[:length].count(b"\n") - 1)
        trim_table(table, 3)
        for epoch in range(len(rows) + 1, 4):
            append_row(table, {"epoch": epoch, "step": 10 * epoch, "train_loss": 0.1 * epoch})
        assert table.read_bytes() == whole


def test_a_missing_table_has_no_rows(tmp_path):
    path = tmp_path / "results.csv"
    assert read_table(path) == []
    trim_table(path, 3)
    assert not path.exists()


@pytest.mark.parametrize("line", ["4,40\n", "4,x" + "," * 12 + "\n", "\x00\n", "\n", "=cmd()" + "," * 13 + "\n"])
def test_a_damaged_line_is_named(table, line):
    with table.open("a") as file:
        file.write(line)
    for use in (read_table, lambda path: trim_table(path, 3)):
        with pytest.raises(UserError, match=r"results\.csv, line 5: ") as caught:
            use(table)
        assert len(caught.value.problems[0].splitlines()) == 1


@settings(deadline=None, max_examples=100)
@given(st.binary(max_size=60))
def test_any_file_is_read_or_refused(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("table") / "results.csv"
    path.write_bytes(b"epoch,step\n" + data + b"\n")
    with contextlib.suppress(UserError):
        for row in read_table(path):
            assert set(row) == {"epoch", "step"}


def test_another_versions_table_is_never_mixed(tmp_path):
    path = tmp_path / "results.csv"
    path.write_text("epoch,step,new\n1,2,3\n")
    assert read_table(path) == [{"epoch": 1, "step": 2, "new": 3}]
    with pytest.raises(UserError, match="other columns"):
        trim_table(path, 1)


def test_a_folder_in_its_place_is_a_storage_error(tmp_path):
    with pytest.raises(StorageError, match="cannot read"):
        read_table(tmp_path)
    with pytest.raises(StorageError, match="cannot write"):
        append_row(tmp_path, {"epoch": 1})
