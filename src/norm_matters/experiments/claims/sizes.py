"""Settings that several experiments share, by scale."""

from typing import Any, Final

from norm_matters.experiments.claims.recipe import Scale

SMOKE: Final[dict[str, Any]] = {
    "model.name": "resnet8",
    "data.batch_size": 128,
    "data.workers": 0,
    "regime.name": "resnet-cifar",
    "regime.lr": 0.1,
    "train.epochs": 2,
    "train.instruments": "none",
}
"""Two epochs of scikit-learn's digits: every path of the code in a second, and no knowledge."""

SMOKE_ABOUT: Final = "Smoke scale: two epochs of 1,437 digits show that everything runs; its verdicts mean nothing."

VGG_SMALL: Final[dict[str, Any]] = {
    "model.name": "vgg11",
    "model.options.width": 8,
    "data.batch_size": 128,
    "regime.name": "vgg-cifar",
}
"""VGG11 at an eighth of its width, with a LR drop by 10 after every quarter of the epochs."""

CIFAR: Final = "cifar10"


def imagenet(model: str, *, epochs: int, lr: float = 0.1) -> dict[str, Any]:
    """The paper's training on ImageNet: batch 256, LR drops by 10 after 30, 60 and 90 epochs, weight decay 1e-4."""
    first = {"epoch": 0, "optimizer": "SGD", "lr": lr, "momentum": 0.9, "weight_decay": 1e-4}
    drops = [{"epoch": 30 * drop, "lr": lr / 10**drop} for drop in (1, 2, 3)]
    return {
        "model.name": model,
        "data.batch_size": 256,
        "regime.phases": [first, *drops],
        "train.epochs": epochs,
    }


def norm_scales(*, small_about: str, paper_epochs: int) -> dict[str, Scale]:
    """The scales of an experiment whose arms differ by their norm alone: digits, VGG11, the paper's ResNet-18."""
    return {
        "smoke": Scale(SMOKE, 2, "digits", SMOKE_ABOUT),
        "small": Scale(
            {**VGG_SMALL, "train.epochs": 6, "train.instruments": "none"},
            5,
            CIFAR,
            "Small scale: VGG11 at an eighth of its width on CIFAR-10 for 6 epochs in place of ResNet-18 on ImageNet "
            f"for {small_about}",
        ),
        "paper": Scale(
            imagenet("resnet18", epochs=paper_epochs),
            3,
            "imagenet",
            f"Paper scale: ResNet-18 on ImageNet, {paper_epochs} epochs, three seeds.",
        ),
    }


def norm_setting(spec: str) -> dict[str, str]:
    """The settings of an arm that differs by its norm alone."""
    return {"model.norm": spec}
