"""Steps without memory: the same step in pieces where norms allow it, else a sentence with the batch that fits."""

import re

import pytest
import torch
from torch import nn

from norm_matters.core.clock import Clock
from norm_matters.core.config import RegimeConfig
from norm_matters.core.errors import UserError
from norm_matters.engine import memory
from norm_matters.engine.evaluate import evaluate
from norm_matters.engine.memory import is_out_of_memory
from norm_matters.engine.metrics import Meter
from norm_matters.engine.precision import PRECISIONS
from norm_matters.engine.state import TrainingState
from norm_matters.engine.step import StepOptions, train_step
from norm_matters.norms import create_norm, freeze_norm, takes_batch_statistics
from norm_matters.regimes import build_regime


@pytest.fixture(autouse=True)
def _no_garbage(monkeypatch: pytest.MonkeyPatch) -> None:
    """To look for garbage takes longer than all else here, and there is none."""
    monkeypatch.setattr(memory.gc, "collect", lambda: 0)


PHASES = [{"epoch": 0, "optimizer": "SGD", "lr": 0.1, "momentum": 0.9}]


def network(norm: str = "group:groups=2", dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), create_norm(norm, 8), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 7)
    ).to(dtype)


def state_of(module: nn.Module, precision: str = "fp32", batch_size: int = 16) -> TrainingState:
    regime = build_regime(RegimeConfig(phases=PHASES), default="constant")
    return TrainingState(module, regime, Clock(0, 3, 2, batch_size), device=torch.device("cpu"), precision=precision)


