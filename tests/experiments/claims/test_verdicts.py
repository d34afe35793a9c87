"""What each recipe makes of accuracies that somebody might find: the deciders, case by case."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

from norm_matters.experiments.claims import RECIPES
from norm_matters.experiments.claims.recipe import Evidence, RunRecord, Verdict

STOPPED = None
"""The accuracy of a run that stopped on numbers that are not finite."""
Accuracies = Sequence[float | None]


def around(accuracy: float, count: int = 5) -> list[float]:
    """Seeds around an accuracy; each accuracy has noise of its own, so that differences of two arms have some too."""
    draw = np.random.default_rng(round(1000 * accuracy))
    return [accuracy + float(value) for value in draw.normal(0, 0.1, count)]


def judge(recipe: str, claim: str, arms: Mapping[str, Accuracies | float]) -> Verdict:
    """The verdict on arms with these accuracies, of each seed or on the average."""
    found = RECIPES.get(recipe)
    epochs = int(found.scales["small"].config["train.epochs"])
    runs = {}
    for arm, given in arms.items():
        values = around(given) if isinstance(given, float) else given
        runs[arm] = {
            seed: RunRecord(arm, seed, Path(arm), "diverged", [])
            if value is None
            else RunRecord(
                arm, seed, Path(arm), "done", [{"epoch": n + 1, "val_error1": 100 - value} for n in range(epochs)]
            )
            for seed, value in enumerate(values)
        }
    evidence = Evidence(found, "small", runs, {}, (7.8,))
    return next(each for each in found.claims if each.id == claim).judge(evidence)


LOST = [60.0, 60.1, STOPPED, STOPPED, STOPPED]


@pytest.mark.parametrize(
    ("l1", "word", "holds"),
    [
        (70.05, "equal", True),
        ([70.2, 70.3, 70.1, 70.3, 70.2], "better but within the margin", True),
        (68.0, "worse", False),
        ([69.3, 69.6, 69.4, 69.7, 69.5], "undecided", None),
        (LOST, "undecided", None),
    ],
)
@pytest.mark.parametrize(
    ("recipe", "claim", "arm"), [("lp", "LP-1", "l1"), ("half", "HP-1", "l1-fp16"), ("resnet18", "Q-TIMM", "l1")]
)
def test_as_good_as_l2(recipe: str, claim: str, arm: str, l1: Accuracies, word: str, holds: bool | None) -> None:
    found = judge(recipe, claim, {"l2": [70.0, 70.01, 69.99, 70.02, 70.0], arm: l1})
    assert (found.word, found.holds) == (word, holds)


@pytest.mark.parametrize(
    ("linf", "topk", "holds"),
    [(68.0, 69.8, True), (68.0, 68.1, False), (72.0, 71.0, False), (68.0, LOST, None), (LOST, 69.8, None)],
)
def test_linf_is_worse_and_topk_closes_the_gap(linf: Accuracies, topk: Accuracies, holds: bool | None) -> None:
    assert judge("lp", "LP-2", {"l2": 70.0, "linf-paper": linf, "topk-paper": topk}).holds is holds


def test_what_is_left_of_an_arm_that_stopped_decides_nothing() -> None:
    stopped = judge(
        "lp", "LP-2", {"l2": [70.0, 70.1, STOPPED, STOPPED, STOPPED], "linf-paper": 68.0, "topk-paper": 69.8}
    )
    assert stopped.holds is None
    assert "stopped on numbers that are not finite" in stopped.sentence


@pytest.mark.parametrize(
    ("paper", "noise", "calibrated", "holds"),
    [
        (68.0, 68.3, 68.2, True),  # the noise alone costs as much, and the constant makes up for nothing
        (68.0, 69.8, 68.2, False),  # the noise costs nothing
        (68.0, 68.3, 69.8, False),  # the constant explains it as well
        (72.0, 71.8, 72.0, False),  # there is no deficit
        (70.0, 70.05, 70.0, False),
        (68.0, 69.05, 68.2, None),
    ],
)
def test_the_deficit_of_linf_is_its_noise(paper: float, noise: float, calibrated: float, holds: bool | None) -> None:
    arms = {"l2": 70.0, "linf-paper": paper, "l2-noise-linf": noise, "linf": calibrated}
    assert judge("lp", "Q-NOISE", arms).holds is holds


@pytest.mark.parametrize(
    ("quarter", "four", "holds"),
    [
        (68.0, 68.5, True),
        (68.0, 70.05, False),
        ([70.6, 70.1, 70.7, 70.3, 70.5], 68.0, False),  # better for certain, by how much is open
        (LOST, 68.0, None),
    ],
)
def test_the_constant_matters(quarter: Accuracies, four: Accuracies, holds: bool | None) -> None:
    assert judge("constant", "LP-3", {"l1": 70.0, "quarter": quarter, "four": four}).holds is holds


@pytest.mark.parametrize(
    ("quarter", "undone", "four", "four_undone", "holds"),
    [
        (68.0, 70.05, 68.5, 70.1, True),
        (68.0, 68.0, 68.5, 70.1, False),
        (70.05, 70.1, 70.05, 70.1, None),  # nothing to undo
        (70.05, 68.0, 68.5, 70.1, True),  # of the one that has something to undo
        (68.0, LOST, 68.5, 70.1, None),
        (LOST, 68.0, 68.5, 70.1, None),  # of a constant that stopped it is not known what it costs
    ],
)
def test_gammas_start_undoes_the_constant(
    quarter: Accuracies, undone: Accuracies, four: float, four_undone: float, holds: bool | None
) -> None:
    arms = {"l1": 70.0, "quarter": quarter, "quarter-undone": undone, "four": four, "four-undone": four_undone}
    assert judge("constant", "Q-GAMMA", arms).holds is holds


@pytest.mark.parametrize(
    ("l1", "word", "holds"),
    [
        (70.0, "equal", True),
        ([70.1, 70.11, 70.12, 70.1, 70.11], "better but within the margin", True),
        ([69.9, 69.91, 69.92, 69.9, 69.91], "worse but within the margin", True),
        (71.0, "better", False),  # within is within
        (69.0, "worse", False),
        ([70.1, 70.3, 70.1, 70.3, 70.2], "undecided", None),
    ],
)
def test_l1_is_within_the_margin_on_both_sides(l1: Accuracies, word: str, holds: bool | None) -> None:
    found = judge("l1-l2", "Q-L1", {"l2": [70.0, 70.01, 69.99, 70.02, 70.0], "l1": l1})
    assert (found.word, found.holds) == (word, holds)


def runs_of(stopped: int, count: int = 8) -> list[float | None]:
    return [STOPPED] * stopped + around(70.0, count - stopped)


@pytest.mark.parametrize(
    ("l2", "l1", "holds"),
    [
        (runs_of(8), runs_of(0), True),
        (runs_of(0), runs_of(0), False),
        (runs_of(8), runs_of(8), False),
        (runs_of(2), runs_of(0), None),
        (runs_of(4, 4), runs_of(0, 4), None),  # too few, however clear
        (runs_of(8), runs_of(0, 4), None),
    ],
)
def test_l2_diverges_in_half_precision(l2: Accuracies, l1: Accuracies, holds: bool | None) -> None:
    assert judge("half", "HP-2", {"l2-fp16": l2, "l1-fp16": l1}).holds is holds


@pytest.mark.parametrize(("stopped", "holds"), [(8, False), (5, False), (3, None), (0, True)])
def test_l1_that_diverges_in_half_precision_does_not_train_in_it(stopped: int, holds: bool | None) -> None:
    found = judge(
        "half", "HP-1", {"l2": around(70.0, 8), "l1-fp16": [*runs_of(stopped)[:stopped], *around(70.05, 8)[stopped:]]}
    )
    assert found.holds is holds


@pytest.mark.parametrize(
    ("wide", "narrow", "holds"),
    [
        (around(70.05, 8), runs_of(8), True),
        (around(70.05, 8), runs_of(0), False),
        (around(68.0, 8), runs_of(8), False),
        (runs_of(8), runs_of(8), False),  # the accumulator does not save it
        (runs_of(3), runs_of(8), None),
    ],
)
def test_l2_needs_a_wide_accumulator(wide: Accuracies, narrow: Accuracies, holds: bool | None) -> None:
    arms = {"l2": around(70.0, 8), "l2-fp16": wide, "l2-fp16-narrow": narrow}
    assert judge("half", "Q-HALF", arms).holds is holds


@pytest.mark.parametrize(
    ("weight", "bounded", "holds"),
    [(66.0, 69.5, True), (66.0, 66.5, False), (70.05, 70.0, False), (LOST, 69.5, None), (66.0, LOST, None)],
)
def test_bounded_weight_norm_closes_the_gap(weight: Accuracies, bounded: Accuracies, holds: bool | None) -> None:
    arms = {"batch-norm": 70.0, "weight-norm": weight, "bounded": bounded}
    assert judge("bounded", "BW-1", arms).holds is holds


@pytest.mark.parametrize(("corrected", "holds"), [(90.5, True), (LOST, None), ([89.3, 89.4, None, None, None], None)])
def test_corrected_runs_that_stopped_decide_nothing(corrected: Accuracies, holds: bool | None) -> None:
    found = judge("wd", "WD-1", {"on": 90.5, "off": 89.3, "corrected": corrected})
    assert found.holds is holds
    assert "(corrected less off) / (on less off)" in found.sentence


def test_small_batches_are_no_large_ones() -> None:
    arms = {"l2-b128": 90.0, "l1-b128": 90.05, "l2-b512": 90.0, "l1-b512": 90.05}
    assert judge("batch-size", "Q-BATCH-L1", arms).holds is None
    assert judge("batch-size", "Q-BATCH-L1", {"l2-b8": 90.0, "l1-b8": 90.05, **arms}).holds is True
    assert judge("batch-size", "Q-BATCH-L1", {"l2-b8": 90.0, "l1-b8": 80.0, **arms}).holds is False
