"""Draws docs/paper/EXPERIMENT.png from the numbers in results/claims: `python docs/paper_plots.py [EXPERIMENT ...]`.

Three plots: test accuracy by epoch, the same less the baseline's (pairs of the same seed; mean, and the band from
minimum to maximum), and the differences that the claims are decided by, with their intervals. Where arms are norms at
batch sizes: accuracy and differences by batch size. Needs chromium and chromedriver.
"""

import argparse
import io
import sys
import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from bokeh.io.export import get_screenshot_as_png
from bokeh.layouts import row
from bokeh.models import BoxAnnotation, FactorRange, Range1d, Span
from paper import RESULTS, ROOT

from norm_matters.experiments.claims import RECIPES
from norm_matters.experiments.claims.evidence import RUNS_FILE, read_verdicts
from norm_matters.experiments.claims.recipe import LAST_QUARTER, Recipe
from norm_matters.record.files import make_folder, write_file
from norm_matters.report.plots import Series

sys.path.append(str(ROOT / "docs" / "norms"))
from plots import browser, finish, panel

FOLDER = ROOT / "docs" / "paper"
HEIGHT = 320


def curves(recipe: Recipe, scale: str) -> pd.DataFrame:
    """Test accuracy (percent): a row per epoch, a column per (arm, seed); of the runs with all their epochs."""
    runs = pd.read_csv(RESULTS / f"{recipe.id}-{scale}" / RUNS_FILE)
    table = runs.pivot_table(index="epoch", columns=["arm", "seed"], values="val_error1")
    return 100 - table.dropna(axis="columns")


def draw_bands(title: str, table: pd.DataFrame, arms: Sequence[Series], *, named: bool) -> Any:
    """A line per arm, the mean over its seeds, in a band from their minimum to their maximum; named: with a legend."""
    plot = panel(title, "epoch", height=HEIGHT)
    for series in arms:
        if series.label not in table.columns.get_level_values("arm"):
            continue
        values = table.xs(series.label, axis="columns", level="arm")
        plot.varea(values.index, values.min(axis=1), values.max(axis=1), color=series.colour, fill_alpha=0.15)
        line = {"color": series.colour, "line_dash": series.dash, "line_width": 2}
        name = {"legend_label": series.label} if named else {}
        plot.line(values.index, values.mean(axis=1), **line, **name)
    if named:
        finish(plot).legend[0].ncols = 3
    return plot


def draw_by_batch(recipe: Recipe, scale: str) -> Any:
    """Accuracy by batch size (mean, minimum and maximum over the seeds), a line per norm; and its differences."""
    table = curves(recipe, scale)
    # As the claims have it: the last quarter of the epochs.
    accuracy = table.iloc[round(LAST_QUARTER[0] * len(table)) :].mean()
    tests = decisive_tests(recipe, scale)
    norms = list(dict.fromkeys(arm.name.rpartition("-b")[0] for arm in recipe.arms))
    batches = sorted({int(arm.name.rpartition("-b")[2]) for arm in recipe.arms})
    base = norms[0]
    labels = FactorRange(factors=[str(batch) for batch in batches])
    shown = panel("test accuracy (%)", "images per step", height=HEIGHT, x_range=labels)
    less = panel(f"less that of {base} (points, 90% interval)", "images per step", height=HEIGHT, x_range=labels)
    # A few points are what matters; what loses half of them leaves the picture.
    less.y_range = Range1d(-10, 5)
    less.add_layout(BoxAnnotation(bottom=-recipe.margin, top=recipe.margin, fill_color="#e7ebee", level="underlay"))
    for index, norm in enumerate(norms):
        colour = Series(norm, index).colour
        places = [(str(batch), 0.12 * (index - (len(norms) - 1) / 2)) for batch in batches]
        values = [accuracy[f"{norm}-b{batch}"] for batch in batches]
        shown.segment(places, [min(each) for each in values], places, [max(each) for each in values], color=colour)
        shown.line(places, [each.mean() for each in values], color=colour, line_width=2, legend_label=norm)
        for place, batch in zip(places, batches, strict=True):
            if found := tests.get(f"{norm}-b{batch} less {base}-b{batch}"):
                less.segment([place], [found["low"]], [place], [found["high"]], color=colour, line_width=3)
                less.scatter([place], [found["estimate"]], size=8, color=colour)
    return row(finish(shown), less)


def decisive_tests(recipe: Recipe, scale: str) -> dict[str, Any]:
    """The comparisons of an experiment, those with a margin, by what they compare."""
    verdicts = [each for each in read_verdicts(RESULTS) if (each["experiment"], each["scale"]) == (recipe.id, scale)]
    return {test["what"]: test for each in verdicts for test in each["statistics"] if test["margin"] is not None}


def draw_differences(recipe: Recipe, scale: str) -> Any:
    """Each difference that a claim is decided by, with its interval; grey: within the margin."""
    tests = decisive_tests(recipe, scale)
    names = [name for name, test in tests.items() if test["low"] is not None]
    # The names stand on the left: 6 pixels a letter.
    size = {"width": 290 + 6 * max(map(len, names), default=0), "height": HEIGHT}
    plot = panel("differences (90% interval)", "points", y_range=FactorRange(factors=names[::-1]), **size)
    plot.add_layout(BoxAnnotation(left=-recipe.margin, right=recipe.margin, fill_color="#e7ebee", level="underlay"))
    plot.add_layout(Span(location=0, dimension="height", line_color="#8a97a3", line_width=1))
    for name in names:
        plot.line([tests[name]["low"], tests[name]["high"]], [name, name], color="#0072b2", line_width=3)
        plot.scatter([tests[name]["estimate"]], [name], size=8, color="#0072b2")
    return plot


def plots_of(recipe: Recipe, scale: str) -> Any:
    """The plots of an experiment, side by side."""
    if all("-b" in arm.name for arm in recipe.arms):
        return draw_by_batch(recipe, scale)
    table = curves(recipe, scale)
    arms = [Series(arm.name, index) for index, arm in enumerate(recipe.arms)]
    base = table.xs(recipe.baseline, axis="columns", level="arm")
    less = table.apply(lambda column: column - base.get(column.name[1], np.nan)).dropna(axis="columns")
    return row(
        draw_bands("test accuracy (%)", table, arms, named=True),
        draw_bands(f"less that of {recipe.baseline} (points)", less, arms, named=False),
        draw_differences(recipe, scale),
    )


def main() -> None:
    """Draw those that are named, or all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("experiments", nargs="*")
    wanted = parser.parse_args().experiments
    make_folder(FOLDER)
    with tempfile.TemporaryDirectory() as profile:
        driver = browser(profile)
        try:
            for path in sorted(RESULTS.glob(f"*/{RUNS_FILE}")):
                name, _, scale = path.parent.name.rpartition("-")
                if wanted and name not in wanted:
                    continue
                image = get_screenshot_as_png(plots_of(RECIPES.get(name), scale), driver=driver)
                data = io.BytesIO()
                image.convert("RGB").quantize(256).save(data, "png", optimize=True)
                write_file(FOLDER / f"{path.parent.name}.png", data.getvalue())
        finally:
            driver.quit()


if __name__ == "__main__":
    main()
