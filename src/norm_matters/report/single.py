"""The page of one run: `report.html` in its folder."""

import shlex
from pathlib import Path
from typing import Any

import numpy as np

from norm_matters.record.files import write_file
from norm_matters.report.instruments import view_instruments
from norm_matters.report.page import Html, cards, facts_table, note, numbers_table, page, section, tag
from norm_matters.report.plots import Curve, Panel, Series, draw, drawable, legend, value_text
from norm_matters.report.read import RunFiles, best_epoch, not_finite, read_run, show

_TRAIN = Series("training", 0)
_VAL = Series("validation", 1)
_OTHER = Series("", 6)
_COLUMN_TITLES = {
    "train_loss": "training loss",
    "val_loss": "validation loss",
    "train_error1": "training error@1 (%)",
    "val_error1": "validation error@1 (%)",
    "train_error5": "training error@5 (%)",
    "val_error5": "validation error@5 (%)",
    "lr": "learning rate",
    "seconds": "seconds",
    "images_per_second": "images per second",
}


def write_report(run: Path) -> Path:
    """Write the page of a run from its files; any state of the run will do, also before the first epoch has ended.

    Args:
        run: the run folder.

    Returns:
        the page, `run/report.html`, replaced in one go.

    Raises:
        UserError: the folder is no run.
        StorageError: the page cannot be written.
    """
    target = run / "report.html"
    write_file(target, run_page(read_run(run)))
    return target


def run_page(run: RunFiles) -> bytes:
    """Return the page of a run: its figures, curves, config and provenance."""
    panels = [panel for panel in _panels(run) if drawable(panel)]
    instruments = view_instruments(run.folder)
    elements, scripts = draw([*panels, *instruments.panels])
    plots = tag("div", *elements[: len(panels)], class_="panels")
    curves = [section("Curves", legend([_TRAIN, _VAL]), plots)] if panels else []
    curves += instruments.sections(elements[len(panels) :])
    facts = tag(
        "div",
        section("Config", facts_table((key, show(value)) for key, value in run.config.items())),
        section("Provenance", facts_table((key, _show_fact(key, value)) for key, value in run.provenance.items())),
        class_="columns",
    )
    return page(run.name, _subtitle(run), [*_summary(run), *curves, *_tables(run), facts], scripts)


def _subtitle(run: RunFiles) -> str:
    """What was trained, on what, and how far it is."""
    config = run.config
    norm = show(config["model.norm"]) if config.get("model.norm") else "its own norms"
    if config.get("model.weight_norm"):
        norm += f" and {show(config['model.weight_norm'])} weights"
    done, planned = run.last_epoch, run.planned_epochs
    progress = f"{done} of {planned} epochs" if planned else f"{done} epoch{'s' * (done != 1)}"
    val = run.provenance.get("data.val")
    return (
        f"{show(config.get('model.name'))} with {norm} on {show(config.get('data.name'))}, "
        f"seed {show(config.get('seed'))} · {progress}{f' · validation: {show(val)}' if val else ''}"
    )


def _summary(run: RunFiles) -> list[Html]:
    """The figures one looks for first, and what is wrong with the run."""
    if not run.last_epoch:
        return [note("No epoch has ended yet: there is nothing to draw.")]
    columns, best = run.results, best_epoch(run)
    facts = [(f"Validation accuracy, last epoch ({run.last_epoch})", f"{100 - columns['val_error1'][-1]:.2f} %")]
    if best is not None:
        accuracy = 100 - np.nanmin(columns["val_error1"])
        facts.append((f"Validation accuracy, best epoch ({best})", f"{accuracy:.2f} %"))
    facts += [
        ("Validation loss, last epoch", value_text(columns["val_loss"][-1])),
        ("Time of all epochs", _duration(float(np.nansum(columns["seconds"])))),
        ("Images per second, last epoch", value_text(columns["images_per_second"][-1])),
    ]
    return [cards(facts), *map(note, [*not_finite(run), *_unreadable(run)])]


def _unreadable(run: RunFiles) -> list[str]:
    """A sentence on training images for which others stood in, if any; the provenance names them."""
    count = sum(key.startswith("unreadable_images.") and key.endswith(".image") for key in run.provenance)
    images = "1 training image" if count == 1 else f"{count} training images"
    return [f"{images} could not be read: others of the same class stood in."] if count else []


def _panels(run: RunFiles) -> list[Panel]:
    """All plots of the page; some may have nothing to show."""

    def curve(series: Series, column: str) -> Curve:
        return Curve(series, run.results["epoch"], run.results[column])

    def pair(title: str, metric: str) -> Panel:
        return Panel(title, [curve(_TRAIN, f"train_{metric}"), curve(_VAL, f"val_{metric}")])

    return [
        pair("Loss", "loss"),
        pair("Error@1 (%)", "error1"),
        pair("Error@5 (%)", "error5"),
        Panel("Learning rate", [curve(_OTHER, "lr")]),
        Panel("Training images per second", [curve(_OTHER, "images_per_second")]),
    ]


def _tables(run: RunFiles) -> list[Html]:
    """Last against best epoch, and every epoch."""
    if not run.last_epoch:
        return []
    titles = {column: title for column, title in _COLUMN_TITLES.items() if not np.isnan(run.results[column]).all()}
    epochs, best = run.results["epoch"].tolist(), best_epoch(run)
    rows = {epoch: [value_text(run.results[column][row]) for column in titles] for row, epoch in enumerate(epochs)}
    picked = [(f"last epoch ({run.last_epoch})", rows[run.last_epoch])]
    if best is not None:
        picked.append((f"best epoch ({best})", rows[best]))
    comparison = numbers_table(
        ["", *(heading for heading, _ in picked)],
        zip(titles.values(), *(values for _, values in picked), strict=True),
    )
    every = numbers_table(["epoch", *titles.values()], ([str(epoch), *values] for epoch, values in rows.items()))
    remark = tag("p", "Best: the lowest validation error@1, the first of equal ones.", class_="soft")
    return [section("Last and best epoch", comparison, remark), tag("details", tag("summary", "Every epoch"), every)]


def _show_fact(key: str, value: Any) -> str:
    """A fact of the provenance as text; commands as one would type them."""
    if key.rpartition(".")[2] == "command" and isinstance(value, list):
        return shlex.join(map(str, value))
    return show(value)


def _duration(seconds: float) -> str:
    """Seconds as `12.3 s`, `4 min 5 s` or `2 h 30 min`."""
    if seconds < 60 or not np.isfinite(seconds):
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"
