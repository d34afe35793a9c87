"""From a spec's text to weight norms; the grammar is that of norms."""

from typing import Any, NamedTuple

from torch import nn

from norm_matters.core.errors import UserError
from norm_matters.norms.spec import canonical_text, complete_options, parse_spec
from norm_matters.weights import WEIGHT_NORMS
from norm_matters.weights.base import WeightNorm
from norm_matters.weights.layers import channel_layout


class ResolvedWeightNorm(NamedTuple):
    """A spec looked up: the class and a value for each of its options."""

    kind: type[WeightNorm]
    options: dict[str, Any]

    @property
    def spec(self) -> str:
        """Canonical text."""
        return canonical_text(self.kind.name, self.options, self.kind.OPTIONS)

    def create(self, layer: nn.Module) -> WeightNorm:
        """A weight norm for the weight of a layer; it is not registered yet, and has no values."""
        return self.kind(layer.get_parameter("weight"), channel_layout(layer), **self.options)


def resolve_weight_norm(spec: str) -> ResolvedWeightNorm:
    """Look a spec up and check it.

    Raises:
        UserError: unknown weight norm or option, or an invalid value; names the nearest valid one.
    """
    parsed = parse_spec(spec)
    kind = WEIGHT_NORMS.get(parsed.name)
    if "" in parsed.options:
        raise UserError(f"weight norm '{spec}': '{parsed.options['']}' is no KEY=VALUE; write e.g. bounded:p=1")
    valid = kind.OPTIONS
    stated = {key: valid[key].read(text) if key in valid else text for key, text in parsed.options.items()}
    return ResolvedWeightNorm(kind, complete_options(spec, stated, valid))


def canonical_weight_norm(spec: str) -> str:
    """The text that equal weight norms share: `bounded` gives `bounded:p=2`."""
    return resolve_weight_norm(spec).spec


def check_weight_norm(spec: str | None) -> None:
    """Raise UserError unless `spec` is None or names a weight norm and valid options of it."""
    if spec is not None:
        resolve_weight_norm(spec)
