"""From runs to words: the few tests that claims are decided by, each from one interval or one p value."""

import math
from collections.abc import Mapping, Sequence

from norm_matters.experiments.claims.recipe import LAST_QUARTER, Evidence, Finding, Verdict, Window, Word
from norm_matters.experiments.equivalence import ALPHA, CONFIDENCE, fieller, fisher_p, one_sided_p
from norm_matters.experiments.statistics import compare_pairs

PAIRED_T = f"paired t, {CONFIDENCE:.0%} interval"
FIELLER = f"Fieller, {CONFIDENCE:.0%} interval"
UNION = f"two one-sided paired t tests, both at {ALPHA:.0%}"
FISHER = "Fisher's exact test, two-sided"
IDENTITY = "largest error"

LEAST_RUNS = 8
"""Runs of each of two arms, before anything is said of which diverges more often."""

AS_GOOD: tuple[Word, ...] = ("equal", "better but within the margin", "better")
WITHIN: tuple[Word, ...] = (*AS_GOOD, "worse but within the margin")
WORSE: tuple[Word, ...] = ("worse",)

_SENTENCES: Mapping[Word, str] = {
    "equal": "{arm} and {baseline} are equal within the margin of",
    "worse but within the margin": "{arm} is worse than {baseline} for certain, but by less than the margin of",
    "better but within the margin": "{arm} is better than {baseline} for certain, but by less than the margin of",
    "worse": "{arm} is worse than {baseline} by more than the margin of",
    "better": "{arm} is better than {baseline} by more than the margin of",
    "undecided": "{arm} and {baseline} leave it undecided, with the margin of",
}
_OPEN = " for certain, by how much is open"


def word_of(low: float, high: float, margin: float) -> Word:
    """The word for an interval of a difference (arm less baseline, higher is better).

    - inside the margin: "equal" if it holds 0, else "worse but within the margin" or "better but within the margin";
    - beyond it: "worse" or "better";
    - else, or without an interval: "undecided", also where it is certain that one is worse but not by how much.
    """
    if high < -margin:
        return "worse"
    if low > margin:
        return "better"
    if not (low > -margin and high < margin):
        return "undecided"
    return (
        "equal" if low <= 0 <= high else "worse but within the margin" if high < 0 else "better but within the margin"
    )


def _survivors(evidence: Evidence, *arms: str) -> str:
    """What is to be said of arms of which runs stopped: an interval over the seeds that are left is not theirs."""
    lost = {name: (len(evidence.lost(name)), len(evidence.diverged(name))) for name in arms}
    told = [f"{count} of {ended} runs of {name}" for name, (count, ended) in lost.items() if count]
    return f"{' and '.join(told)} stopped on numbers that are not finite" if told else ""


def _diverged(evidence: Evidence, *arms: str) -> str:
    """What is to be said of arms of which runs diverged, yet came to their end and count."""
    counts = {name: (sum(evidence.diverged(name).values()), len(evidence.diverged(name))) for name in arms}
    told = [f"{count} of {ended} runs of {name}" for name, (count, ended) in counts.items() if count]
    return f"{' and '.join(told)} diverged, and count" if told else ""


def compare(
    evidence: Evidence, arm: str, baseline: str, *, margin: float | None = None, window: Window = LAST_QUARTER
) -> Finding:
    """An arm beside another over pairs of the same seed: the difference of their accuracies.

    Args:
        margin: points; the recipe's unless given.
    """
    margin = evidence.recipe.margin if margin is None else margin
    values, others = paired(evidence, arm, baseline, window=window)
    found = compare_pairs(values, others, CONFIDENCE)
    difference = found.difference
    word, note = word_of(difference.low, difference.high, margin), ""
    if lost := _survivors(evidence, arm, baseline):
        word, note = "undecided", lost
    else:
        certain = word == "undecided" and (difference.high < 0 or difference.low > 0)
        sign = "worse" if difference.high < 0 else "better"
        note = "; ".join(filter(None, [f"{sign}{_OPEN}" if certain else "", _diverged(evidence, arm, baseline)]))
    return Finding(
        f"{arm} less {baseline}",
        PAIRED_T,
        difference.n,
        difference.mean,
        difference.low,
        difference.high,
        word,
        p={"two-sided": found.p_t},
        margin=margin,
        note=note,
        lost=bool(lost),
    )


