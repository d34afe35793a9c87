"""Norms of channels: which there are, how they are measured, taken down and found again."""

import numpy as np
import pytest
import torch
from torch import nn

from norm_matters.core.errors import UserError
from norm_matters.weights import normalise_weights
from norm_matters.weights.recorded import EpochNorms, NormRecorder, RecordedNorms, channel_weights


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict(
        {
            "conv": nn.Conv2d(2, 3, 3),
            "norm": nn.BatchNorm2d(3),
            "grouped": nn.Conv2d(4, 6, 3, groups=2),
            "up": nn.ConvTranspose2d(4, 6, 3, groups=2),
            "line": nn.Conv1d(2, 5, 3),
            "fc": nn.Linear(4, 2),
        }
    ).to(dtype)


def test_the_weights_of_convolutions_and_linear_layers_are_found_each_once() -> None:
    module = network()
    module["again"] = nn.Linear(4, 2)
    module["again"].weight = module["fc"].weight
    found = {weight.layer: weight.channels for weight in channel_weights(module)}
    assert found == {"conv": 3, "grouped": 6, "up": 6, "line": 5, "fc": 2}
    assert [weight.parameter for weight in channel_weights(module)][:2] == ["conv.weight", "grouped.weight"]


def test_norms_are_those_of_each_output_channel() -> None:
    module = network(torch.float64)
    norms = {weight.layer: weight.norms() for weight in channel_weights(module)}
    for layer in ("conv", "grouped", "line", "fc"):
        expected = np.sqrt((module[layer].weight.detach().numpy() ** 2).reshape(len(norms[layer]), -1).sum(1))
        np.testing.assert_allclose(norms[layer], expected, rtol=1e-14)
    # Of a transposed convolution in two groups: inputs 0 and 1 make the channels 0 to 2, inputs 2 and 3 the others.
    weight = module["up"].weight.detach().numpy()
    expected = [np.sqrt((weight[2 * (c // 3) : 2 * (c // 3) + 2, c % 3] ** 2).sum()) for c in range(6)]
    np.testing.assert_allclose(norms["up"], expected, rtol=1e-14)


def test_what_the_optimizer_moves_is_measured() -> None:
    module = network()
    normalise_weights(module, "weight", include="conv")
    found = {weight.layer: weight for weight in channel_weights(module)}
    assert found["conv"].parameter == "conv.parametrizations.weight.original"
    master = torch.full((3, 2, 3, 3), 2.0)
    stand_ins = {"conv.parametrizations.weight.original": master}
    (weight,) = (weight for weight in channel_weights(module, stand_ins) if weight.layer == "conv")
    assert weight.tensor is master
    np.testing.assert_allclose(weight.norms(), [np.sqrt(18 * 4)] * 3, rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_norms_are_float32_or_wider(dtype: torch.dtype) -> None:
    norms = channel_weights(network(dtype))[0].norms()
    assert norms.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def recorded(every: str, *, stop: int | None = None) -> NormRecorder:
    """A recorder over an epoch of three steps, in each of which the weights become twice as long."""
    module = nn.Linear(1, 2, bias=False)
    with torch.no_grad():
        module.weight.copy_(torch.tensor([[1.0], [3.0]]))
    recorder = NormRecorder(channel_weights(module), every=every, steps=3)  # type: ignore[arg-type]
    for step in range(3):
        if step == stop:
            tensors = {name: tensor.clone() for name, tensor in recorder.tensors().items()}
            recorder = NormRecorder(channel_weights(module), every=every, steps=3)  # type: ignore[arg-type]
            recorder.load(tensors)
        recorder.before_step()
        with torch.no_grad():
            module.weight.mul_(2)
    recorder.end_epoch()
    return recorder


@pytest.mark.parametrize("stop", [None, 0, 2])
def test_norms_are_taken_down_before_each_step_and_at_the_end(stop: int | None) -> None:
    recorder = recorded("step", stop=stop)
    assert recorder.take()[""].tolist() == [[1, 3], [2, 6], [4, 12], [8, 24]]
    assert recorder.tensors() == {}, "the next epoch begins with nothing"


def test_of_an_epoch_the_last_norms_are_taken_down() -> None:
    recorder = recorded("epoch")
    rows = recorder.tensors()["instruments/norms/rows"]
    assert rows.tolist() == [[8, 24]], "an epoch that is not evaluated yet is saved with its norms"
    assert recorder.take()[""].tolist() == [[8, 24]]


def norms_of(layers: dict[str, np.ndarray], epochs: int = 2) -> RecordedNorms:
    return RecordedNorms("runs/on", {epoch: EpochNorms(layers, f"file {epoch}") for epoch in range(1, epochs + 1)})


def test_a_table_joins_layers_in_the_order_of_the_weights() -> None:
    module = nn.Sequential(nn.Linear(1, 2), nn.Linear(2, 3)).double()
    norms = norms_of({"1": np.array([[3.0, 4.0, 5.0]]), "0": np.array([[1.0, 2.0]])})
    table = norms.table(channel_weights(module), 1)
    assert table.tolist() == [[1, 2, 3, 4, 5]]
    assert table.dtype == torch.float64


def test_mistakes_are_named() -> None:
    weights = channel_weights(nn.Sequential(nn.Linear(1, 2), nn.Linear(2, 3)))
    good = {"0": np.ones((4, 2)), "1": np.ones((4, 3))}
    norms_of(good).check(weights, 2, steps=3)
    for layers, epoch, steps, message in (
        (good, 3, None, "'runs/on' has the norms of 2 epochs; this run needs those of epoch 3"),
        ({"0": good["0"]}, 1, None, "another network: it has no layer '1'"),
        ({"0": good["0"], "1": np.ones((4, 2))}, 1, None, "its layer '1' has 2 channels, not 3"),
        (good, 1, 7, "has norms of 3 steps in epoch 1; this run has 7 steps"),
        ({name: rows[:1] for name, rows in good.items()}, 1, 3, r"no norms of steps \(train.record_norms=step\)"),
    ):
        with pytest.raises(UserError, match=message) as error:
            norms_of(layers).check(weights, epoch, steps=steps)
        assert str(error.value).startswith("regime.norms: ")


def test_a_digest_tells_the_norms_of_the_first_epochs_apart() -> None:
    layers = {"0": np.ones((1, 2))}
    short, long = norms_of(layers, 2), norms_of(layers, 3)
    assert short.digest(2) == long.digest(2) != long.digest(3)
    other = RecordedNorms("x", {**short.epochs, 2: EpochNorms(layers, "another file")})
    assert other.digest(1) == short.digest(1)
    assert other.digest(2) != short.digest(2)
