"""Evaluation: every image once, means over images, and nothing changed by it."""

import random
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from norm_matters.engine.evaluate import evaluate, evaluation_mode
from norm_matters.engine.metrics import Meter
from norm_matters.engine.precision import PRECISIONS
from norm_matters.norms import create_norm

CPU = torch.device("cpu")


class Batch(NamedTuple):
    images: Tensor
    labels: Tensor


def network(classes: int = 7) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        create_norm("topk:k=10", 8),
        nn.Dropout(0.5),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, classes),
    )


def batches(sizes: list[int], classes: int = 7) -> list[Batch]:
    generator = torch.Generator().manual_seed(3)
    n = sum(sizes)
    images, labels = torch.randn(n, 3, 6, 6, generator=generator), torch.randint(0, classes, (n,), generator=generator)
    return [Batch(*pair) for pair in zip(images.split(sizes), labels.split(sizes), strict=True)]


def score(module: nn.Module, data: list[Batch]):
    return evaluate(module, data, device=CPU, precision=PRECISIONS["fp32"])


@pytest.mark.parametrize("sizes", [[10], [4, 4, 2], [3, 3, 3, 1], [1] * 10])
def test_scores_are_means_over_images_whatever_the_batches(sizes: list[int]) -> None:
    module = network().eval()
    everything = batches([10])[0]
    logits = module(everything.images)
    order = logits.argsort(dim=1, descending=True)
    hit = order == everything.labels[:, None]
    scores = score(module, batches(sizes))
    assert scores.images == 10
    assert scores.loss == pytest.approx(nn.functional.cross_entropy(logits, everything.labels).item(), rel=1e-6)
    assert scores.error1 == pytest.approx(100 - 100 * hit[:, 0].double().mean().item())
    assert scores.error5 == pytest.approx(100 - 100 * hit[:, :5].any(1).double().mean().item())


def test_top5_is_left_out_below_six_classes() -> None:
    assert score(network(5), batches([8], classes=5)).error5 is None
    assert score(network(6), batches([8], classes=6)).error5 is not None


def test_an_empty_meter_has_no_mean() -> None:
    assert np.isnan(Meter(CPU).scores().loss)


def test_evaluation_changes_no_bit_of_weights_flags_or_random_streams() -> None:
    class Noisy(nn.Module):
        """Draws from every stream also in evaluation, as a user's network may."""

        def forward(self, x: Tensor) -> Tensor:
            return x + 1e-9 * (torch.randn(()) + np.random.rand() + random.random())

    module = nn.Sequential(Noisy(), network())
    module.train()
    module[1][1].eval()  # a layer frozen by hand stays frozen
    flags = [layer.training for layer in module.modules()]
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    streams = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    score(module, batches([6, 4]))
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert [layer.training for layer in module.modules()] == flags
    assert torch.equal(torch.get_rng_state(), streams[0])
    assert (np.random.get_state()[1] == streams[1]).all()
    assert random.getstate() == streams[2]


def test_training_flags_come_back_after_an_exception() -> None:
    module = network().train()
    with pytest.raises(KeyError), evaluation_mode(module):
        raise KeyError
    assert all(layer.training for layer in module.modules())
