"""No normalisation."""

from torch import Tensor

from norm_matters.norms.base import Norm


class NoNorm(Norm):
    """The identity, with the constructor of a norm; takes no options."""

    name = "none"

    def normalise(self, x: Tensor) -> Tensor:
        """Return x itself."""
        return x

    def normalise_and_activate(self, x: Tensor, residual: Tensor | None, *, relu: bool) -> Tensor:
        """See the base class; the input is not overwritten."""
        y = x if residual is None else x + residual
        return y.relu() if relu else y
