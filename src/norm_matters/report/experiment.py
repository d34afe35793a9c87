"""The page of an experiment on a claim of the paper, and the index over all of them, from files and plain data."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from bokeh.models import BoxAnnotation, ColumnDataSource, FactorRange, HoverTool, Range1d, Scatter, Segment, Span
from bokeh.models.tickers import BasicTicker
from bokeh.plotting import figure

from norm_matters.record.files import write_file
from norm_matters.report.comparison import group_panel
from norm_matters.report.groups import Group
from norm_matters.report.page import Html, cards, facts_table, note, numbers_table, page, section, tag
from norm_matters.report.plots import Curve, Panel, Series, draw, drawable, empty_plot, heading, legend, value_text
from norm_matters.report.read import flatten, show

_FURTHER = ("train_loss", "train_error1", "lr")
_ROW = 26  # pixels of height of a test in the plot of intervals
_MOST_ROWS = 200  # of a table on the page; the CSV has all
_OPEN_ROWS = 30  # a table with more of them is folded
_COLOURS = {
    "equal": "#009e73",
    "better but within the margin": "#009e73",
    "better": "#009e73",
    "holds": "#009e73",
    "worse but within the margin": "#e69f00",
    "worse": "#d55e00",
    "does not hold": "#d55e00",
}
_OTHER_COLOUR = "#5b6875"


@dataclass(frozen=True)
class ClaimView:
    """A claim and its verdict, in words.

    Attributes:
        id, statement, paper, rule: see `experiments.claims.recipe.Claim`.
        word, sentence: the verdict.
        holds: whether the claim does; None where that is open.
    """

    id: str
    statement: str
    paper: str
    rule: str
    word: str
    sentence: str
    holds: bool | None


@dataclass(frozen=True)
class TestView:
    """A test: a row of the table.

    Attributes:
        claim: those that look at it.
        what, name, n, estimate, low, high, unit, word, note: see `experiments.claims.recipe.Finding`.
        p: p values, in words.
        margin: of a comparison; None for any other test.
    """

    __test__ = False  # no test of pytest's

    claim: str
    what: str
    name: str
    n: int
    estimate: float
    low: float
    high: float
    unit: str
    word: str
    p: str
    note: str
    margin: float | None = None

    @property
    def drawable(self) -> bool:
        """Whether it is a difference with an interval."""
        return self.margin is not None and bool(np.isfinite([self.estimate, self.low, self.high]).all())


@dataclass(frozen=True)
class ArmView:
    """An arm.

    Attributes:
        name, meaning: see `experiments.claims.recipe.Arm`.
        settings: what it sets, in words.
        state: of its runs, in words.
        group: its runs that have ended an epoch; None where there is none.
        paper: (epochs, accuracy, label) of the paper's curve for it; None where it has none.
    """

    name: str
    meaning: str
    settings: str
    state: str
    group: Group | None
    paper: tuple[np.ndarray, np.ndarray, str] | None = None


@dataclass(frozen=True)
class TableView:
    """Numbers of an experiment beside its tests: rows with the same keys.

    Attributes:
        curves: column -> title of a plot of it by the column `epoch`, a line per `arm`.
    """

    title: str
    note: str
    rows: Sequence[Mapping[str, Any]]
    curves: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ExperimentView:
    """All that the page of an experiment shows.

    Attributes:
        title, question: its heading.
        differs: what differs from the paper; sentences.
        setup: key -> value, of what all arms share.
        source: of the paper's curves.
        notes: what a reader should know first.
    """

    title: str
    question: str
    claims: Sequence[ClaimView]
    tests: Sequence[TestView]
    arms: Sequence[ArmView]
    tables: Sequence[TableView]
    differs: Sequence[str]
    setup: Mapping[str, str]
    provenance: Mapping[str, Any]
    source: str = ""
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class _Differences:
    """The plot of the comparisons: each difference with its interval, and the margin."""

    tests: Sequence[TestView]

    @property
    def last_epoch(self) -> int:
        """See `Drawing`: it has no epochs."""
        return 1

    def heading(self) -> Html:
        """See `Drawing`."""
        return heading("Differences of accuracy (points); grey: within the margin", log=False)

    def plot(self, epochs: Range1d) -> figure:
        """See `Drawing`."""
        factors = [f"{index + 1}. {test.what[:60]}" for index, test in enumerate(self.tests)]
        margins = [test.margin for test in self.tests if test.margin is not None]
        ends = [end for test in self.tests for end in (test.low, test.high)]
        ends += [*margins, *(-margin for margin in margins)]
        room = 0.05 * (max(ends) - min(ends)) or 0.5
        plot = empty_plot(
            Range1d(start=min(ends) - room, end=max(ends) + room),
            y_range=FactorRange(factors=factors[::-1]),
            height=90 + _ROW * len(factors),
        )
        plot.xaxis.axis_label = "points"
        plot.xaxis.ticker = BasicTicker(desired_num_ticks=6)
        plot.add_layout(BoxAnnotation(left=-min(margins), right=min(margins), fill_color="#b6c0ca", fill_alpha=0.3))
        plot.add_layout(Span(location=0, dimension="height", line_color="#b6c0ca", line_dash=[4, 4]))
        source = ColumnDataSource(
            {
                "test": factors,
                "low": [test.low for test in self.tests],
                "high": [test.high for test in self.tests],
                "value": [test.estimate for test in self.tests],
                "colour": [_COLOURS.get(test.word, _OTHER_COLOUR) for test in self.tests],
                "text": [f"{test.what}: {_estimate(test)}, {test.word}" for test in self.tests],
            }
        )
        plot.add_glyph(source, Segment(x0="low", x1="high", y0="test", y1="test", line_color="colour", line_width=3))
        dots = plot.add_glyph(source, Scatter(x="value", y="test", size=10, fill_color="colour", line_color="#fff"))
        plot.add_tools(HoverTool(renderers=[dots], tooltips=[("", "@text")], visible=False))
        return plot


@dataclass(frozen=True)
class _PaperPanel:
    """A plot of curves from the paper, with an axis of epochs of its own."""

    panel: Panel

    @property
    def last_epoch(self) -> int:
        """See `Drawing`: it does not widen the axis of our runs."""
        return 1

    def heading(self) -> Html:
        """See `Drawing`."""
        return self.panel.heading()

    def plot(self, epochs: Range1d) -> figure:
        """See `Drawing`."""
        last = self.panel.last_epoch
        return self.panel.plot(Range1d(start=1 - 0.02 * last, end=1.02 * last))


def write_experiment_page(path: Path, view: ExperimentView) -> None:
    """Write the page; replaced in one go.

    Raises:
        StorageError: it cannot be written.
    """
    series = [Series(arm.name, index) for index, arm in enumerate(view.arms)]
    differences = list({test.what: test for test in view.tests if test.drawable}.values())
    panels, paper = _panels(view.arms, series), _paper_panel(view.arms, series)
    panels += [panel for table in view.tables for panel in _table_panels(table, series)]
    drawings = [*([_Differences(differences)] if differences else []), *panels, *paper]
    elements, scripts = draw(drawings)
    first, curves = elements[: bool(differences)], elements[bool(differences) :]
    # The paper's figure stands beside our curve of the same quantity.
    curves = [*curves[:1], *curves[len(panels) :], *curves[1 : len(panels)]] if panels else curves
    sections = [
        cards((claim.id, claim.word) for claim in view.claims),
        *map(note, view.notes),
        section("Verdicts", *map(_claim, view.claims)),
        section("Tests", tag("div", *first, class_="part"), tag("div", _tests_table(view.tests), class_="part")),
        *([_curves(view, series, curves)] if curves else []),
        *(_table_section(table) for table in view.tables),
        _setup(view),
        section("Provenance", facts_table((key, show(value)) for key, value in flatten(dict(view.provenance)))),
    ]
    write_file(path, page(view.title, view.question, sections, scripts))


def write_index_page(path: Path, rows: Sequence[Mapping[str, Any]], absent: Mapping[str, str]) -> None:
    """Write the index over all experiments.

    Args:
        rows: `experiment`, `scale`, `question`, `claim`, `statement`, `verdict` (in words), `holds` (None: open),
            `sentence`, `seeds` and `page` (a file beside it) of each claim.
        absent: name -> question of the experiments that were not run.

    Raises:
        StorageError: it cannot be written.
    """
    entries: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        entries.setdefault((row["experiment"], row["scale"]), []).append(row)
    sections = []
    for (experiment, scale), claims in entries.items():
        link = tag("a", f"{experiment}, {scale} scale", href=claims[0]["page"])
        parts = [
            tag(
                "div",
                tag("p", _badge(row["verdict"], row["holds"]), " ", tag("b", row["claim"]), f": {row['statement']}"),
                tag("p", row["sentence"]),
                *([tag("p", f"seeds: {row['seeds']}", class_="soft")] if row["seeds"] else []),
                class_="part",
            )
            for row in claims
        ]
        sections.append(tag("section", tag("h2", link), tag("p", claims[0]["question"], class_="soft"), *parts))
    if not rows:
        sections.append(note("No experiment has been run yet."))
    if absent:
        sections.append(section("Not run yet", facts_table(absent.items())))
    write_file(path, page("The claims of Norm matters", "What holds, experiment by experiment", sections, []))


def _claim(claim: ClaimView) -> Html:
    soft = " ".join(filter(None, [claim.paper and f"In the paper: {claim.paper}", f"Decided by: {claim.rule}"]))
    return tag(
        "div",
        tag("p", _badge(claim.word, claim.holds), " ", tag("b", claim.id), f": {claim.statement}"),
        tag("p", claim.sentence),
        tag("p", soft, class_="soft"),
        class_="part",
    )


def _badge(word: str, holds: bool | None) -> Html:
    """The verdict's word, on the colour of what it means for the claim."""
    colour = _OTHER_COLOUR if holds is None else _COLOURS["holds" if holds else "does not hold"]
    style = f"background: {colour}; color: #fff; padding: 2px 10px; border-radius: 10px; font-size: 13px"
    return tag("span", word, style=style)


