"""Small guards: names that stay in their folder, files that are files, cells that are no formulas."""

import os
from pathlib import Path

import pytest

from norm_matters.core.cells import plain_cell
from norm_matters.core.config import load_config
from norm_matters.core.errors import UserError
from norm_matters.core.names import is_plain_name
from norm_matters.core.reading import read_regular

HOSTILE_NAMES = [
    "..",
    ".",
    "",
    "../x",
    "a/../../x",
    "/etc/passwd",
    "a\\b",
    "a\0b",
    "a\nb",
    "x" * 300,
    "\u202etxt.exe",
    "a\u202eb",
    "naïve",
    "-rf",
    ".hidden",
    "CON",
    "nul.txt",
    "com1",
    "Lpt9.a.b",
    "run.",
    "a b",
    "$(touch x)",
    "~root",
    "C:x",
    "a*",
]


@pytest.mark.parametrize("name", HOSTILE_NAMES, ids=ascii)
def test_a_hostile_name_names_no_run(name: str) -> None:
    assert not is_plain_name(name)
    with pytest.raises(UserError, match=r"^name: value"):
        load_config(options={"name": name})


@pytest.mark.parametrize("name", ["a", "resnet20-topk-k10-cifar10-s0", "0", "console", "x" * 128, "a.b_c-d", "nulls"])
def test_a_plain_name_is_taken(name: str) -> None:
    assert is_plain_name(name)
    assert load_config(options={"name": name}).name == name


def test_regular_files_are_read_up_to_a_limit(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    assert read_regular(path, limit=5) == b"12345"
    with pytest.raises(ValueError, match="5 bytes; 4 are the limit"):
        read_regular(path, limit=4)
    with pytest.raises(FileNotFoundError):
        read_regular(tmp_path / "none", limit=1)
    with pytest.raises(IsADirectoryError):
        read_regular(tmp_path, limit=1)


@pytest.mark.timeout(10)
def test_pipes_and_devices_are_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zero").symlink_to("/dev/zero")
    for name in ("pipe", "zero"):
        with pytest.raises(ValueError, match="no regular file"):
            read_regular(tmp_path / name, limit=100)
    # A hole of a terabyte takes no memory.
    with (tmp_path / "hole").open("wb") as stream:
        stream.truncate(2**40)
    with pytest.raises(ValueError, match="limit"):
        read_regular(tmp_path / "hole", limit=2**30)


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1"])
def test_formulas_are_text_in_a_cell(text: str) -> None:
    assert plain_cell(text) == f"'{text}"


@pytest.mark.parametrize("value", ["cat", "", "a=1", -1, -0.5, None, True])
def test_other_cells_stay(value) -> None:
    assert plain_cell(value) is value
