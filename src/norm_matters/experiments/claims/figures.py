"""The paper's curves, read from its figures (`figures.json`, which names its source)."""

import json
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np

from norm_matters.experiments.claims.recipe import PaperCurve


@cache
def _figures() -> dict[str, Any]:
    return json.loads((files("norm_matters.experiments.claims") / "figures.json").read_text())


def source() -> str:
    """Where the curves come from, and how exact they are."""
    return _figures()["source"]


def paper_curve(curve: PaperCurve) -> tuple[np.ndarray, np.ndarray]:
    """A curve of the paper.

    Returns:
        (n,) epochs, counted from 1, and (n,) accuracy in percent; NaN where the curve is hidden in the figure.
    """
    found = _figures()[curve.figure][curve.series]
    # Vector figures give two lists, figures of pixels pairs that count epochs from 0.
    if isinstance(found, dict):
        epochs, values = np.array(found["epoch"], int), np.array(found["value"], float)
    else:
        epochs = np.array([epoch for epoch, _ in found], int) + 1
        values = np.array([np.nan if value is None else value for _, value in found], float)
    return epochs, 100 - values if curve.figure.endswith("_error") else values
