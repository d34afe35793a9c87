"""Statistics shared by the ranks of a distributed run."""

from torch import nn

from norm_matters.norms.batchwise import BatchwiseNorm
from norm_matters.norms.selection import Patterns, Report, Row, norms_with


def sync_norm(model: nn.Module, sync: bool = True, *, include: Patterns = None, exclude: Patterns = None) -> Report:
    """Let norms take their statistics over the batches of all ranks, or of their own rank again.

    In a distributed run (`torch.distributed` initialised) every rank then normalises by the statistics of the whole
    batch: sums are added, extremes compared, the k largest gathered; a rank counts by the number of its values. The
    gradient of the input is the whole batch's; those of weight and bias are this rank's part, to be added over the
    ranks as those of any other layer. Without a distributed run nothing changes.

    Args:
        model: changed in place.
        sync: the option `sync` of the norms.
        include, exclude: glob patterns of dotted names.

    Returns:
        A row for each norm with its spec before and after; `left` has those that take no statistics over the batch.

    Raises:
        ValueError: no norm takes statistics over the batch.
    """
    able, left = norms_with(model, "sync", "sync_norm", include, exclude)
    rows = []
    for name, norm in able.items():
        assert isinstance(norm, BatchwiseNorm)
        before = norm.spec
        norm.sync = sync
        rows.append(Row(name, before, norm.spec))
    return Report(rows, left)