def batch(images: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    return torch.randn(images, 3, 6, 6, generator=draw), torch.randint(0, 7, (images,), generator=draw)


def step(state: TrainingState, images: int = 16, **options) -> Meter:
    meter = Meter(state.device)
    train_step(state, *batch(images), options=StepOptions(**options), meter=meter)
    return meter


def has_memory_for(module: nn.Module, images: int, *, backward: bool = False) -> None:
    """Let a network's first layer run out of memory with more images than that."""

    def refuse(count: int) -> None:
        if count > images:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    if backward:

        def watch(layer: nn.Module, inputs: object, output: torch.Tensor) -> None:
            output.register_hook(lambda gradient: refuse(len(gradient)))

        module[0].register_forward_hook(watch)
    else:
        module[0].register_forward_pre_hook(lambda layer, inputs: refuse(len(inputs[0])))


@pytest.mark.parametrize("norm", ["group:groups=2", "instance", "none", "frozen"])
@pytest.mark.parametrize(
    ("images", "limit", "accumulate", "pieces"),
    [(16, 8, 1, 2), (16, 5, 1, 4), (16, 3, 2, 4), (16, 1, 1, 16), (15, 8, 1, 2), (13, 5, 1, 4), (15, 3, 2, 4)],
)
@pytest.mark.parametrize("backward", [False, True])
def test_the_step_in_pieces_is_the_step(norm, images, limit, accumulate, pieces, backward):
    whole, small = state_of(network(norm)), state_of(network(norm))
    has_memory_for(small.module, limit, backward=backward)
    for number in range(2):
        expected, found = (step(state, images, accumulate=accumulate).scores() for state in (whole, small))
        assert (found.images, found.error1) == (expected.images, expected.error1), number
        assert found.loss == pytest.approx(expected.loss, rel=1e-12)
    assert small.pieces == pieces
    for name, tensor in whole.model_tensors().items():
        torch.testing.assert_close(small.model_tensors()[name], tensor, rtol=1e-12, atol=1e-12)
    told = [note for note in small.notes if "no memory for" in note]
    assert len(told) == pieces.bit_length() - 1
    assert told[0].startswith("step 1: no memory for ")
    assert whole.notes == []


@pytest.mark.parametrize("precision", ["bf16", "fp16", "amp-bf16"])
def test_low_precision_forgets_the_gradients_of_the_failed_pass(precision):
    whole, small = (state_of(network(dtype=torch.float32), precision) for _ in range(2))
    has_memory_for(small.module, 8, backward=True)
    for state in (whole, small):
        step(state)
    for name, tensor in whole.model_tensors().items():
        torch.testing.assert_close(small.model_tensors()[name], tensor, rtol=0.02, atol=0.01)
    assert small.pieces == 2


@pytest.mark.parametrize("norm", ["l2", "l1", "ghost:size=4", "renorm"])
@pytest.mark.parametrize("backward", [False, True])
def test_norms_over_the_batch_are_not_split_and_what_fits_is_told(norm, backward):
    state = state_of(network(norm))
    step(state)
    before = {name: tensor.clone() for name, tensor in state.model_tensors().items()}
    stream = torch.get_rng_state()
    has_memory_for(state.module, 5, backward=backward)
    with pytest.raises(UserError) as caught:
        step(state)
    assert caught.value.exit_status == 2
    words = (
        r"data\.batch_size: there is no memory on cpu for a step with 16 images at once; .* 4 images fit \(tried\): "
        r"data\.batch_size=4, or train\.accumulate=4 for the same batch in chunks"
    )
    assert re.match(words, str(caught.value)), caught.value
    assert torch.equal(torch.get_rng_state(), stream)
    parameters = dict(state.module.named_parameters())
    assert all(parameter.grad is None for parameter in parameters.values())
    assert all(torch.equal(tensor, before[name]) for name, tensor in parameters.items())


def test_a_batch_in_chunks_already_keeps_them():
    state = state_of(network("l1"))
    has_memory_for(state.module, 2)
    with pytest.raises(
        UserError, match=r"with 8 images at once; .* 2 images fit .*batch_size=4, or train\.accumulate=8"
    ):
        step(state, accumulate=2)


@pytest.mark.parametrize(("norm", "words"), [("layer", "nor with one$"), ("l1", "nor for any smaller half")])
def test_an_image_that_is_too_large_alone(norm, words):
    state = state_of(network(norm))
    has_memory_for(state.module, 0)
    with pytest.raises(UserError, match=words):
        step(state)


def test_other_errors_are_not_taken_for_it():
    state = state_of(network())
    state.module[0].register_forward_pre_hook(lambda layer, inputs: (_ for _ in ()).throw(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        step(state)


def test_pieces_are_saved_and_come_back():
    state = state_of(network())
    has_memory_for(state.module, 8)
    step(state)
    again = state_of(network())
    again.load(state.model_tensors(), state.training_tensors(), state.numbers())
    assert again.pieces == 2
    numbers = state.numbers()
    del numbers["pieces"]  # as in checkpoints of version 1
    again.load(state.model_tensors(), state.training_tensors(), numbers)
    assert again.pieces == 1


@pytest.mark.parametrize("norm", ["l2", "layer"])
def test_evaluation_takes_batches_in_parts(norm):
    module = network(norm)
    images, labels = batch(13)

    class Batch:
        def __init__(self):
            self.images, self.labels = images, labels

    options = {"device": torch.device("cpu"), "precision": PRECISIONS["fp32"], "input_dtype": torch.float64}
    expected = evaluate(module, [Batch()], **options)
    has_memory_for(module, 3)
    assert evaluate(module, [Batch()], **options) == pytest.approx(expected, rel=1e-12)
    has_memory_for(module, 0)
    with pytest.raises(UserError, match="no memory on cpu to evaluate one image of 3x6x6"):
        evaluate(module, [Batch()], **options)


def test_torch_out_of_memory_on_the_cpu_is_known_as_such():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(torch.OutOfMemoryError("x"))
    assert not is_out_of_memory(RuntimeError("x"))
    assert not is_out_of_memory(MemoryError())


@pytest.mark.parametrize(
    ("norm", "expected"),
    [
        *(
            (spec, True)
            for spec in ("l2", "l1", "linf", "topk:k=3", "mean", "ghost:size=4", "smooth", "renorm", "noisy")
        ),
        *((spec, False) for spec in ("none", "group:groups=2", "layer", "instance", "position", "frozen")),
    ],
)
def test_which_norms_look_at_the_batch(norm, expected):
    assert takes_batch_statistics(network(norm)) is expected


def test_which_layers_of_torch_look_at_the_batch():
    assert takes_batch_statistics(nn.Sequential(nn.BatchNorm2d(4)))
    assert takes_batch_statistics(nn.Sequential(nn.InstanceNorm2d(4, track_running_stats=True)))
    assert not takes_batch_statistics(nn.Sequential(nn.InstanceNorm2d(4), nn.GroupNorm(2, 4), nn.LayerNorm(4)))
    frozen = network("l1")
    freeze_norm(frozen)
    assert not takes_batch_statistics(frozen)


def test_ranks_rehearse_where_gradients_are_exchanged(monkeypatch):
    """On one process nothing is rehearsed; on several, once, without a trace."""
    state, attempts = state_of(network()), []
    monkeypatch.setattr(memory, "REHEARSED_ON", ("cpu",))
    memory.rehearse(state, lambda: attempts.append(1))
    assert attempts == []
