"""No normalisation."""

from torch import Tensor

from norm_matters.norms.base import Norm


class NoNorm(Norm):
    """The identity, with the constructor of a norm; takes no options."""

    name = "none"

    def normalise(self, x: Tensor) -> Tensor:
        """Return x itself."""
        return x
