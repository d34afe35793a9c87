"""Scores of a network on a set of images; the network and every random stream are left as they were."""

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from norm_matters.core.distributed import ALONE, Group
from norm_matters.engine.metrics import Scores, batch_sums, scores_of
from norm_matters.engine.precision import Precision
from norm_matters.engine.rng import preserved_rng


class ImageBatch(Protocol):
    """A batch on the device: images (N, C, H, W), labels (N,)."""

    @property
    def images(self) -> Tensor: ...
    @property
    def labels(self) -> Tensor: ...


@contextlib.contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Evaluation mode, with every layer's own training flag put back at the end, whatever happens."""
    flags = {layer: layer.training for layer in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for layer, training in flags.items():
            layer.training = training


def evaluate(
    module: nn.Module,
    batches: Iterable[ImageBatch],
    *,
    device: torch.device,
    precision: Precision,
    input_dtype: torch.dtype = torch.float32,
    group: Group = ALONE,
) -> Scores:
    """Score every image of `batches` once: plain cross entropy (no smoothing), top-1 and top-5 errors.

    Args:
        group: the ranks that take the batches in turns: rank r those of number r, r + world, ... Every rank returns,
            to the last digit, what one process returns for all batches.

    Returns:
        Means over all images; the loss is the mean over images, not over batches.
    """
    sums: list[Tensor] = []
    classes = 0
    with preserved_rng(), evaluation_mode(module), torch.no_grad():
        for batch in batches:
            with precision.context(device):
                logits = module(batch.images.to(input_dtype))
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            sums.append(batch_sums(functional.cross_entropy(logits, batch.labels), logits, batch.labels))
            classes = logits.shape[1]
    return _total(group.gather([torch.stack(sums).tolist() if sums else [], classes]))


def _total(found: Sequence[tuple[Sequence[Sequence[float]], int]]) -> Scores:
    """Means of what each rank found: the sums of its batches, and the number of classes.

    Added in the order of the batches, so that the last digit does not depend on the number of ranks.
    """
    total = [0.0] * 4
    for turn in itertools.zip_longest(*(rows for rows, _ in found)):
        for row in turn:
            if row is not None:
                total = [sum_ + value for sum_, value in zip(total, row, strict=True)]
    return scores_of(total, max(classes for _, classes in found))
