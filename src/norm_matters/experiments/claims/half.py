"""HP-1 and HP-2: statistics in half precision, with formats and accumulators named and both norms cast alike."""

import math
from collections.abc import Sequence

import numpy as np

from norm_matters.experiments.claims.decide import WITHIN, WORSE, compare, divergence, is_as_good, together, verdict
from norm_matters.experiments.claims.motion import measurements_of
from norm_matters.experiments.claims.recipe import (
    Arm,
    Claim,
    Evidence,
    Finding,
    PaperCurve,
    Recipe,
    Scale,
    Table,
    Verdict,
    Word,
)
from norm_matters.experiments.claims.sizes import CIFAR, SMOKE, SMOKE_ABOUT, VGG_SMALL, imagenet

_FIGURE = "half_precision_imagenet_error"
_SIGMAS = (1e-3, 1e-2, 1e-1, 1.0, 1e1, 1e2, 1e3)


def _beside_float32(evidence: Evidence, arm: str) -> tuple[Finding, Finding, bool]:
    """An arm beside L2 in float32: its accuracy, how often it diverges, and whether it does so more often."""
    more = divergence(evidence, arm, "l2")
    return compare(evidence, arm, "l2"), more, more.word == "holds"


def _trains(evidence: Evidence) -> Verdict:
    beside, more, breaks = _beside_float32(evidence, "l1-fp16")
    further = [compare(evidence, "l2-fp16", "l2")] if evidence.ended("l2-fp16") else []
    if breaks:  # what is left of it decides nothing, but so many are not left by chance
        return together("HP-1", [more, beside, *further], words=["does not hold"])
    return verdict("HP-1", [beside, more, *further], holds=WITHIN, fails=WORSE)


def _diverges(evidence: Evidence) -> Verdict:
    return together("HP-2", [divergence(evidence, "l2-fp16", "l1-fp16")])


def _survives(evidence: Evidence) -> Verdict:
    wide, more, breaks = _beside_float32(evidence, "l2-fp16")
    narrow = divergence(evidence, "l2-fp16-narrow", "l2-fp16")
    further = [divergence(evidence, "l1-fp16-narrow", "l1-fp16")] if evidence.ended("l1-fp16-narrow") else []
    survives: Word = "does not hold" if breaks else is_as_good(wide)
    return together("Q-HALF", [wide, narrow, more, *further], words=[survives, narrow.word])


def _numerics(scale: str, device: str) -> list[Table]:
    """What breaks at which sigma, on Gaussian values: no training is needed to see it."""
    from norm_matters.bench.numerics import numerics_cases

    cases = numerics_cases(
        ("l2", "l1"),
        ("fp16",),
        accumulators=("fp32", "pairwise"),
        sigmas=_SIGMAS,
        n=16_384 if scale == "smoke" else 131_072,
    )
    rows = [
        {
            "norm": each.norm,
            "format": each.format,
            "accumulator": each.accumulator,
            "n": each.n,
            "sigma": each.sigma,
            "estimate / sigma": each.ratio if math.isfinite(each.ratio) else str(each.ratio),
            "verdict": each.verdict,
        }
        for case in cases
        for each in case.measure()
    ]
    note = "One batch of n normal values of that sigma; the ratio is to the same norm's estimate in float64."
    return [Table("numerics", "What breaks at which sigma", rows, note)]


def _sigma_per_layer(evidence: Evidence) -> Sequence[Table]:
    """The range of each layer's sigma over all epochs, channels and seeds."""
    found: dict[tuple[str, str], list[np.ndarray]] = {}
    for arm, runs in evidence.runs.items():
        for run in runs.values():
            measured = measurements_of(run.folder) if run.rows else None
            for layer, values in (measured.columns.get("sigma", {}) if measured else {}).items():
                found.setdefault((arm, layer), []).append(values)
    rows = []
    for (arm, layer), parts in found.items():
        values = np.concatenate(parts)
        values = values[np.isfinite(values)]
        if values.size:
            rows.append({"arm": arm, "layer": layer, "smallest": float(values.min()), "largest": float(values.max())})
    note = "Of the running statistics at the end of each epoch, over all channels, epochs and seeds."
    return [Table("sigma", "Sigma per layer", rows, note)]


