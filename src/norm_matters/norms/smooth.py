"""Batch norm by an estimate of sigma smoothed over batches, as the paper's code has it for Top(10)."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from norm_matters.norms.batchwise import BATCH_OPTIONS, recomputing
from norm_matters.norms.composite import BASE, AdjustedNorm, scale_sigma
from norm_matters.norms.reduce import Reducer
from norm_matters.norms.spec import Option
from norm_matters.norms.statistic import Measure


class SmoothNorm(AdjustedNorm):
    """Batch norm with sigma_t = beta sigma_(t-1) + (1 - beta) (the base's sigma), in training.

    No gradient goes to sigma_(t-1). A channel's first batch, and one that follows a batch of sigma 0, takes its own
    sigma. A batch that is not finite leaves the buffer `smoothed_sigma` (C,; 0: none yet), which is part of the state.
    The mean is the batch's own. (The released code applies the constant to the smoothed value too, so that it enters
    twice; here it is in the base's sigma, once.)

    Args:
        num_features: channels C.
        base: spec of the batch norm whose sigma is smoothed.
        beta: weight of the previous value.
        options: those of `BatchwiseNorm`.
    """

    name = "smooth"
    OPTIONS: ClassVar[Mapping[str, Option]] = {
        "base": replace(BASE, default="topk:k=10"),
        "beta": Option("float", 0.75, minimum=0, maximum=1, shown=True),
        **BATCH_OPTIONS,
    }
    beta: float
    smoothed_sigma: Tensor

    def __init__(
        self,
        num_features: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> None:
        super().__init__(num_features, device=device, dtype=dtype, **options)
        wide = torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)
        self.register_buffer("smoothed_sigma", torch.zeros(num_features, device=device, dtype=wide))

    def adjust(
        self, mean: Tensor, measure: Measure, weight: Tensor, bias: Tensor, n: int, reducer: Reducer
    ) -> tuple[Measure, Tensor, Tensor]:
        """See `AdjustedNorm`."""
        (previous,) = self.as_found("smoothed_sigma")
        previous = previous.to(mean.dtype)
        share = torch.where(previous > 0, 1 - self.beta, 1.0)
        measure = scale_sigma(measure, share)
        measure = measure._replace(sigma=measure.sigma + (1 - share) * previous)
        if not recomputing():
            sigma = measure.sigma.to(self.smoothed_sigma.dtype)
            accept = torch.isfinite(mean).all() & torch.isfinite(sigma.square()).all()
            with torch.no_grad():
                self.smoothed_sigma.copy_(torch.where(accept, sigma, self.smoothed_sigma))
        return measure, weight, bias

    def reset_running_stats(self) -> None:
        """Forget all batches."""
        super().reset_running_stats()
        self.smoothed_sigma.zero_()

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """Accept the state of a batch norm that smooths nothing: the next batch is the first."""
        state_dict.setdefault(prefix + "smoothed_sigma", torch.zeros(self.num_features))
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args, **kwargs)
