"""What an experiment is: its question, arms, scales and claims, all fixed before the first run. Imports no torch.

An experiment is one file of this package with one `Recipe`. Arms times seeds are ordinary runs; what they left is
handed to each claim as `Evidence`, and the claim answers with a `Verdict`. Everything is counted in accuracy (percent
of the images that are classified right), so that higher is better in all places.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from norm_matters.core.errors import UserError, nearest

SCALES = ("smoke", "small", "paper")

Settings = Mapping[str, Any]
"""Dotted key -> value."""

Window = tuple[float, float]
"""A part of a run, in shares of its epochs: (0.125, 0.25) is epochs 11 to 20 of 80."""

LAST_QUARTER: Window = (0.75, 1.0)

Word = Literal[
    "equal",
    "worse but within the margin",
    "worse",
    "better but within the margin",
    "better",
    "holds",
    "does not hold",
    "undecided",
    "not run",
]
"""What a test or a claim comes to; the first five are about an arm beside its baseline."""

RunState = Literal["done", "diverged", "missing"]
END_STATES: tuple[RunState, ...] = ("done", "diverged")


@dataclass(frozen=True)
class Arm:
    """One of the things that are compared.

    Attributes:
        name: short and unique, in the letters of a folder's name; runs are `NAME-sSEED`.
        meaning: one line for the page.
        overrides: upon the scale's settings; or a function from the scale's name to them. In a text of theirs, however
            deep, `{ARM}` stands for the folder of that arm's run of the same seed (an absolute path), if `after` names
            the arm. Configurations are checked before that run exists, so nothing may be read from it then.
        after: arms whose run of the same seed must be done before this one starts.
    """

    name: str
    meaning: str
    overrides: Settings | Callable[[str], Settings] = field(default_factory=dict)
    after: tuple[str, ...] = ()

    def settings(self, scale: str) -> Settings:
        """What it sets at that scale."""
        return self.overrides(scale) if callable(self.overrides) else self.overrides


@dataclass(frozen=True)
class Choice:
    """A setting that each arm chooses for itself before the comparison, on images held back from the training set.

    Each candidate is trained with seeds that the comparison does not use; the best mean accuracy of the last quarter
    wins, the first of equal ones.

    Attributes:
        key: dotted, or in words where `settings` turns values into settings.
        values: candidates of every arm.
        settings: from an arm's name and a value to settings, where that is more than the key.
        holdout: share of the training images that they are judged by.
        seeds: of these runs.
    """

    key: str
    values: tuple[Any, ...]
    settings: Callable[[str, Any], Settings] | None = None
    holdout: float = 0.1
    seeds: tuple[int, ...] = (1000,)

    def of(self, arm: str, value: Any) -> Settings:
        """What an arm sets with a value."""
        return {self.key: value} if self.settings is None else self.settings(arm, value)


@dataclass(frozen=True)
class Scale:
    """How large an experiment is.

    Attributes:
        config: settings of all arms, epochs included; no dataset where `dataset` gives it.
        seeds: how many, from 0.
        dataset: `data.name` unless the user names another with --dataset.
        about: what differs from the paper at this scale, and how long it takes on what; sentences.
        arms: names of those that are run; all of them where empty.
        choice: see `Choice`.
    """

    config: Settings
    seeds: int
    dataset: str
    about: str
    arms: tuple[str, ...] = ()
    choice: Choice | None = None


@dataclass(frozen=True)
class PaperCurve:
    """A curve of the paper's figures (`figures.json`) that is shown beside an arm.

    Attributes:
        figure, series: where it is in the file.
        label: in the legend.
    """

    figure: str
    series: str
    label: str


@dataclass(frozen=True)
class Table:
    """Numbers beside the curves; kept as CSV.

    Attributes:
        name: of the file.
        title: of the section on the page.
        rows: all with the same keys, the columns.
        note: what they are; sentences.
        curves: column -> title of a plot of it by `epoch`, a line per `arm`; for tables with these columns.
    """

    name: str
    title: str
    rows: Sequence[Mapping[str, Any]]
    note: str = ""
    curves: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Finding:
    """One test: a row of the page's table.

    Attributes:
        what: is tested, in words ("l1 less l2").
        test: its name ("paired t, 90%").
        n: pairs, or runs.
        estimate, low, high: with its interval, in `unit`; NaN where there is none.
        unit: "points", "", "%".
        p: p values, by what they are for.
        word: what it comes to.
        margin: of a comparison, in its unit; None for any other test.
        note: further words.
        lost: whether runs of its arms stopped on numbers that are not finite, so that it is about those that are left.
    """

    what: str
    test: str
    n: int
    estimate: float
    low: float
    high: float
    word: Word
    unit: str = "points"
    p: Mapping[str, float] = field(default_factory=dict)
    margin: float | None = None
    note: str = ""
    lost: bool = False


@dataclass(frozen=True)
class Verdict:
    """What an experiment says of a claim.

    Attributes:
        claim: its id.
        word: that of the test which decides; "holds" and "does not hold" where that is no comparison with a margin.
        holds: whether the claim holds by it; None where that is open.
        sentence: the verdict in words, for a reader who sees nothing else.
        findings: the tests, the one that decides first.
    """

    claim: str
    word: Word
    holds: bool | None
    sentence: str
    findings: tuple[Finding, ...] = ()


@dataclass(frozen=True)
class RunRecord:
    """A run as the experiment sees it.

    Attributes:
        state: "done"; "diverged": it ended with numbers that are not finite, or as bad as `Recipe.diverged` says;
            "missing": not run yet, or not to its end.
        rows: of its results.csv.
    """

    arm: str
    seed: int
    folder: Path
    state: RunState
    rows: Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Evidence:
    """All that a claim is decided by.

    Attributes:
        recipe: what it is the evidence of.
        scale: its name.
        runs: arm -> seed -> run.
        tables: by name; those that the experiment computed.
        products: `2 lr lambda T / (1 - m)` of each phase of the arm that the recipe names in `equilibrium`.
    """

    recipe: "Recipe"
    scale: str
    runs: Mapping[str, Mapping[int, RunRecord]]
    tables: Mapping[str, Table] = field(default_factory=dict)
    products: tuple[float, ...] = ()

    def accuracy(self, arm: str, window: Window = LAST_QUARTER) -> dict[int, float]:
        """Seed -> mean test accuracy (percent) over a part of the run, of runs with all their epochs.

        A run that stopped on numbers that are not finite has none.
        """
        found = {
            seed: window_accuracy(run.rows, window)
            for seed, run in self.runs.get(arm, {}).items()
            if run.state in END_STATES and len(run.rows) == self.epochs
        }
        return {seed: value for seed, value in found.items() if math.isfinite(value)}

    def diverged(self, arm: str) -> dict[int, bool]:
        """Seed -> whether the run diverged, of runs that came to an end."""
        return {
            seed: run.state == "diverged" for seed, run in self.runs.get(arm, {}).items() if run.state in END_STATES
        }

    def lost(self, arm: str) -> list[int]:
        """The seeds whose runs diverged before their end, and have no accuracy."""
        return [seed for seed, diverged in self.diverged(arm).items() if diverged and seed not in self.accuracy(arm)]

    def unfinished(self, arm: str) -> str:
        """How many seeds of an arm have come to an end, in words; empty where all have."""
        ended, planned = len(self.diverged(arm)), len(self.runs.get(arm, {}))
        return f"{ended} of {planned} seeds of {arm}" if ended < planned else ""

    def ended(self, *arms: str) -> bool:
        """Whether two seeds or more of each of these arms have come to an end."""
        return all(len(self.diverged(arm)) > 1 for arm in arms)

    @property
    def epochs(self) -> int:
        """The length of each run."""
        return int(self.recipe.scales[self.scale].config["train.epochs"])


@dataclass(frozen=True)
class Claim:
    """Something that the experiment decides.

    Attributes:
        id: as in the paper's list ("WD-1"), or the project's own question ("Q-NOISE").
        statement: what is claimed; one sentence.
        paper: the paper's numbers; empty for questions of our own.
        rule: when it holds, as a sentence; it is fixed before the run, and `decide` follows it.
        arms: which the decision needs; "not run" without two seeds of each.
        decide: from evidence with these arms to the verdict.
    """

    id: str
    statement: str
    paper: str
    rule: str
    arms: tuple[str, ...]
    decide: Callable[[Evidence], Verdict]

    def judge(self, evidence: Evidence) -> Verdict:
        """The verdict, also where arms are missing or decay could not act in the time given."""
        recipe = evidence.recipe
        if missing := [arm for arm in self.arms if not evidence.ended(arm)]:
            return Verdict(self.id, "not run", None, f"Not run yet: {', '.join(missing)}.")
        verdict = self.decide(evidence)
        if left := [told for arm in self.arms if (told := evidence.unfinished(arm))]:
            # Seeds are fixed before the run: whoever looks earlier and stops when it pleases finds what pleases.
            text = f"Provisional, {', '.join(left)}; so far {outcome(verdict.word, verdict.holds)}: {verdict.sentence}"
            return Verdict(self.id, "undecided", None, text, verdict.findings)
        if recipe.equilibrium is None or not evidence.products or evidence.products[0] >= LEAST_PRODUCT:
            return verdict
        text = (
            f"Undecided: 2 lr lambda T / (1 - m) of the first phase is {evidence.products[0]:.2g}, below "
            f"{LEAST_PRODUCT:g}, so weight decay had no time to act."
        )
        return Verdict(self.id, "undecided", None, text, verdict.findings)


def outcome(word: str, holds: bool | None) -> str:
    """A verdict's word, and what it means for the claim where the word does not say that itself."""
    if word in ("holds", "does not hold", "undecided", "not run"):
        return word
    return f"{word} ({'holds' if holds else 'open' if holds is None else 'does not hold'})"