def _tests_table(tests: Sequence[TestView]) -> Html:
    header = ["test", "comes to", "estimate, interval", "n", "p", "by", "claim", "remark"]  # what is read first
    return numbers_table(
        header,
        ([t.what, t.word, _estimate(t), str(t.n), t.p, t.name, t.claim, t.note] for t in tests),
    )


def _estimate(test: TestView) -> str:
    if np.isnan(test.estimate):
        return "–"
    sign = "+" if test.margin is not None else ""
    text = f"{test.estimate:{sign}.3g}{'%' if test.unit == '%' else ''}"
    if np.isnan(test.low):
        return text
    if np.isinf(test.low):
        return f"{text} (unbounded)"
    return f"{text} ({test.low:{sign}.3g} to {test.high:{sign}.3g})"


def _panels(arms: Sequence[ArmView], series: Sequence[Series]) -> list[Panel]:
    """Our curves: test accuracy first."""
    shown = [(arm.group, item) for arm, item in zip(arms, series, strict=True) if arm.group is not None]
    if not shown:
        return []
    groups, own = [group for group, _ in shown], [item for _, item in shown]
    errors = group_panel("val_error1", groups, own)
    accuracy = [_as_accuracy(curve) for curve in errors.curves]
    panels = [
        Panel("Test accuracy (%)", accuracy, linear=True),
        *(group_panel(metric, groups, own) for metric in _FURTHER),
    ]
    return [panel for panel in panels if drawable(panel)]


