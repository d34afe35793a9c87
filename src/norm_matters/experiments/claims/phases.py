"""Whether weight decay has time to act: `2 lr lambda T / (1 - m)` of each phase of a run.

A weight that a norm follows comes to an equilibrium of decay and steps, with a time constant of (1 - m) / (2 lr lambda)
steps: a phase of T steps reaches it where the product is well above 1. The paper's first phase has 7.8.
"""

from dataclasses import dataclass
from typing import Any

from norm_matters.core.clock import Clock
from norm_matters.core.config import RunConfig


@dataclass(frozen=True)
class PhaseProduct:
    """A phase of a regime.

    Attributes:
        epoch: at which it starts, from 0.
        lr, weight_decay, momentum: as it starts, of the parameters without settings of their own.
        product: `2 lr lambda T / (1 - m)`.
    """

    epoch: float
    lr: float
    weight_decay: float
    momentum: float
    product: float


def phase_products(config: RunConfig, *, steps_per_epoch: int) -> list[PhaseProduct]:
    """The product for each phase; the settings are those as the phase starts.

    Args:
        config: complete; its regime is of SGD.
        steps_per_epoch: optimizer steps.
    """
    from norm_matters.regimes import build_regime

    assert config.train.epochs is not None
    clock = Clock(0, steps_per_epoch, config.train.epochs, config.data.batch_size)
    regime = build_regime(config.regime, default="resnet-cifar", batch_size=config.data.batch_size)
    starts = sorted({phase.start.steps(clock) for phase in regime.phases})
    starts = [start for start in starts if start < clock.total_steps]
    products = []
    for start, end in zip(starts, [*starts[1:], clock.total_steps], strict=True):
        settings: dict[str, Any] = regime.at(clock.at_step(start))
        lr, decay, momentum = (float(settings.get(key) or 0.0) for key in ("lr", "weight_decay", "momentum"))
        product = 2 * lr * decay * (end - start) / (1 - momentum)
        products.append(PhaseProduct(start / steps_per_epoch, lr, decay, momentum, product))
    return products


def describe_products(arm: str, products: list[PhaseProduct]) -> str:
    """The products in a line."""
    told = ", ".join(f"{each.product:.2g} from epoch {each.epoch:g}" for each in products)
    return f"2 lr lambda T / (1 - m) of '{arm}': {told}"
