"""Draws the plots of the cards, docs/norms/NORM.png, and writes the numbers behind them, plots.csv.

`python docs/norms/plots.py` measures (measure.py), draws and fills the cards' tables (tables.py); `--tables` only fills
the tables, `--draw` does all but measure. Needs chromium and chromedriver. The numbers are the same every time.
"""

import argparse
import csv
import io
import math
import shutil
import tempfile
from collections.abc import Iterable
from typing import Any

from bokeh.io.export import get_screenshot_as_png
from bokeh.layouts import row
from bokeh.models import Span
from bokeh.plotting import figure
from tables import NUMBERS, fill_pages, read_numbers

from norm_matters.core.errors import UserError
from norm_matters.record.files import write_file

# Okabe and Ito's colours, which colour-blind people tell apart.
BLUE, ORANGE, GREEN, PURPLE = "#0072b2", "#e69f00", "#009e73", "#cc79a7"
# What is drawn first is drawn wider, so that it shows where another line hides it.
WIDTHS = (4, 2, 2, 2)
INPUT_COLOURS = {"Gaussian": BLUE, "uniform": ORANGE, "Laplace": GREEN, "ReLU'd Gaussian": PURPLE}
FORMAT_COLOURS = {"fp16": BLUE, "bf16": ORANGE, "e4m3": GREEN}
# Ratios of sigma above this are drawn here.
CEILING = 2.0


def panel(title: str, x_label: str, **options: Any) -> Any:
    """An empty plot in the common style."""
    plot: Any = figure(title=title, toolbar_location=None, **{"width": 350, "height": 300, **options})
    plot.xaxis.axis_label = x_label
    plot.title.text_font_size = "10pt"
    plot.axis.axis_label_text_font_style = "normal"
    plot.grid.grid_line_color = "#e5e9ed"
    plot.axis.minor_tick_line_color = None
    plot.outline_line_color = None
    return plot


def finish(plot: Any) -> Any:
    """Put the legend below the plot, where it hides nothing."""
    legend = plot.legend[0]
    plot.add_layout(legend, "below")
    legend.orientation = "horizontal"
    legend.label_text_font_size = "8pt"
    legend.border_line_color = None
    legend.padding = legend.margin = 0
    legend.spacing = 8
    return plot


def draw_rms(name: str) -> Any:
    """The rms of the output by the number of values per channel; solid calibrated, dashed the paper's constant."""
    numbers = read_numbers()
    paper = " (dashed: paper's constant)" if (name, "rms", "Gaussian, paper") in numbers else ""
    plot = panel(f"output rms{paper}", "values per channel n", x_axis_type="log", y_range=(0, 2.5))
    for (source, colour), width in zip(INPUT_COLOURS.items(), WIDTHS, strict=True):
        for kind, dash in (("calibrated", "solid"), ("no constant", "solid"), ("paper", "dashed")):
            series = numbers.get((name, "rms", f"{source}, {kind}"))
            if series is not None:
                shown = {"legend_label": source} if dash == "solid" else {}
                plot.line(*series, color=colour, line_dash=dash, line_width=width, **shown)
    return finish(plot)


def draw_slope(name: str) -> Any:
    """n times the derivative of sigma by a deviation."""
    series = read_numbers()[name, "slope", "dsigma/dd"]
    plot = panel("n ∂σ̂/∂d, n = 256 Gaussian values", "deviation d, in σ", x_range=(-4, 4))
    plot.scatter(*series, size=4, color=BLUE, line_color=None, fill_alpha=0.6)
    return plot


def draw_precision(name: str) -> Any:
    """sigma^ / sigma by sigma; solid a float32 accumulator, dashed one of the format, sequential."""
    title = "σ̂/σ, n = 16,384 (dashed: sequential)"
    plot = panel(title, "σ of the input", x_axis_type="log", y_range=(0, 1.05 * CEILING))
    plot.yaxis.ticker = [0, 0.5, 1, 1.5, CEILING]
    plot.yaxis.major_label_overrides = {CEILING: "more"}
    plot.add_layout(Span(location=1, dimension="width", line_color="#8a97a3", line_width=1))
    for (form, colour), width in zip(FORMAT_COLOURS.items(), WIDTHS, strict=False):
        for accumulator, dash in (("fp32", "solid"), ("sequential", "dashed")):
            series = read_numbers()[name, "sigma", f"{form}, {accumulator}"]
            shown = {"legend_label": form} if dash == "solid" else {}
            y = [min(value, CEILING) for value in series.y]
            plot.line(series.x, y, color=colour, line_dash=dash, line_width=width, **shown)
    return finish(plot)


def browser(profile: str) -> Any:
    """A headless Chromium.

    Raises:
        UserError: there is none.
    """
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    binary, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if binary is None or driver is None:
        raise UserError("the plots need chromium and chromedriver; apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for argument in ("headless", "no-sandbox", "disable-gpu", "no-first-run", "hide-scrollbars"):
        options.add_argument(f"--{argument}")
    options.add_argument("--disable-background-networking")
    options.add_argument(f"--user-data-dir={profile}")
    return webdriver.Chrome(options=options, service=Service(driver))


def draw(names: Iterable[str]) -> None:
    """Write a PNG per norm."""
    with tempfile.TemporaryDirectory() as profile:
        driver = browser(profile)
        try:
            for name in names:
                plots = row(draw_rms(name), draw_slope(name), draw_precision(name))
                image = get_screenshot_as_png(plots, driver=driver).convert("RGB").quantize(64)
                data = io.BytesIO()
                image.save(data, "png", optimize=True)
                write_file(NUMBERS.with_name(f"{name}.png"), data.getvalue())
        finally:
            driver.quit()


def measure() -> None:
    """Write plots.csv."""
    import torch
    from measure import all_rows

    torch.set_num_threads(1)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["norm", "panel", "series", "x", "y"])
    for norm, part, series, x, y in all_rows():
        writer.writerow([norm, part, series, f"{x:.5g}", "inf" if math.isinf(y) else f"{y:.4g}"])
    write_file(NUMBERS, text.getvalue())


def main() -> None:
    """Measure, draw, fill."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tables", action="store_true", help="only fill the cards' tables")
    parser.add_argument("--draw", action="store_true", help="draw by the plots.csv that is there")
    arguments = parser.parse_args()
    if not (arguments.tables or arguments.draw):
        measure()
    if not arguments.tables:
        draw(dict.fromkeys(name for name, part, _ in read_numbers() if part == "slope"))
    for page in fill_pages():
        print(f"tables of {page.name} filled")


if __name__ == "__main__":
    main()
