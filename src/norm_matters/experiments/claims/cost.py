"""What each norm costs: passes over memory, bytes and time, against the paper's claim that L1 is the efficient one."""

import math
import statistics
from collections.abc import Sequence
from functools import partial
from typing import Any

from norm_matters.experiments.claims.decide import together
from norm_matters.experiments.claims.recipe import Claim, Evidence, Finding, Recipe, Scale, Table, Verdict, Word
from norm_matters.experiments.equivalence import CONFIDENCE
from norm_matters.experiments.statistics import mean_interval

_NORMS = ("l2", "l1", "linf", "topk:k=10", "mean")
_SHAPES = {
    "smoke": ("8x16x16x16",),
    "small": ("128x16x32x32", "128x64x8x8", "64x64x56x56", "128x32x64x64"),  # a channel of the last is 2 MiB
    "paper": ("256x64x56x56", "256x256x14x14", "256x512x7x7"),
}
_ROUNDS = {"smoke": 5, "small": 15, "paper": 30}
_TEST = f"paired t of log times, {CONFIDENCE:.0%} interval"


def _compute(scale: str, device: str) -> list[Table]:
    """Forward and backward of each norm with a ReLU, timed in turns; the fastest implementation that there is."""
    from norm_matters.bench.memory import channel_is_cached, fewest_passes, synchroniser
    from norm_matters.bench.norm_arms import Batch, norm_arms
    from norm_matters.bench.norms import parse_shape
    from norm_matters.bench.timing import time_in_turns
    from norm_matters.core.allocator import keep_pages
    from norm_matters.engine.device import resolve_device

    device = str(resolve_device(device))
    if device == "cpu":
        keep_pages()
    costs: list[dict[str, Any]] = []
    ratios: dict[str, list[list[float]]] = {norm: [] for norm in _NORMS}
    for shape in _SHAPES[scale]:
        batch = Batch.draw(parse_shape(shape), "relu", dtype="float32", layout="contiguous", device=device)
        found = norm_arms(_NORMS, "relu", batch.x, compiled=False)
        # Kernels come before plain torch.
        arms = {norm: next(arm for arm in found if arm.norm == norm) for norm in _NORMS}
        seconds = time_in_turns(
            {norm: partial(batch.run, arm) for norm, arm in arms.items()},
            repeats=_ROUNDS[scale],
            synchronise=synchroniser(device),
        )
        for norm, arm in arms.items():
            kept, peak = batch.memory(arm)
            passes = fewest_passes(norm.partition(":")[0], "relu", cached=channel_is_cached(batch.x))
            each = [own / base for own, base in zip(seconds[norm], seconds["l2"], strict=True)]
            ratios[norm].append(each)
            costs.append(
                {
                    "shape": shape,
                    "norm": norm,
                    "device": device,
                    "kernels": arm.implementation,
                    "ms": 1e3 * statistics.median(seconds[norm]),
                    "of l2's time": statistics.median(each),
                    "fewest passes": sum(passes) if passes else None,
                    "bytes kept": kept,
                    "bytes at the peak": peak,
                }
            )
    rounds = [
        {"round": index + 1, "norm": norm, "ratio": math.exp(statistics.fmean(math.log(each[index]) for each in found))}
        for norm, found in ratios.items()
        if norm != "l2"
        for index in range(_ROUNDS[scale])
    ]
    return [
        Table(
            "cost",
            "Cost of each norm",
            costs,
            "Forward and backward in training with a ReLU behind, float32: the median of rounds in which the norms "
            "take turns. Passes: the fewest over the input, its gradient and the output that a norm cannot do without. "
            "Bytes kept between forward and backward, and the most alive at once.",
        ),
        Table("rounds", "Time over L2's, round by round", rounds, "Geometric mean over the shapes."),
    ]


def _faster(evidence: Evidence, norm: str) -> Finding:
    """The time of a norm over L2's."""
    rows: Sequence[Any] = evidence.tables["rounds"].rows
    found = mean_interval([math.log(row["ratio"]) for row in rows if row["norm"] == norm], CONFIDENCE)
    low, high = math.exp(found.low), math.exp(found.high)
    word: Word = "holds" if high < 1 else "does not hold" if low > 1 else "undecided"
    return Finding(f"time of {norm} / time of l2", _TEST, found.n, math.exp(found.mean), low, high, word, unit="")


def _passes(evidence: Evidence) -> Finding:
    """The fewest passes of L1 over those of L2, all shapes together."""
    rows: Sequence[Any] = evidence.tables["cost"].rows
    own, base = (sum(row["fewest passes"] for row in rows if row["norm"] == norm) for norm in ("l1", "l2"))
    word: Word = "holds" if own < base else "does not hold"
    ratio = own / base
    return Finding(
        "passes of l1 / passes of l2", "count", len(_SHAPES[evidence.scale]), ratio, ratio, ratio, word, unit=""
    )


def _time_claim(id: str, norm: str, name: str) -> Claim:
    def decide(evidence: Evidence) -> Verdict:
        return together(id, [_faster(evidence, norm)])

    rule = "the 90% interval of the ratio of times, over rounds, lies below 1; it fails where it lies above"
    return Claim(id, f"{name} takes less time than L2.", "said of L1 in words only.", rule, (), decide)


RECIPE = Recipe(
    id="cost",
    question="What does each norm cost, in passes over memory, bytes and time, and is L1 the efficient one?",
    claims=(
        _time_claim("COST-L1", "l1", "L1"),
        _time_claim("COST-LINF", "linf", "Linf"),
        _time_claim("COST-TOPK", "topk:k=10", "Top(10)"),
        Claim(
            "COST-PASSES",
            "L1 needs fewer passes over memory than L2.",
            "said in words only.",
            "the passes that it cannot do without, forward and backward, are fewer over all shapes: counted, not timed",
            (),
            lambda evidence: together("COST-PASSES", [_passes(evidence)]),
        ),
    ),
    differs="Times are those of this package's norms on this machine: they say nothing of special hardware, which is "
    "what the paper's claim is about.",
    compute=_compute,
    scales={
        "smoke": Scale({}, 0, "", "Smoke scale: one small shape, five rounds; its verdicts mean nothing."),
        "small": Scale({}, 0, "", "Small scale: four shapes, fifteen rounds: some seconds."),
        "paper": Scale({}, 0, "", "Paper scale: shapes of ResNet-18 and 50 at batch 256, on a GPU if there is one."),
    },
)
