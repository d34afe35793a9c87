"""A library's own network with its norms converted: timm's resnet18 with L1 against L2."""

from norm_matters.experiments.claims.decide import WITHIN, WORSE, compare, verdict
from norm_matters.experiments.claims.recipe import Arm, Claim, Recipe, Scale
from norm_matters.experiments.claims.sizes import CIFAR, SMOKE_ABOUT, imagenet

_SMOKE = {
    "model.name": "timm:resnet18",
    "data.batch_size": 256,
    "data.workers": 0,
    "regime.name": "resnet-cifar",
    "regime.lr": 0.05,
    "train.epochs": 1,
    "train.instruments": "none",
}

RECIPE = Recipe(
    id="resnet18",
    question="Does timm's resnet18, its batch norms converted, train as well with L1 as with L2?",
    claims=(
        Claim(
            "Q-TIMM",
            "timm's resnet18 does as well with L1 as with L2.",
            "",
            "the 90% interval of l1 less l2 lies inside the margin, or above it; it fails where it lies below",
            ("l1", "l2"),
            lambda evidence: verdict("Q-TIMM", [compare(evidence, "l1", "l2")], holds=WITHIN, fails=WORSE),
        ),
    ),
    arms=(
        Arm("l2", "Its batch norms as our L2.", {"model.norm": "l2"}),
        Arm("l1", "Its batch norms as L1.", {"model.norm": "l1"}),
    ),
    baseline="l2",
    diverged=15.0,
    differs="The network is timm's, not the authors'.",
    scales={
        "smoke": Scale(_SMOKE, 2, "digits", SMOKE_ABOUT),
        "small": Scale(
            {**_SMOKE, "data.batch_size": 128, "regime.lr": 0.1, "train.epochs": 3},
            5,
            CIFAR,
            "Small scale: CIFAR-10 at 32 x 32, of which the network's stem leaves 8 x 8, for 3 epochs. 10 runs, about "
            "an hour on 2 cores.",
        ),
        "paper": Scale(
            imagenet("timm:resnet18", epochs=90), 3, "imagenet", "Paper scale: ImageNet, 90 epochs, three seeds."
        ),
    },
)