def _fp16(norm: str, accumulator: str) -> dict[str, str]:
    return {"model.norm": f"{norm}:stats_format=fp16,accumulator={accumulator}"}


_SMALL = {**VGG_SMALL, "train.epochs": 3}

RECIPE = Recipe(
    id="half",
    question="Does L1 train with its statistics in half precision, and does L2 diverge?",
    claims=(
        Claim(
            "HP-1",
            "L1 trains in half precision as L2 does in float32.",
            "ImageNet, top-1 error of the last 10 of 120 epochs: 33.57, against 33.25 for the float32 baseline.",
            "the 90% interval of l1-fp16 less l2 lies inside the margin, or above it; it fails where it lies below, or "
            "where more runs of l1-fp16 diverge, by Fisher's exact test at 5%",
            ("l1-fp16", "l2"),
            _trains,
        ),
        Claim(
            "HP-2",
            "L2 in half precision diverges where L1 does not.",
            "ImageNet: error rises from 77 to 97 within 20 epochs, with a float32 accumulator.",
            "more runs of l2-fp16 diverge than of l1-fp16, by Fisher's exact test at 5%; it fails where no more do; "
            "eight seeds or more",
            ("l2-fp16", "l1-fp16"),
            _diverges,
        ),
        Claim(
            "Q-HALF",
            "What L2 needs in half precision is a float32 accumulator.",
            "",
            "with it, L2 loses no more than the margin against float32 and diverges no more often; with partial sums "
            "in half precision it does, by Fisher's exact test at 5%",
            ("l2", "l2-fp16", "l2-fp16-narrow"),
            _survives,
        ),
    ),
    arms=(
        Arm("l2", "L2, statistics in float32.", {"model.norm": "l2"}),
        Arm("l1-fp16", "L1: terms, mean and sigma in float16; sums in float32.", _fp16("l1", "fp32")),
        Arm("l2-fp16", "L2: terms, mean, variance and sigma in float16; sums in float32.", _fp16("l2", "fp32")),
        Arm("l1-fp16-narrow", "L1: partial sums in float16 too, added in pairs.", _fp16("l1", "pairwise")),
        Arm("l2-fp16-narrow", "L2: partial sums in float16 too, added in pairs.", _fp16("l2", "pairwise")),
    ),
    baseline="l2",
    diverged=20.0,
    differs="Both norms are cast at the same places (docs/numerics.md says where), forward and backward; the rest of "
    "the network stays in float32. One thing by which L2 breaks in half precision is left out: the backward pass takes "
    "powers of sigma in float32, where autograd's in float16 are infinite for sigma of 0.01 or less. The authors' code "
    "lowers the statistics' path of the norm too, in ways that differ between the norms.",
    paper_curves={
        "l2": PaperCurve(_FIGURE, "baseline", "float32 baseline"),
        "l1-fp16": PaperCurve(_FIGURE, "L1_fp16", "L1 in float16"),
        "l2-fp16": PaperCurve(_FIGURE, "L2_fp16_fp32acc", "L2 in float16, float32 accumulator"),
    },
    compute=_numerics,
    look=_sigma_per_layer,
    scales={
        "smoke": Scale({**SMOKE, "train.epochs": 1, "train.instruments": "default"}, 2, "digits", SMOKE_ABOUT),
        "small": Scale(
            _SMALL,
            8,
            CIFAR,
            "Small scale: VGG11 at an eighth of its width on CIFAR-10 for 3 epochs in place of ImageNet for 120. 40 "
            "runs, about an hour and a half on 2 cores: half precision is simulated, which takes three times as long.",
        ),
        "paper": Scale(
            imagenet("resnet18", epochs=120), 8, "imagenet", "Paper scale: ResNet-18 on ImageNet, 120 epochs."
        ),
    },
)
