"""From the config to the regime of a run."""

from typing import TYPE_CHECKING

from norm_matters.core.errors import UserError
from norm_matters.regimes import REGIMES
from norm_matters.regimes.phases import Source
from norm_matters.regimes.regime import Regime
from norm_matters.regimes.settings import check_settings

if TYPE_CHECKING:
    from norm_matters.core.config import RegimeConfig


def build_regime(config: "RegimeConfig", *, default: str, own: Source | None = None) -> Regime:
    """The regime of a run: the config's phases, else the config's named one, else the model's own, else the default.

    Args:
        default: name of the regime for the model.
        own: what a user's model brings in `self.regime`, in any form that `phases.py` describes.

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
    result = Regime(source, name=name)
    check_settings(result)
    return result
