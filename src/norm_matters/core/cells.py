"""Cells of CSV files that people open in spreadsheets."""

from typing import Any

_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def plain_cell(value: Any) -> Any:
    """A value for a cell: a text that a spreadsheet would take for a formula, and run, gets a `'` before it.

    Names of classes, files and runs may be anybody's. Numbers stay as they are.
    """
    return f"'{value}" if isinstance(value, str) and value.startswith(_FORMULA) else value
