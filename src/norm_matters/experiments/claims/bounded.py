"""BW-1: batch norm, weight norm, bounded weight norm and the released variant, each with the LR that suits it."""

from typing import Any

from norm_matters.experiments.claims.decide import compare, is_worse, share, together
from norm_matters.experiments.claims.recipe import Arm, Choice, Claim, Evidence, PaperCurve, Recipe, Scale, Verdict
from norm_matters.experiments.claims.sizes import CIFAR, SMOKE, SMOKE_ABOUT, VGG_SMALL

_FIGURE = "bounded_weight_norm_resnet50_imagenet_error"
_CLIP = 5.0


def _between(evidence: Evidence) -> Verdict:
    weight = compare(evidence, "weight-norm", "batch-norm")
    closed = share(evidence, "bounded", low="weight-norm", high="batch-norm")
    further = [compare(evidence, "bounded", "batch-norm")]
    if evidence.ended("released"):
        further += [compare(evidence, "released", "batch-norm"), compare(evidence, "bounded", "released")]
    return together("BW-1", [weight, closed, *further], words=[is_worse(weight), closed.word])


def _weights(spec: str) -> dict[str, Any]:
    """A weight norm with a mean-only batch norm behind each convolution, its gradients clipped as in the paper."""
    return {"model.norm": "mean", "model.weight_norm": spec, "train.clip_norm": _CLIP}


def _phases(arm: str, lr: float, *, drops: tuple[str, ...], decay: float) -> dict[str, Any]:
    """SGD with LR drops by 10; weight decay on everything for batch norm, on the last layer alone for weight norms."""
    first: dict[str, Any] = {"epoch": 0, "optimizer": "SGD", "lr": lr, "momentum": 0.9}
    if arm == "batch-norm":
        first["weight_decay"] = decay
    else:
        first |= {"weight_decay": 0.0, "groups": {"last": {"weight_decay": 1e-4}}}
    later = [{"epoch": start, "lr": lr / 10**count} for count, start in enumerate(drops, start=1)]
    return {"regime.phases": [first, *later]}


def _quarters(arm: str, lr: float) -> dict[str, Any]:
    return _phases(arm, lr, drops=("25%", "50%", "75%"), decay=5e-4)


def _imagenet(arm: str, lr: float) -> dict[str, Any]:
    return _phases(arm, lr, drops=("30ep", "60ep", "90ep"), decay=1e-4)


def _without_regime(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if not key.startswith("regime.")}


RECIPE = Recipe(
    id="bounded",
    question="Does bounded weight norm nearly match batch norm, where weight norm fails?",
    claims=(
        Claim(
            "BW-1",
            "Bounded weight norm nearly matches batch norm where weight norm fails.",
            "ResNet-50 on ImageNet, top-1 accuracy: 74.0 to 74.2 (batch norm), 71.8 to 72.4 (bounded weight norm), 67 "
            "(weight norm, of other work).",
            "the interval of weight norm less batch norm lies below 0, and that of the share of this gap that bounded "
            "weight norm closes above one half",
            ("batch-norm", "bounded", "weight-norm"),
            _between,
        ),
    ),
    arms=(
        Arm("batch-norm", "Batch norm (L2).", {"model.norm": "l2"}),
        Arm("bounded", "Bounded weight norm: one fixed norm for all channels of a layer.", _weights("bounded:p=2")),
        Arm("weight-norm", "Weight norm: a learned norm per channel.", _weights("weight")),
        Arm(
            "released",
            "The released code's variant: learned norms per channel, of fixed total.",
            _weights("bounded:p=2,learn_g=true"),
        ),
    ),
    baseline="batch-norm",
    diverged=20.0,
    differs="Each arm chooses its learning rate on images held back from the training set. He initialisation comes "
    "before the weights are wrapped. All weight norms have a mean-only batch norm behind each convolution, gradients "
    "clipped at 5, and weight decay (1e-4) on the last layer alone.",
    paper_curves={
        "batch-norm": PaperCurve(_FIGURE, "batchnorm", "batch norm"),
        "bounded": PaperCurve(_FIGURE, "bwn", "bounded weight norm"),
        "weight-norm": PaperCurve(_FIGURE, "wn_gg", "weight norm (other work)"),
    },
    scales={
        "smoke": Scale(
            _without_regime(SMOKE),
            2,
            "digits",
            SMOKE_ABOUT,
            choice=Choice("learning rate", (0.1, 0.03), _quarters),
        ),
        "small": Scale(
            {**_without_regime(VGG_SMALL), "train.epochs": 6, "train.instruments": "none"},
            5,
            CIFAR,
            "Small scale: VGG11 at an eighth of its width on CIFAR-10 for 6 epochs in place of ResNet-50 on ImageNet "
            "for 90. 12 runs to choose learning rates and 20 to compare, about an hour on 2 cores.",
            choice=Choice("learning rate", (0.1, 0.03, 0.3), _quarters),
        ),
        "paper": Scale(
            {"model.name": "resnet50", "data.batch_size": 256, "train.epochs": 91},
            3,
            "imagenet",
            "Paper scale: ResNet-50 on ImageNet, 91 epochs, three seeds.",
            choice=Choice("learning rate", (0.2, 0.1), _imagenet),
        ),
    },
)
