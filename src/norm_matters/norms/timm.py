"""Norms of timm's tables under the contract of norms: `timm:frn`, `timm:evonorms0,act=true`."""

import importlib
import importlib.util
import inspect
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from norm_matters.core.errors import UserError, nearest
from norm_matters.norms.base import Norm
from norm_matters.norms.spec import Option

# They need an extension that is built for CUDA.
_NOT_OFFERED = {"inplaceabn", "iabn"}
# Those that take their channels last, (N, *, C).
_CHANNELS_LAST = {name + suffix for name in ("layernorm", "rmsnorm", "simplenorm") for suffix in ("", "fp32")}


def timm_norms() -> tuple[dict[str, Any], dict[str, Any]]:
    """timm's tables, name -> class: of norms, and of norms with an activation.

    Raises:
        UserError: timm is not installed.
    """
    if importlib.util.find_spec("timm") is None:
        raise UserError("timm is not installed; pip install 'norm-matters[timm]'")
    importlib.import_module("norm_matters.core.torchvision")  # before timm, which imports torchvision

    # Private, but the only place that says which names there are.
    from timm.layers.create_norm import _NORM_MAP
    from timm.layers.create_norm_act import _NORM_ACT_MAP

    plain, fused = (
        {key: norm for key, norm in table.items() if key not in _NOT_OFFERED} for table in (_NORM_MAP, _NORM_ACT_MAP)
    )
    return plain, fused


def canonical_layer(name: str) -> str:
    """The name as timm's tables have it; UserError with the nearest one where they have none."""
    plain, fused = timm_norms()
    key = name.replace("_", "").lower()
    if key not in {**plain, **fused}:
        hint = nearest(key, {**plain, **fused}) or f"; there are: {', '.join({**plain, **fused})}"
        raise UserError(f"timm has no norm '{name}'{hint}")
    return key


class TimmNorm(Norm):
    """A norm of timm. Its parameters and buffers, by their names in timm, are those of this module.

    No tool acts on it. It takes what timm's norm takes: most want four dimensions, (N, C, H, W); `layernorm`, `rmsnorm`
    and `simplenorm` have the channels last.

    Args:
        num_features: channels C.
        layer: name in timm's tables; "_" and capitals make no difference.
        eps: None for timm's own default.
        groups: of those norms that have groups; None for timm's own default.
        act: apply the activation that is part of some norms (EvoNorm, FRN, batch norm with activation).
        device, dtype: of parameters and buffers.

    Raises:
        UserError: timm is not installed, has no such norm, or cannot build it so.
    """

    name = "timm"
    # The name alone is no spec: what the tests of all norms take.
    example: ClassVar[str] = "timm:frn"
    OPTIONS: ClassVar[Mapping[str, Option]] = {
        "layer": Option("text", None, shown=True, positional=True, required=True, canonical=canonical_layer),
        "eps": Option("float", None, minimum=0, words=("none",)),
        "groups": Option("int", None, minimum=1, words=("none",)),
        "act": Option("bool", False),
    }
    layer: str
    eps: float | None
    groups: int | None
    act: bool

    def __init__(
        self,
        num_features: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__(num_features, **options)
        self.channel_dim = -1 if self.layer in _CHANNELS_LAST else 1
        with torch.device(torch.get_default_device() if device is None else device):
            built = self._build().to(dtype=dtype)
        # One set of parameters and buffers, held here under timm's names; the layer itself is no module of the model,
        # which would count it as a second norm. In a tuple, so that torch does not register it.
        self._parameters, self._buffers = built._parameters, built._buffers
        self._non_persistent_buffers_set = built._non_persistent_buffers_set
        self._built = (built,)

    def _build(self) -> nn.Module:
        plain, fused = timm_norms()
        kind = fused.get(self.layer) if self.act or self.layer not in plain else plain[self.layer]
        if kind is None:
            raise UserError(f"norm '{self.spec}': {self.layer} has no activation")
        accepted = inspect.signature(kind).parameters
        options: dict[str, Any] = {"apply_act": self.act} if "apply_act" in accepted else {}
        if self.eps is not None:
            options["eps"] = self.eps
        if self.groups is not None:
            key = next((key for key in ("num_groups", "groups") if key in accepted), None)
            if key is None:
                raise UserError(f"norm '{self.spec}': {self.layer} has no groups")
            options[key] = self.groups
        try:
            built = kind(self.num_features, **options)
        except (TypeError, ValueError, AssertionError) as error:
            raise UserError(f"norm '{self.spec}' cannot be built for {self.num_features} channels: {error}") from error
        groups = getattr(built, "groups", 1)
        if self.num_features % groups:
            raise UserError(f"norm '{self.spec}': {self.num_features} channels do not divide into {groups} groups")
        return built

    def normalise(self, x: Tensor) -> Tensor:
        """See the base class.

        Raises:
            ValueError: timm's norm takes no input of that shape.
        """
        (layer,) = self._built
        if layer.training != self.training:
            layer.train(self.training)
        refused = f"{self.label()} takes no input of shape {tuple(x.shape)}"
        try:
            y = layer(x)
        except (AssertionError, ValueError) as error:
            raise ValueError(f"{refused}: {error}") from error
        if y.shape != x.shape:
            raise ValueError(refused)
        return y
