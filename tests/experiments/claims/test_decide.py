"""From accuracies to words, at every edge of the margin, and where runs diverged or are missing."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from norm_matters.experiments.claims import decide
from norm_matters.experiments.claims.recipe import Arm, Claim, Evidence, Recipe, RunRecord, Scale, window_accuracy

EPOCHS = 8


def rows_of(accuracies: Sequence[float]) -> list[dict[str, Any]]:
    return [{"epoch": index, "val_error1": 100 - value} for index, value in enumerate(accuracies, start=1)]


def evidence_of(arms: Mapping[str, Sequence[float | Sequence[float] | None]], **options: Any) -> Evidence:
    """Evidence of arms with one accuracy per seed, or a curve of `EPOCHS`; None for a run that diverged."""
    recipe = Recipe(
        "example",
        "?",
        (),
        {"smoke": Scale({"train.epochs": EPOCHS}, 3, "digits", "")},
        tuple(Arm(name, "") for name in arms),
        next(iter(arms)),
        **options,
    )
    runs = {
        arm: {
            seed: RunRecord(arm, seed, Path(arm), "diverged", [])
            if value is None
            else RunRecord(
                arm, seed, Path(arm), "done", rows_of([value] * EPOCHS if isinstance(value, float) else value)
            )
            for seed, value in enumerate(values)
        }
        for arm, values in arms.items()
    }
    return Evidence(recipe, "smoke", runs)


@pytest.mark.parametrize(
    ("low", "high", "word"),
    [
        (-0.4, 0.3, "equal"),
        (-0.4, 0.0, "equal"),
        (-0.4, -0.1, "worse but within the margin"),
        (0.1, 0.4, "better but within the margin"),
        (-2.0, -0.6, "worse"),
        (0.6, 2.0, "better"),
        (-0.6, 0.3, "undecided"),
        (-0.6, -0.1, "undecided"),
        (-0.5, 0.3, "undecided"),
        (-0.6, 0.6, "undecided"),
        (float("nan"), float("nan"), "undecided"),
    ],
)
def test_one_interval_gives_one_word(low: float, high: float, word: str) -> None:
    assert decide.word_of(low, high, 0.5) == word


@given(st.floats(-3, 3), st.floats(0, 3), st.floats(0.01, 2))
def test_words_mirror(low: float, width: float, margin: float) -> None:
    high = low + width
    mirrored = decide.word_of(-high, -low, margin)
    swapped = {"better": "worse", "worse": "better"}
    word = decide.word_of(low, high, margin)
    expected = next((word.replace(a, b) for a, b in swapped.items() if word.startswith(a)), word)
    assert mirrored == expected


def test_a_comparison_is_of_pairs_of_the_same_seed() -> None:
    # The seeds differ by 10 points, the arms by 0.1: only pairs can see that.
    evidence = evidence_of({"l2": [70.0, 80.0, 90.0], "l1": [70.1, 80.12, 90.08]})
    found = decide.compare(evidence, "l1", "l2")
    assert (found.what, found.n, found.word) == ("l1 less l2", 3, "better but within the margin")
    assert found.estimate == pytest.approx(0.1)
    reference = stats.ttest_rel([70.1, 80.12, 90.08], [70.0, 80.0, 90.0])
    interval = reference.confidence_interval(0.9)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    assert found.p["two-sided"] == pytest.approx(reference.pvalue)
    assert decide.compare(evidence, "l1", "l2", margin=0.1).word == "undecided"


def test_a_certain_loss_of_unknown_size_is_undecided_and_says_so() -> None:
    evidence = evidence_of({"l2": [80.0, 80.0, 80.0], "l1": [79.5, 79.3, 79.6]})
    found = decide.compare(evidence, "l1", "l2")
    assert found.word == "undecided"
    assert found.note == "worse for certain, by how much is open"
    assert decide.describe(found).startswith("L1 is worse than l2 for certain, by how much is open, with the margin of")
    assert decide.is_worse(found) == "holds"
    assert decide.is_as_good(found) == "undecided"


def test_runs_that_diverged_leave_a_comparison_open() -> None:
    evidence = evidence_of({"l2": [80.0, 80.1, 80.2, 80.1], "l1": [80.0, 80.1, 80.2, None]})
    found = decide.compare(evidence, "l1", "l2")
    assert (found.word, found.n) == ("undecided", 3)
    assert "; 1 of 4 runs of l1 stopped on numbers that are not finite." in decide.describe(found)


def test_runs_that_diverged_and_came_to_their_end_count_and_are_named() -> None:
    evidence = evidence_of({"l2": [80.0, 80.1, 80.2], "l1": [80.0, 80.1, 10.0]})
    worst = evidence.runs["l1"][2]
    evidence = replace(
        evidence, runs={**evidence.runs, "l1": {**evidence.runs["l1"], 2: replace(worst, state="diverged")}}
    )
    found = decide.compare(evidence, "l1", "l2")
    assert found.estimate == pytest.approx(-70.2 / 3)
    assert found.note == "1 of 3 runs of l1 diverged, and count"


def test_the_metric_is_the_mean_of_the_last_quarter() -> None:
    curve = [0.0, 10.0, 20.0, 30.0, 40.0, 50.0, 60.0, 80.0]
    assert window_accuracy(rows_of(curve), (0.75, 1.0)) == 70
    assert window_accuracy(rows_of(curve), (0.125, 0.25)) == 10
    assert window_accuracy(rows_of([5.0, 7.0]), (0.75, 1.0)) == 7
    assert window_accuracy(rows_of([5.0]), (0.0, 0.25)) == 5
    assert math.isnan(window_accuracy([{"val_error1": 20.0}, {"val_error1": None}], (0.0, 1.0)))


def test_the_papers_windows_are_its_epochs() -> None:
    curve = [float(epoch) for epoch in range(1, 81)]
    found = [window_accuracy(rows_of(curve), window) for window in ((0.125, 0.25), (0.25, 0.5), (0.5, 0.75), (0.75, 1))]
    assert found == [15.5, 30.5, 50.5, 70.5]  # the means of epochs 11-20, 21-40, 41-60 and 61-80


def turning(early: float, late: float) -> list[float]:
    return [50 + early] * (EPOCHS // 2) + [50 + late] * (EPOCHS // 2)


@pytest.mark.parametrize(
    ("early", "late", "word"),
    [
        ((2.0, 2.1, 2.2), (-1.0, -1.1, -1.2), "holds"),
        ((2.0, -2.1, 2.2), (-1.0, -1.1, -1.2), "undecided"),
        ((2.0, 2.1, 2.2), (1.0, 1.1, 1.2), "does not hold"),
        ((-2.0, -2.1, -2.2), (-1.0, -1.1, -1.2), "does not hold"),
    ],
)
def test_a_reversal_needs_both_signs(early: Sequence[float], late: Sequence[float], word: str) -> None:
    evidence = evidence_of(
        {"on": [turning(0, 0)] * 3, "off": [turning(a, b) for a, b in zip(early, late, strict=True)]}
    )
    found = decide.reversal(evidence, "off", "on", early=(0.0, 0.5), late=(0.5, 1.0))
    assert found.word == word
    assert found.p["ahead early"] == pytest.approx(stats.ttest_1samp(early, 0, alternative="greater").pvalue)
    assert found.p["behind late"] == pytest.approx(stats.ttest_1samp(late, 0, alternative="less").pvalue)


def test_a_reversal_takes_no_correction_for_two_tests() -> None:
    # Either p value is 0.03: each is below 5%, twice either would not be.
    early = [1.0, 2.0, 6.0, 2.4]
    assert 0.025 < stats.ttest_1samp(early, 0, alternative="greater").pvalue < 0.05
    evidence = evidence_of({"on": [turning(0, 0)] * 4, "off": [turning(value, -value) for value in early]})
    assert decide.reversal(evidence, "off", "on", early=(0.0, 0.5), late=(0.5, 1.0)).word == "holds"


def test_a_share_of_the_way() -> None:
    evidence = evidence_of({"off": [60.0, 61.0, 62.0], "on": [64.0, 65.1, 66.0], "between": [63.6, 64.7, 65.5]})
    found = decide.share(evidence, "between", low="off", high="on")
    assert found.word == "holds"
    assert found.estimate == pytest.approx((3.6 + 3.7 + 3.5) / (4.0 + 4.1 + 4.0))
    assert decide.share(evidence, "off", low="off", high="on").word == "does not hold"
    assert decide.share(evidence, "between", low="off", high="on", least=0.88).word == "undecided"


def test_a_share_of_no_way_is_unknown() -> None:
    evidence = evidence_of({"off": [60.0, 61.0, 62.0], "on": [60.1, 60.9, 62.0], "between": [60.0, 61.2, 61.8]})
    found = decide.share(evidence, "between", low="off", high="on")
    assert found.word == "undecided"
    assert "may be equal" in found.note


@pytest.mark.parametrize(
    ("own", "others", "word"),
    [(8, 0, "holds"), (5, 0, "holds"), (3, 0, "undecided"), (0, 0, "does not hold"), (0, 8, "does not hold")],
)
def test_divergence(own: int, others: int, word: str) -> None:
    def arm(count: int) -> list[float | None]:
        return [None] * count + [80.0] * (8 - count)

    found = decide.divergence(evidence_of({"l2": arm(others), "l1": arm(own)}), "l1", "l2")
    assert found.word == word
    assert found.note == f"{own} of 8 runs against {others} of 8"


def test_few_seeds_do_not_show_that_nothing_diverges() -> None:
    assert decide.divergence(evidence_of({"l2": [80.0] * 3, "l1": [80.0] * 3}), "l1", "l2").word == "undecided"


def judged(evidence: Evidence, arms: tuple[str, ...]) -> Any:
    claim = Claim(
        "X-1",
        "equal",
        "",
        "",
        arms,
        lambda each: decide.verdict("X-1", [decide.compare(each, "l1", "l2")], holds=decide.WITHIN, fails=decide.WORSE),
    )
    return claim.judge(evidence)


def test_a_claim_whose_arms_are_missing_is_not_run() -> None:
    evidence = evidence_of({"l2": [80.0, 80.1], "l1": [80.0]})
    found = judged(evidence, ("l1", "l2"))
    assert (found.word, found.holds, found.sentence) == ("not run", None, "Not run yet: l1.")


def test_seeds_that_are_left_make_a_verdict_provisional() -> None:
    evidence = evidence_of({"l2": [80.0, 80.1, 80.05], "l1": [80.0, 80.1, 80.05]})
    left = replace(evidence.runs["l1"][2], state="missing", rows=[])
    evidence = replace(evidence, runs={**evidence.runs, "l1": {**evidence.runs["l1"], 2: left}})
    found = judged(evidence, ("l1", "l2"))
    assert (found.word, found.holds) == ("undecided", None)
    assert found.sentence.startswith("Provisional, 2 of 3 seeds of l1; so far equal (holds): L1 and l2 are equal")


def test_without_time_for_decay_a_claim_is_undecided() -> None:
    evidence = evidence_of({"l2": [80.0, 80.1], "l1": [80.0, 80.1]})
    evidence = replace(evidence, recipe=replace(evidence.recipe, equilibrium="l2"), products=(1.9, 7.0))
    found = judged(evidence, ("l1", "l2"))
    assert (found.word, found.holds) == ("undecided", None)
    assert "below 2" in found.sentence
    assert judged(replace(evidence, products=(2.0, 0.1)), ("l1", "l2")).word == "equal"


def test_sentences_say_what_was_found() -> None:
    evidence = evidence_of({"l2": [80.0, 80.0, 80.0], "l1": [80.1, 80.0, 79.9]})
    assert judged(evidence, ("l1", "l2")).sentence == (
        "L1 and l2 are equal within the margin of 0.5 points: +0.00 (-0.17 to +0.17), 3 pairs of seeds."
    )


def test_together_needs_every_word() -> None:
    yes, no = decide.identity("a", 0.0, 1e-10, n=1), decide.identity("b", 1.0, 1e-10, n=1)
    assert decide.together("X", [yes, yes]).holds is True
    assert decide.together("X", [yes, no]).holds is False
    assert decide.together("X", [yes, no], words=["holds", "undecided"]).holds is None
