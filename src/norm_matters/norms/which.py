"""The statistic of a norm that is itself made of another: `group:statistic=topk:k=10`, `ghost:base=(l1)`."""

from norm_matters.core.errors import UserError
from norm_matters.norms.batchwise import BATCH_OPTIONS, BatchwiseNorm


def canonical_statistic(spec: str) -> str:
    """The canonical text of a spec that names a statistic: a batch norm, with none but the statistic's own options.

    Raises:
        UserError: no statistic, or an option that belongs to the norm around it.
    """
    from norm_matters.norms.build import canonical_spec, resolve_spec

    norm, options = resolve_spec(spec)
    if not issubclass(norm, BatchwiseNorm) or norm.composite:
        raise UserError(f"'{spec}' is no statistic; take a batch norm such as l1 or topk:k=10")
    foreign = [key for key in options if key in BATCH_OPTIONS]
    if foreign:
        raise UserError(f"'{spec}': {', '.join(foreign)} cannot be given here but to the norm around it")
    return canonical_spec(spec)


def statistic_norm(spec: str) -> BatchwiseNorm:
    """A batch norm without parameters and buffers, to ask for its `statistic_for(n)`."""
    from norm_matters.norms.build import create_norm

    norm = create_norm(spec, 1, affine=False, track_running_stats=False)
    assert isinstance(norm, BatchwiseNorm)
    return norm
