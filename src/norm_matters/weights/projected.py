"""Bounded weights by projection: the weight is a plain parameter, put back to its norm after every optimizer step."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from norm_matters.norms.spec import Option
from norm_matters.weights.base import WeightNorm, rescale, wide_dtype
from norm_matters.weights.bounded import P, bound_of
from norm_matters.weights.layers import ChannelLayout

Projection = tuple["ProjectedWeightNorm", Tensor]


def projected_weights(model: nn.Module, stand_ins: Mapping[str, Tensor] | None = None) -> list[Projection]:
    """The projections of a model, each with the tensor to project.

    Args:
        stand_ins: by parameter name, what an optimizer changes in a parameter's place (float32 masters).
    """
    found: list[Projection] = []
    for name, module in model.named_modules():
        if isinstance(module, ProjectedWeightNorm):
            # The parametrization is item 0 of the list that holds the parameter.
            parameter = f"{name.rpartition('.')[0]}.original"
            found.append((module, (stand_ins or {}).get(parameter, model.get_parameter(parameter))))
    return found


@torch.no_grad()
def project(model: nn.Module | Sequence[Projection]) -> None:
    """Put every projected weight of a model back to its norm, in place: to be called after `optimizer.step()`.

    Args:
        model: a network, or what `projected_weights` returned for it, which spares the search.
    """
    for projection, weight in projected_weights(model) if isinstance(model, nn.Module) else model:
        weight.copy_(projection.projected(weight))


class ProjectedWeightNorm(WeightNorm):
    """`w_i <- rho w_i / |w_i|_p` for every output channel i, when the weight is set and on `project`.

    Args:
        weight, layout: see the base class.
        p: 1, 2 or inf.
    """

    name = "projected"
    OPTIONS: ClassVar[Mapping[str, Option]] = {"p": P}
    p: str
    rho: Tensor

    def __init__(self, weight: Tensor, layout: ChannelLayout, **options: Any) -> None:
        super().__init__(weight, layout, **options)
        self.register_buffer("rho", torch.zeros((), device=weight.device, dtype=wide_dtype(weight.dtype)))

    def forward(self, v: Tensor) -> Tensor:
        """The weight itself."""
        return v

    def normalise(self, v: Tensor) -> Tensor:
        """See the base class."""
        return rescale(v, self.rho, float(self.p), self.layout.reduced(v))

    def projected(self, weight: Tensor) -> Tensor:
        """The weight with every channel at its norm, in the weight's dtype."""
        return super().forward(weight)

    @torch.no_grad()
    def start(self, v: Tensor) -> Tensor:
        """See the base class."""
        self.rho.copy_(bound_of(v, float(self.p), self.channels))
        return self.normalise(v)
