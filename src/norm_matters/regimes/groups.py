"""Parameters by kind, each in one group.

| kind | parameters |
|---|---|
| `name:REGEX` | those in whose full name (`layer1.0.conv1.weight`) the expression is found |
| `last` | weight and bias of the last layer: the last one, norms aside, with a parameter of two or more dimensions |
| `norm` | those of normalisation layers, their biases included, and the scales per channel that weight norms learn |
| `bias` | all others called `bias` |

A parameter that is of several kinds belongs to the first in this order, among the kinds that the regime gives settings
for; names in the order in which the regime mentions them. What is of no kind is in the group `rest`, which comes first.
"""

import re
from collections.abc import Sequence

from torch import nn

from norm_matters.core.errors import UserError
from norm_matters.norms import norms_of
from norm_matters.weights import WeightNorm, last_layer
from norm_matters.weights.layers import layer_of

REST = "rest"


def group_parameters(module: nn.Module, names: Sequence[str], kinds: Sequence[str]) -> dict[str, list[str]]:
    """Split parameters by kind.

    Args:
        names: the parameters to be split, by their full names in `module`.
        kinds: those that have settings of their own, as `Regime.kinds` returns them.

    Returns:
        Kind to names; `rest` first; without empty groups. Each name is in exactly one of them.

    Raises:
        UserError: a `name:` that fits no parameter, which is a spelling mistake.
    """
    patterns = [kind for kind in kinds if kind.startswith("name:")]
    members = {kind: {name for name in names if re.search(kind.removeprefix("name:"), name)} for kind in patterns}
    for kind in patterns:
        if not members[kind]:
            raise UserError(f"the regime's group '{kind}' fits no parameter of the network")
    members["norm"] = _norm_parameters(module)
    last = last_layer(module)
    members["last"] = {name for name in names if layer_of(name) == last}
    members["bias"] = {name for name in names if name.rpartition(".")[2] == "bias"}
    order = [*patterns, *(kind for kind in ("last", "norm", "bias") if kind in kinds)]
    groups: dict[str, list[str]] = {REST: [], **{kind: [] for kind in order}}
    for name in names:
        groups[next((kind for kind in order if name in members[kind]), REST)].append(name)
    covered = [name for group in groups.values() for name in group]
    assert sorted(covered) == sorted(names), "each parameter must be in exactly one group"
    return {kind: group for kind, group in groups.items() if group}


def _norm_parameters(module: nn.Module) -> set[str]:
    scales = [(path, layer) for path, layer in module.named_modules() if isinstance(layer, WeightNorm)]
    return {
        f"{path}.{name}" if path else name
        for path, layer in [*norms_of(module), *scales]
        for name, _ in layer.named_parameters()
    }
