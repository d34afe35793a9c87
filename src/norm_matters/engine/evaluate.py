"""Scores of a network on a set of images; the network and every random stream are left as they were."""

import contextlib
import itertools
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from norm_matters.core.distributed import ALONE, Group
from norm_matters.core.faults import fault_point
from norm_matters.core.stopping import StopRequestedError
from norm_matters.engine.memory import in_parts
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
    scores = evaluate_unless(
        lambda: False, module, batches, device=device, precision=precision, input_dtype=input_dtype, group=group
    )
    assert scores is not None
    return scores


def evaluate_unless(
    asked: Callable[[], bool],
    module: nn.Module,
    batches: Iterable[ImageBatch],
    *,
    device: torch.device,
    precision: Precision,
    input_dtype: torch.dtype = torch.float32,
    group: Group = ALONE,
) -> Scores | None:
    """As `evaluate`, unless one is asked to leave meanwhile.

    Args:
        asked: called before every batch: whether to leave.

    Returns:
        None on every rank, where it was true on one of them, or where the batches end with StopRequestedError.
    """

    def forward(images: Tensor) -> Tensor:
        fault_point("eval")
        with precision.context(device):
            return module(images.to(input_dtype))

    sums: list[Tensor] = []
    classes, left = 0, False
    with preserved_rng(), evaluation_mode(module), torch.no_grad(), contextlib.closing(_closable(batches)) as source:
        while not (left := asked()):
            try:
                batch = next(source, None)
            except StopRequestedError:
                left = True
                break
            if batch is None:
                break
            logits = in_parts(forward, batch.images)
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            sums.append(batch_sums(functional.cross_entropy(logits, batch.labels), logits, batch.labels))
            classes = logits.shape[1]
    found = group.gather([torch.stack(sums).tolist() if sums and not left else [], classes, left])
    return None if any(gone for _, _, gone in found) else _total([(rows, count) for rows, count, _ in found])


def _closable(batches: Iterable[ImageBatch]) -> Generator[ImageBatch, None, None]:
    """The batches as an iterator that can be closed: what is left unread must not keep its workers busy."""
    yield from batches


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
