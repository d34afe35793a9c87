"""Scores of a network on a set of images; the network and every random stream are left as they were."""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from norm_matters.engine.metrics import Meter, Scores
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
) -> Scores:
    """Score every image of `batches` once: plain cross entropy (no smoothing), top-1 and top-5 errors.

    Returns:
        Means over all images; the loss is the mean over images, not over batches.
    """
    meter = Meter(device)
    with preserved_rng(), evaluation_mode(module), torch.no_grad():
        for batch in batches:
            with precision.context(device):
                logits = module(batch.images.to(input_dtype))
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            meter.update(functional.cross_entropy(logits, batch.labels), logits, batch.labels)
    return meter.scores()
