"""What `bench numerics` leaves behind: a table and a page with a map of norm x format over sigma."""

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path

from bokeh.embed import components
from bokeh.models import ColumnDataSource, FactorRange, HoverTool
from bokeh.plotting import figure
from bokeh.resources import Resources

from norm_matters.bench.numerics import Measurement, Verdict
from norm_matters.record.files import make_folder, write_file
from norm_matters.report.page import Html, note, page, section, tag

# Okabe and Ito's hues, light enough for black figures on them.
COLOURS: dict[Verdict, str] = {
    "ok": "#e6f2ec",
    "wrong gradient": "#f7ecc4",
    "biased": "#f3cf7a",
    "underflow": "#9fcdea",
    "no gradient": "#d9a9c4",
    "overflow": "#e8976a",
    "nan": "#b9bec4",
}
_MEANINGS: dict[Verdict, str] = {
    "ok": "output and gradient within 5%",
    "wrong gradient": "the gradient is off by more",
    "biased": "the output is off by more",
    "underflow": "sigma is 0",
    "no gradient": "the gradient is not finite",
    "overflow": "sigma is infinite, the output 0",
    "nan": "the output is not finite",
}


def write_numerics(folder: Path, measurements: Sequence[Measurement]) -> tuple[Path, Path]:
    """Write `numerics.csv` and `numerics.html`, which needs no network; what was there is replaced.

    Args:
        folder: made if it does not exist.
        measurements: in the order to show them; all of one n and one rounding.

    Returns:
        Both files.

    Raises:
        StorageError: they cannot be written.
    """
    make_folder(folder)
    table, shown = folder / "numerics.csv", folder / "numerics.html"
    write_file(table, _csv(measurements))
    write_file(shown, numerics_page(measurements))
    return table, shown


def ratio_text(ratio: float) -> str:
    """The ratio of two sigmas in five characters or fewer: `0.43`, `1.00`, `6e-05`, `inf`."""
    if not math.isfinite(ratio) or ratio == 0:
        return f"{ratio:g}"
    return f"{ratio:.2f}" if 0.01 <= ratio < 100 else f"{ratio:.0e}"


def numerics_page(measurements: Sequence[Measurement]) -> bytes:
    """The page: a map per accumulator."""
    accumulators = list(dict.fromkeys(row.accumulator for row in measurements))
    plots = [_map([row for row in measurements if row.accumulator == name]) for name in accumulators]
    script, divs = components(plots, wrap_script=False)
    maps = [
        tag("figure", tag("h3", f"Accumulator: {name}", style="margin: 0 0 6px"), Html(div), class_="panel")
        for name, div in zip(accumulators, divs, strict=True)
    ]
    library = "\n".join(Resources(mode="inline", components=["bokeh"]).js_raw)
    first = measurements[0]
    subtitle = f"{first.n:,} standard normal values per channel, times sigma · rounded to {_rounding(first.rounding)}"
    about = note(
        "In each field: the norm's estimate of sigma over the one it makes in float64. The colour says what becomes of "
        "the output and of the input's gradient; eps can hide a wrong sigma where sigma is small."
    )
    return page(
        "Norms in few bits",
        subtitle,
        [about, section("Where each norm breaks", _key(), tag("div", *maps, class_="panels"))],
        [library, script],
    )


def _rounding(rounding: str) -> str:
    return "the nearest number" if rounding == "nearest" else "either neighbour at random"


def _key() -> Html:
    """What the colours mean."""
    square = "display: inline-block; width: 14px; height: 14px; margin-right: 6px; border: 1px solid #999; background: "
    entries = (
        tag(
            "span",
            tag("span", style=square + COLOURS[verdict]),
            f"{verdict}: {meaning}",
            style="display: inline-block; margin-right: 18px",
        )
        for verdict, meaning in _MEANINGS.items()
    )
    return tag("p", *entries, style="margin-bottom: 12px")


def _map(rows: Sequence[Measurement]) -> figure:
    """One field for each norm, format and sigma."""
    places = list(dict.fromkeys((row.norm, row.format) for row in rows))
    sigmas = list(dict.fromkeys(f"{row.sigma:g}" for row in rows))
    data = {
        "place": [(row.norm, row.format) for row in rows],
        "sigma": [f"{row.sigma:g}" for row in rows],
        "text": [ratio_text(row.ratio) for row in rows],
        "colour": [COLOURS[row.verdict] for row in rows],
        "verdict": [row.verdict for row in rows],
        "ratio": [f"{row.ratio:.4g}" for row in rows],
        "output": [f"{row.output_error:.2g}" for row in rows],
        "gradient": [f"{row.gradient_error:.2g}" for row in rows],
    }
    plot = figure(
        height=90 + 24 * len(places),
        sizing_mode="stretch_width",
        x_range=FactorRange(factors=sigmas),
        y_range=FactorRange(factors=places[::-1], factor_padding=0, group_padding=0.4),
        x_axis_label="sigma of the input",
        x_axis_location="above",
        tools="save",
        toolbar_location=None,
    )
    source = ColumnDataSource(data)
    fields = plot.rect("sigma", "place", 1, 1, source=source, fill_color="colour", line_color="white", line_width=1)
    plot.text(
        "sigma", "place", text="text", source=source,
        text_align="center", text_baseline="middle", text_font_size="12px", text_color="#1b2733",
    )  # fmt: skip
    tooltips = [
        ("", "@verdict"),
        ("sigma / that in float64", "@ratio"),
        ("error of the output", "@output"),
        ("error of the gradient", "@gradient"),
    ]
    plot.add_tools(HoverTool(renderers=[fields], tooltips=tooltips))
    plot.grid.visible = False
    plot.outline_line_color = None
    plot.axis.axis_line_color = None
    plot.axis.major_tick_line_color = None
    plot.yaxis[0].update(group_label_orientation="horizontal", separator_line_color=None)
    return plot


def _csv(measurements: Sequence[Measurement]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(Measurement._fields)
    for row in measurements:
        writer.writerow([f"{value:.6g}" if isinstance(value, float) else value for value in row])
    return text.getvalue()
