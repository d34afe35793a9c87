"""Effective learning rates and angles of every layer, by arm: from the instruments of an experiment's runs."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from norm_matters.core.errors import UserError
from norm_matters.experiments.claims.recipe import Evidence, Table
from norm_matters.record.instruments import Measurements, read_measurements

INSTRUMENTS: Mapping[str, str] = {
    "effective_lr": "lr / ((1 - m) |w|^2) of the layer, at the last step of the epoch, corrections included",
    "layer_angle": "by which the layer's weight turns per step, in radians",
    "equilibrium": "the angle that decay tends to",
    "weight_norm": "of the whole layer",
}
"""Column of the table -> what it is."""


def motion_table(evidence: Evidence) -> Table:
    """A row per arm, epoch and layer: means over the seeds, in the logarithm, of what `INSTRUMENTS` names.

    Runs without instruments, or whose measurements are damaged, are left out.
    """
    rows = []
    for arm, runs in evidence.runs.items():
        found = [each for run in runs.values() if run.rows and (each := measurements_of(run.folder)) is not None]
        whole = [each for each in found if len(each.epochs) == evidence.epochs]
        if not whole:
            continue
        series = {
            name: {layer: _mean([_values(each, name, layer) for each in whole]) for layer in _layers(whole[0])}
            for name in INSTRUMENTS
        }
        rows += [
            {
                "arm": arm,
                "epoch": int(epoch),
                "layer": layer,
                "seeds": len(whole),
                **{name: float(f"{series[name][layer][index]:.5g}") for name in INSTRUMENTS},
            }
            for index, epoch in enumerate(whole[0].epochs)
            for layer in _layers(whole[0])
        ]
    note = "; ".join(f"{name}: {what}" for name, what in INSTRUMENTS.items())
    return Table(
        "motion",
        "Effective learning rates and angles by layer",
        rows,
        f"Geometric means over the seeds. {note}.",
        curves={
            "effective_lr": "Effective learning rate, median over the layers",
            "layer_angle": "Angle per step (radians), median over the layers",
            "weight_norm": "Norm of a layer's weight, median over the layers",
        },
    )


def measurements_of(folder: Path) -> Measurements | None:
    """What the instruments of a run measured; None where there is nothing, or it is damaged."""
    try:
        return read_measurements(folder)
    except UserError:
        return None


def _layers(measured: Measurements) -> list[str]:
    return list(measured.columns.get("effective_lr", {}))


def _values(measured: Measurements, instrument: str, layer: str) -> np.ndarray:
    """(epochs,) of one instrument; norms of channels are joined to that of the layer."""
    values = measured.columns[instrument][layer].astype(np.float64)
    return np.sqrt(np.square(values).sum(1))


def _mean(values: list[np.ndarray]) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.exp(np.mean(np.log(values), axis=0))
