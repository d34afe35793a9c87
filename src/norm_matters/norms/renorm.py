"""Batch renormalisation (Ioffe 2017): training normalises as evaluation does, within bounds."""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor

from norm_matters.core.errors import UserError
from norm_matters.norms.composite import COMPOSITE_OPTIONS, AdjustedNorm
from norm_matters.norms.reduce import Reducer
from norm_matters.norms.spec import Option
from norm_matters.norms.statistic import Measure


class RenormNorm(AdjustedNorm):
    """Batch norm with y = (x - mean) / s * r + d in training, s = sqrt(sigma^2 + eps) of the batch.

    `r = s / s_run` and `d = (mean - mean_run) / s_run`, of the running statistics before this batch, are bounded and
    carry no gradient. Within the bounds the output is that of evaluation, while the gradient is that of the batch.
    The bounds are constant: the paper starts as batch norm (r_max 1, d_max 0) and widens them to 3 and 5 over the
    first 40,000 steps, which setting these attributes during training does.

    Args:
        num_features: channels C.
        base: spec of the batch norm whose sigma is taken.
        r_max: r is kept from 1 / r_max to r_max.
        d_max: d is kept from -d_max to d_max.
        options: those of `BatchwiseNorm`.

    Raises:
        UserError: `track_running_stats` is false.
    """

    name = "renorm"
    OPTIONS: ClassVar[Mapping[str, Option]] = {
        "base": COMPOSITE_OPTIONS["base"],
        "r_max": Option("float", 3.0, minimum=1),
        "d_max": Option("float", 5.0, minimum=0),
        **{key: option for key, option in COMPOSITE_OPTIONS.items() if key != "base"},
    }
    r_max: float
    d_max: float

    def __init__(self, num_features: int, **options: Any) -> None:
        super().__init__(num_features, **options)
        if not self.track_running_stats:
            raise UserError(f"norm '{self.spec}': renorm needs running statistics; leave track_running_stats=true")

    def adjust(
        self, mean: Tensor, measure: Measure, weight: Tensor, bias: Tensor, n: int, reducer: Reducer
    ) -> tuple[Measure, Tensor, Tensor]:
        """See `AdjustedNorm`."""
        running_mean, running_var = (found.to(mean.dtype) for found in self.as_found("running_mean", "running_var"))
        inverse = (running_var + self.eps).rsqrt()
        r = ((measure.sigma.square() + self.eps).sqrt() * inverse).clamp(1 / self.r_max, self.r_max)
        d = ((mean - running_mean) * inverse).clamp(-self.d_max, self.d_max)
        return measure, weight * r, bias + weight * d