def _table_panels(table: TableView, series: Sequence[Series]) -> list[Panel]:
    """The curves of a table: at each epoch the median of an arm's rows."""
    panels = []
    for column, title in table.curves.items():
        curves = []
        for item in series:
            found: dict[int, list[float]] = {}
            for row in table.rows:
                if row["arm"] == item.label:
                    found.setdefault(row["epoch"], []).append(row[column])
            if found:
                curves.append(Curve(item, np.array(list(found)), np.array([np.median(v) for v in found.values()])))
        panels.append(Panel(title, curves))
    return [panel for panel in panels if drawable(panel)]


def _as_accuracy(curve: Curve) -> Curve:
    low, high = (None if edge is None else 100 - edge for edge in (curve.high, curve.low))
    return Curve(curve.series, curve.epochs, 100 - curve.values, low, high)


def _paper_panel(arms: Sequence[ArmView], series: Sequence[Series]) -> list[_PaperPanel]:
    curves = [
        Curve(Series(f"{arm.paper[2]} (paper)", item.index), arm.paper[0], arm.paper[1])
        for arm, item in zip(arms, series, strict=True)
        if arm.paper is not None
    ]
    return [_PaperPanel(Panel("The paper's figure: accuracy (%)", curves, linear=True))] if curves else []


def _curves(view: ExperimentView, series: Sequence[Series], elements: Sequence[Html]) -> Html:
    remarks = ["Line: the mean of an arm's seeds. Band: from their minimum to their maximum."]
    if any(arm.paper for arm in view.arms):
        remarks.append(f"The paper's curves are single runs; {view.source}.")
    drawn = [item for arm, item in zip(view.arms, series, strict=True) if arm.group is not None or arm.paper]
    remark = tag("p", " ".join(remarks), class_="soft")
    return section("Curves", remark, legend(drawn), tag("div", *elements, class_="panels"))


def _table_section(table: TableView) -> Html:
    columns = list(table.rows[0])
    cells = [[_cell(row[column]) for column in columns] for row in table.rows[:_MOST_ROWS]]
    more = len(table.rows) - len(cells)
    remark = f"{table.note}{f' {more} further rows are in the CSV.' if more else ''}"
    numbers = numbers_table(columns, cells)
    if len(cells) > _OPEN_ROWS:
        numbers = tag("details", tag("summary", f"{len(cells)} rows"), numbers)
    return section(table.title, numbers, tag("p", remark, class_="soft"))


def _cell(value: Any) -> str:
    return value_text(value) if isinstance(value, float) else show(value)


def _setup(view: ExperimentView) -> Html:
    arms = [[arm.name, arm.meaning, arm.settings or "–", arm.state] for arm in view.arms]
    parts = [
        *([tag("div", facts_table(view.setup.items()), class_="part")] if view.setup else []),
        tag(
            "div",
            tag("p", tag("b", "What differs from the paper")),
            *(tag("p", text) for text in view.differs),
            class_="part",
        ),
    ]
    if arms:
        rows = (
            (name, f"{meaning.rstrip('.')}. Runs: {state}. Sets: {settings}")  # long texts, which wrap in this table
            for name, meaning, settings, state in arms
        )
        parts.insert(0, tag("div", facts_table(rows), class_="part"))
    return section("Set-up", *parts)
