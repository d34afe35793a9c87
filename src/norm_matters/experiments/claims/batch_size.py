"""L1, L2, Top(10) and group norm at batch sizes from 2 to 512: which needs a large batch?"""

from collections.abc import Sequence

from norm_matters.experiments.claims.decide import WITHIN, WORSE, compare, verdict
from norm_matters.experiments.claims.recipe import Arm, Claim, Evidence, Recipe, Scale, Table, Verdict
from norm_matters.experiments.claims.sizes import CIFAR, SMOKE_ABOUT
from norm_matters.experiments.statistics import mean_interval

_NORMS = {"l2": "l2", "l1": "l1", "topk": "topk:k=10", "group": "group:groups=8"}
_BATCHES = (2, 8, 32, 128, 512)
_SMOKE_BATCHES = (32, 128)
_LARGE = 128
"""A batch that says nothing about small ones."""

_CONFIG = {
    "model.name": "resnet8",
    "data.workers": 0,
    "regime.name": "resnet-cifar",
    "regime.lr": 0.1,
    "regime.lr_rule": "linear",
    "regime.lr_batch": 128,
    "train.instruments": "none",
}


def _arms(batches: Sequence[int]) -> tuple[Arm, ...]:
    return tuple(
        Arm(f"{name}-b{batch}", f"{name}, {batch} images per step.", {"model.norm": spec, "data.batch_size": batch})
        for batch in batches
        for name, spec in _NORMS.items()
    )


def _beside_l2(claim: str, norm: str) -> Claim:
    """That a norm does as well as L2 at the smallest batch of the scale; at the others it is told."""

    def decide(evidence: Evidence) -> Verdict:
        batches = [batch for batch in _BATCHES if evidence.ended(f"{norm}-b{batch}", f"l2-b{batch}")]
        found = [compare(evidence, f"{norm}-b{batch}", f"l2-b{batch}") for batch in batches]
        small = batches[0] < _LARGE
        return verdict(claim, found, holds=WITHIN if small else (), fails=WORSE if small else ())

    name = {"l1": "L1", "topk": "Top(10)", "group": "Group norm"}[norm]
    return Claim(
        claim,
        f"{name} does as well as L2 at small batches.",
        "",
        f"at the smallest batch that was run, if it is below {_LARGE}, the 90% interval of the difference lies inside "
        "the margin of 1 point, or above it; it fails where it lies below",
        (f"{norm}-b128", "l2-b128"),
        decide,
    )


def _table(evidence: Evidence) -> list[Table]:
    """Mean accuracy, norm by batch size."""
    rows = []
    for name in _NORMS:
        row: dict[str, float | str | None] = {"norm": name}
        for batch in _BATCHES:
            found = mean_interval(list(evidence.accuracy(f"{name}-b{batch}").values()))
            row[f"batch {batch}"] = round(found.mean, 2) if found.n else None
        rows.append(row)
    return [Table("accuracy", "Accuracy by batch size", rows, "Mean test accuracy (%) over the seeds.")]


RECIPE = Recipe(
    id="batch-size",
    question="Which norm needs a large batch: L2, L1, Top(10) or group norm?",
    claims=(_beside_l2("Q-BATCH-L1", "l1"), _beside_l2("Q-BATCH-TOPK", "topk"), _beside_l2("Q-BATCH-GROUP", "group")),
    arms=_arms(_BATCHES),
    baseline="l2-b128",
    margin=1.0,
    diverged=15.0,
    differs="The paper has no such experiment. The learning rate is in proportion to the batch.",
    look=_table,
    scales={
        "smoke": Scale(
            {**_CONFIG, "train.epochs": 1},
            2,
            "digits",
            SMOKE_ABOUT,
            arms=tuple(f"{norm}-b{batch}" for batch in _SMOKE_BATCHES for norm in _NORMS),
        ),
        "small": Scale(
            {**_CONFIG, "train.epochs": 10},
            5,
            "digits",
            "Small scale: scikit-learn's digits (1,437 images of 8 x 8, 360 to test on), 10 epochs of resnet8. 100 "
            "runs, about half an hour on 2 cores.",
        ),
        "paper": Scale(
            {**_CONFIG, "model.name": "resnet20", "train.epochs": 30},
            3,
            CIFAR,
            "Paper scale: resnet20 on CIFAR-10, 30 epochs, on one GPU.",
        ),
    },
)