def share(evidence: Evidence, arm: str, *, low: str, high: str, least: float = 0.5) -> Finding:
    """Which part of the way from one arm to another a third one goes: `(arm - low) / (high - low)`.

    Args:
        low, high: the ends of the way.
        least: "holds" where the interval lies above it, "does not hold" where it lies below; "undecided" where runs of
            any of them stopped.
    """
    middle, bottom, top = paired(evidence, arm, low, high)
    found = fieller(
        [a - b for a, b in zip(middle, bottom, strict=True)], [a - b for a, b in zip(top, bottom, strict=True)]
    )
    word: Word = "holds" if found.low > least else "does not hold" if found.high < least else "undecided"
    if further := _survivors(evidence, arm, low, high):
        word = "undecided"
    elif not middle:
        further = "no seed has all three"
    elif not math.isfinite(found.low):
        further = f"{high} and {low} may be equal: the share is not known"
    return Finding(
        f"({arm} less {low}) / ({high} less {low})",
        FIELLER,
        len(middle),
        found.estimate,
        found.low,
        found.high,
        word,
        unit="",
        note=f"above {least:g}?{'; ' if further else ''}{further}",
    )


def reversal(evidence: Evidence, arm: str, baseline: str, *, early: Window, late: Window) -> Finding:
    """Whether an arm is ahead of its baseline early and behind it late: an intersection-union test.

    Both one-sided tests must be significant at 5%, with no correction for two of them: the union of two null
    hypotheses is rejected only where each is (Berger 1982, Technometrics 24, 295-300).
    """
    ahead, behind = (
        [a - b for a, b in zip(*paired(evidence, arm, baseline, window=window), strict=True)]
        for window in (early, late)
    )
    p = {"ahead early": one_sided_p(ahead), "behind late": one_sided_p([-value for value in behind])}
    means = [math.fsum(values) / len(values) if values else math.nan for values in (ahead, behind)]
    largest = max(p.values()) if not any(map(math.isnan, p.values())) else math.nan
    turned = largest <= ALPHA
    # Shown to be otherwise where one of the two signs is significantly the wrong one.
    wrong = any(value >= 1 - ALPHA for value in p.values())
    word: Word = "holds" if turned else "does not hold" if wrong else "undecided"
    if lost := _survivors(evidence, arm, baseline):
        word = "undecided"
    return Finding(
        f"{arm} less {baseline}: the sign turns round",
        UNION,
        len(ahead),
        means[0],
        math.nan,
        math.nan,
        word,
        p=p,
        note=f"{_signed(means[0])} points over {_part(early)} of the run, {_signed(means[1])} over {_part(late)}"
        f"{'; ' if lost else ''}{lost}",
    )


def divergence(evidence: Evidence, arm: str, baseline: str) -> Finding:
    """Whether an arm diverges more often than its baseline; undecided with fewer than `LEAST_RUNS` of either."""
    own, others = (list(evidence.diverged(name).values()) for name in (arm, baseline))
    counts = (sum(own), sum(others))
    p = fisher_p(counts, (len(own) - counts[0], len(others) - counts[1]))
    few = min(len(own), len(others)) < LEAST_RUNS
    more = not few and counts[0] / len(own) > counts[1] / len(others)
    return Finding(
        f"{arm} diverges, {baseline} does not",
        FISHER,
        len(own) + len(others),
        100.0 * counts[0] / len(own) if own else math.nan,
        math.nan,
        math.nan,
        "undecided" if few or (more and p > ALPHA) else "holds" if more else "does not hold",
        unit="%",
        p={"two-sided": p},
        note=f"{counts[0]} of {len(own)} runs against {counts[1]} of {len(others)}",
    )


def identity(what: str, error: float, tolerance: float, *, n: int) -> Finding:
    """Whether a formula holds to rounding: the largest error over n cases."""
    word: Word = "holds" if error <= tolerance else "does not hold"
    return Finding(what, IDENTITY, n, error, math.nan, math.nan, word, unit="", note=f"at most {tolerance:.0e}")


def verdict(
    claim: str,
    findings: Sequence[Finding],
    *,
    holds: Sequence[Word],
    fails: Sequence[Word],
    sentence: str = "",
) -> Verdict:
    """A verdict from the first finding, which the sentence tells; the others stand in the table of tests.

    Args:
        holds: words of the first finding with which the claim holds.
        fails: words with which it does not. With any other it is open.
        sentence: what is said further.
    """
    first = findings[0]
    outcome = True if first.word in holds else False if first.word in fails else None
    return Verdict(claim, first.word, outcome, f"{describe(first)}{' ' if sentence else ''}{sentence}", tuple(findings))