LEAST_PRODUCT = 2.0
"""Below this product in the first phase, a run is too short to show what weight decay does."""


@dataclass(frozen=True)
class Recipe:
    """An experiment.

    Attributes:
        id: what the command calls it.
        question: one sentence.
        claims: what it decides.
        scales: by the names of `SCALES`, as far as it has them.
        arms: in the order in which they are run: all seeds of the first, then those of the second ...; one that comes
            `after` another may wait longer. None for an experiment that only computes.
        baseline: the arm that the page compares with.
        margin: points of accuracy within which two arms count as equal.
        diverged: a run whose mean accuracy over the last quarter is below this (percent) has diverged, as has one that
            stops on numbers that are not finite.
        differs: what differs from the paper at every scale; sentences.
        paper_curves: arm -> curve of the paper.
        equilibrium: the arm whose weight decay must have time to act (see `LEAST_PRODUCT`); None: no matter here.
        compute: from the scale's name and that of the device to tables; for what is no run.
        look: further tables, made from the runs' files.
    """

    id: str
    question: str
    claims: tuple[Claim, ...]
    scales: Mapping[str, Scale]
    arms: tuple[Arm, ...] = ()
    baseline: str = ""
    margin: float = 0.5
    diverged: float = 0.0
    differs: str = ""
    paper_curves: Mapping[str, PaperCurve] = field(default_factory=dict)
    equilibrium: str | None = None
    compute: Callable[[str, str], Sequence[Table]] | None = None
    look: Callable[[Evidence], Sequence[Table]] | None = None

    def __post_init__(self) -> None:
        names = [arm.name for arm in self.arms]
        assert len(set(names)) == len(names), f"{self.id}: an arm's name occurs twice"
        assert all(other in names[:index] for index, arm in enumerate(self.arms) for other in arm.after)
        assert all(arm in names for claim in self.claims for arm in claim.arms)
        assert not self.arms or self.baseline in names
        assert set(self.scales) <= set(SCALES)

    def scale(self, name: str) -> Scale:
        """The scale of that name.

        Raises:
            UserError: it has none.
        """
        if name not in self.scales:
            known = ", ".join(self.scales)
            raise UserError(f"--scale: {self.id} has no '{name}'{nearest(name, self.scales)}; it has {known}")
        return self.scales[name]

    def arm(self, name: str) -> Arm:
        """The arm of that name."""
        return next(arm for arm in self.arms if arm.name == name)

    def arms_at(self, scale: str, chosen: Sequence[str] = ()) -> list[Arm]:
        """The arms that are run, in order, with those that others come after.

        Args:
            chosen: names; empty for all of the scale.

        Raises:
            UserError: a name that is no arm's.
        """
        there = self.scale(scale).arms or tuple(arm.name for arm in self.arms)
        if unknown := [name for name in chosen if name not in there]:
            known = ", ".join(there)
            raise UserError(
                *(f"--arms: {self.id} has no '{name}'{nearest(name, there)}; it has {known}" for name in unknown)
            )
        wanted = set(chosen or there)
        for arm in reversed(self.arms):
            if arm.name in wanted:
                wanted |= set(arm.after)
        return [arm for arm in self.arms if arm.name in wanted]


def window_accuracy(rows: Sequence[Mapping[str, Any]], window: Window) -> float:
    """The mean accuracy over a part of a run; NaN where an epoch of it has none.

    At least one epoch is taken, the last of the part: of 2 epochs, the last quarter is the second.
    """
    first, last = (round(share * len(rows)) for share in window)
    last = max(1, last)
    part = rows[min(first, last - 1) : last]
    values = [math.nan if row.get("val_error1") is None else 100.0 - float(row["val_error1"]) for row in part]
    return math.fsum(values) / len(values) if values else math.nan
