"""From the config to the regime of a run."""

import math
from typing import TYPE_CHECKING

from norm_matters.core.errors import UserError
from norm_matters.regimes import REGIMES
from norm_matters.regimes.phases import Source
from norm_matters.regimes.regime import Regime
from norm_matters.regimes.settings import check_settings

if TYPE_CHECKING:
    from norm_matters.core.config import RegimeConfig


def build_regime(
    config: "RegimeConfig", *, default: str, own: Source | None = None, batch_size: int | None = None
) -> Regime:
    """The regime of a run: the config's phases, else the config's named one, else the model's own, else the default.

    Args:
        default: name of the regime for the model.
        own: what a user's model brings in `self.regime`, in any form that `phases.py` describes.
        batch_size: images per step, of all ranks; where the config has a rule, learning rates follow it.

    Raises:
        UserError: with all that is wrong; `lr` and `weight_decay` can only change a named regime.
    """
    if config.phases is not None:
        source, name = config.phases, "regime.phases"
    elif own is not None and config.name is None:
        source, name = own, "the model's regime"
    else:
        regime = config.name or default
        source, name = REGIMES.get(regime)(lr=config.lr, weight_decay=config.weight_decay), regime
    fixed = [key for key in ("lr", "weight_decay") if getattr(config, key) is not None]
    if fixed and name in ("regime.phases", "the model's regime"):
        keys = " and ".join(f"regime.{key}" for key in fixed)
        raise UserError(f"{keys}: can only change a named regime; this run follows {name}")
    result = Regime(source, name=name, lr_factor=lr_factor(config, batch_size))
    check_settings(result)
    return result


def lr_factor(config: "RegimeConfig", batch_size: int | None) -> float:
    """What the learning rates of a regime are multiplied by for a batch size other than the one they are written for.

    `linear`: Goyal et al. 2017, arXiv 1706.02677; `sqrt`: Krizhevsky 2014, arXiv 1404.5997, which Adam wants too.
    """
    if config.lr_rule == "none" or config.lr_batch is None or batch_size is None:
        return 1.0
    ratio = batch_size / config.lr_batch
    return ratio if config.lr_rule == "linear" else math.sqrt(ratio)
