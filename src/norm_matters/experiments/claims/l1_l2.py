"""Is L1 within 0.2 points of L2? A residual network on CIFAR-10, with as many seeds as a pilot asks for."""

from norm_matters.experiments.claims.decide import compare, verdict
from norm_matters.experiments.claims.recipe import Arm, Claim, Recipe, Scale
from norm_matters.experiments.claims.sizes import CIFAR, SMOKE, SMOKE_ABOUT

_WITHIN = ("equal", "worse but within the margin", "better but within the margin")

RECIPE = Recipe(
    id="l1-l2",
    question="Is L1 batch norm within 0.2 points of L2 in a residual network on CIFAR-10?",
    claims=(
        Claim(
            "Q-L1",
            "L1 is within 0.2 points of L2.",
            "",
            "the 90% interval of l1 less l2 lies inside -0.2 to 0.2; it fails where it lies outside",
            ("l1", "l2"),
            lambda evidence: verdict("Q-L1", [compare(evidence, "l1", "l2")], holds=_WITHIN, fails=("worse", "better")),
        ),
    ),
    arms=(Arm("l2", "L2.", {"model.norm": "l2"}), Arm("l1", "L1.", {"model.norm": "l1"})),
    baseline="l2",
    margin=0.2,
    diverged=20.0,
    differs="The paper has no such experiment: its residual networks are trained on ImageNet.",
    scales={
        "smoke": Scale(SMOKE, 2, "digits", SMOKE_ABOUT),
        "small": Scale(
            {
                "model.name": "resnet20",
                "model.options.width": 8,
                "data.batch_size": 128,
                "regime.name": "resnet-cifar",
                "train.epochs": 5,
                "train.instruments": "none",
            },
            5,
            CIFAR,
            "Small scale: resnet20 at half its width for 5 epochs. 10 runs, about an hour on 2 cores.",
        ),
        "paper": Scale(
            {
                "model.name": "resnet20",
                "data.batch_size": 128,
                "regime.name": "resnet-cifar",
                "train.epochs": 30,
                "train.instruments": "none",
            },
            10,
            CIFAR,
            "Paper scale: resnet20 for 30 epochs, on one GPU.",
        ),
    },
)