def together(
    claim: str, findings: Sequence[Finding], *, words: Sequence[Word] | None = None, sentence: str = ""
) -> Verdict:
    """A verdict that holds where every word is "holds", and does not where any is "does not hold".

    Args:
        words: what decides, of the first findings; those of all findings unless given.
        sentence: what is said further.
    """
    words = [finding.word for finding in findings] if words is None else words
    word: Word = "holds" if all(each == "holds" for each in words) else "undecided"
    if "does not hold" in words:
        word = "does not hold"
    outcome = {"holds": True, "does not hold": False}.get(word)
    told = " ".join(describe(finding) for finding in findings[: len(words)])
    return Verdict(claim, word, outcome, f"{told}{' ' if sentence else ''}{sentence}", tuple(findings))


def is_worse(finding: Finding) -> Word:
    """Whether a comparison says that the arm is worse at all, by however little: its whole interval is below 0."""
    if finding.lost:
        return "undecided"
    if finding.high < 0:
        return "holds"
    return "does not hold" if finding.low > 0 or finding.word in AS_GOOD else "undecided"


def opposite(word: Word) -> Word:
    """Of "holds" and "does not hold" the other; any other word stays open."""
    other: dict[str, Word] = {"holds": "does not hold", "does not hold": "holds"}
    return other.get(word, "undecided")


def is_as_good(finding: Finding) -> Word:
    """Whether a comparison says that the arm loses no more than the margin."""
    return "holds" if finding.word in WITHIN else "does not hold" if finding.word in WORSE else "undecided"


def describe(finding: Finding) -> str:
    """A finding as a sentence."""
    if finding.test == PAIRED_T:
        arm, _, baseline = finding.what.partition(" less ")
        told, further = _SENTENCES[finding.word], finding.note
        if _OPEN in further:
            remark, _, further = further.partition("; ")
            sign = remark.removesuffix(_OPEN)
            told = f"{{arm}} is {sign} than {{baseline}}{_OPEN}, with the margin of"
        text = f"{told.format(arm=arm, baseline=baseline)} {finding.margin:g} points"
        numbers = f"{_signed(finding.estimate)} ({_interval(finding)}), {_pairs(finding)}" if finding.n else "no pairs"
        return f"{_capital(text)}: {numbers}{'; ' if further else ''}{further}."
    if finding.test == FIELLER:
        asked, _, further = finding.note.partition("; ")
        found = f"is {finding.estimate:.2f} ({_interval(finding)}), {_pairs(finding)}" if finding.n else "is not known"
        return f"{finding.what} {found}. {_capital(asked)} {_capital(finding.word)}{'; ' if further else ''}{further}."
    if finding.test == UNION:
        p = ", ".join(f"{name} p = {value:.2g}" for name, value in finding.p.items())
        return f"{_capital(finding.what)}? {_capital(finding.word)}: {finding.note}; {p}."
    if finding.test == FISHER:
        return f"{_capital(finding.what)}? {_capital(finding.word)}: {finding.note}, p = {finding.p['two-sided']:.2g}."
    if finding.test == IDENTITY:
        return f"{_capital(finding.what)}: {finding.word}, largest error {finding.estimate:.1e} ({finding.note})."
    interval = f" ({_interval(finding)})" if finding.low < finding.high else ""
    return f"{_capital(finding.what)}: {finding.estimate:.3g}{interval}."


def paired(evidence: Evidence, *arms: str, window: Window = LAST_QUARTER) -> list[list[float]]:
    """The accuracies of several arms, of the seeds that all of them have, in the order of the seeds."""
    found = [evidence.accuracy(arm, window) for arm in arms]
    seeds = sorted(set.intersection(*(set(values) for values in found)))
    return [[values[seed] for seed in seeds] for values in found]


def _interval(finding: Finding) -> str:
    if math.isnan(finding.low):
        return "no interval"
    if math.isinf(finding.low):
        return "unbounded interval"
    sign = "" if finding.margin is None else "+"  # of differences
    return f"{finding.low:{sign}.2f} to {finding.high:{sign}.2f}"


def _pairs(finding: Finding) -> str:
    return f"{finding.n} pairs of seeds"


def _signed(value: float) -> str:
    return f"{value:+.2f}"


def _part(window: Window) -> str:
    return f"{100 * window[0]:g} to {100 * window[1]:g}%"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
