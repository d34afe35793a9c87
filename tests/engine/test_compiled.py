"""Compiled training: what is compiled, what stays as it is written, and errors in words."""

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from norm_matters import run
from norm_matters.core.clock import Clock
from norm_matters.core.config import RegimeConfig, load_config
from norm_matters.core.errors import UserError
from norm_matters.engine.compiled import compilation_explained, compiled_forward
from norm_matters.engine.metrics import Meter
from norm_matters.engine.state import TrainingState
from norm_matters.engine.step import StepOptions, train_step
from norm_matters.norms import create_norm
from norm_matters.regimes import build_regime

CPU = torch.device("cpu")
PHASES = [{"epoch": 0, "optimizer": "SGD", "lr": 0.1, "momentum": 0.9}]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), create_norm("l1", 4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    )


def state_of(*, compiled: bool) -> TrainingState:
    regime = build_regime(RegimeConfig(phases=PHASES), default="constant")
    return TrainingState(network(), regime, Clock(0, 3, 2), device=CPU, compiled=compiled)


def take_steps(state: TrainingState, count: int = 3) -> Meter:
    meter = Meter(CPU)
    for seed in range(count):
        images = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(seed))
        train_step(state, images, torch.arange(8) % 3, options=StepOptions(), meter=meter)
    return meter


def compiler_error(text: str) -> Exception:
    """An error of the class that torch raises where it finds no C++ compiler, made without importing it."""
    return type("InvalidCxxCompiler", (RuntimeError,), {"__module__": "torch._inductor.exc"})(text)


def test_training_calls_the_compiled_form_and_everything_else_the_network(monkeypatch) -> None:
    calls = []

    def fake_compile(module: nn.Module, **options: object):
        def forward(images: torch.Tensor) -> torch.Tensor:
            calls.append(options)
            return module(images)

        return forward

    monkeypatch.setattr(torch, "compile", fake_compile)
    state, plain = state_of(compiled=True), state_of(compiled=False)
    names = list(state.module.state_dict())
    take_steps(state)
    take_steps(plain)
    assert calls == [{"mode": None}] * 3
    assert list(state.module.state_dict()) == names == list(plain.module.state_dict())
    for a, b in zip(state.module.parameters(), plain.module.parameters(), strict=True):
        assert torch.equal(a, b)
    state.module.eval()(torch.zeros(1, 3, 6, 6))
    assert len(calls) == 3


def test_cuda_graphs_mark_where_a_step_begins(monkeypatch) -> None:
    order = []
    monkeypatch.setattr(torch, "compile", lambda module, mode: lambda images: order.append(mode) or images)
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: order.append("begin"))
    forward = compiled_forward(nn.Identity(), cuda_graphs=True)
    forward(torch.zeros(1))
    forward(torch.zeros(1))
    assert order == ["begin", "reduce-overhead"] * 2


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ("No working C++ compiler found:\n (g++)\n", "No working C++ compiler found"),
        (
            "C++ compile error\n\nCommand:\ng++ a.cpp\n\nOutput:\nIn a.cpp:\n  a.cpp:1:2: error: no 'b'\nc: error: no",
            "C++ compile error: a.cpp:1:2: error: no 'b'",
        ),
    ],
)
def test_an_error_of_the_compiler_is_one_line_with_advice(message: str, reason: str) -> None:
    with pytest.raises(UserError) as caught, compilation_explained():
        raise compiler_error(message)
    assert caught.value.problems == (
        f"train.compile: torch cannot compile this network here ({reason}); leave train.compile and --compile out",
    )


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), KeyboardInterrupt(), UserError("a: b")])
def test_other_errors_pass(error: BaseException) -> None:
    with pytest.raises(type(error)) as caught, compilation_explained():
        raise error
    assert caught.value is error


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_the_step_explains_errors_of_both_passes(where: str, monkeypatch) -> None:
    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            if where == "forward":
                raise compiler_error("broken")
            return x.clone()

        @staticmethod
        def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
            raise compiler_error("broken")

    monkeypatch.setattr(torch, "compile", lambda module, mode: lambda images: Fails.apply(module(images)))
    with pytest.raises(UserError, match=r"train\.compile: .*\(broken\)"):
        take_steps(state_of(compiled=True))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["train.cuda_graphs=true"], ["train.cuda_graphs: they need a CUDA device; this run is on cpu"]),
        (["train.cuda_graphs=true", "train.accumulate=2"], ["need a CUDA device", "train.accumulate=2"]),
        (["train.compile=true", "train.instruments=all"], ["train.instruments: 'all' listens to layers"]),
    ],
)
def test_what_compiled_code_cannot_do_is_refused_before_anything_is_made(overrides, words, tmp_path) -> None:
    config = load_config(options={"device": "cpu", "output": str(tmp_path)}, overrides=overrides, checks=run.CHECKS)
    with pytest.raises(UserError) as caught:
        run.train(config)
    for problem, word in zip(caught.value.problems, words, strict=True):
        assert word in problem
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_compiled_network_trains_as_the_one_that_is_written() -> None:
    compiled, plain = state_of(compiled=True), state_of(compiled=False)
    scores = take_steps(compiled).scores(), take_steps(plain).scores()
    assert scores[0].loss == pytest.approx(scores[1].loss, rel=1e-5)
    assert compiled.module.state_dict().keys() == plain.module.state_dict().keys()
    for name, tensor in plain.module.state_dict().items():
        torch.testing.assert_close(compiled.module.state_dict()[name], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_without_a_compiler_the_user_is_told_in_one_line(tmp_path) -> None:
    environment = {**os.environ, "CXX": "no-such-compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "norm_matters", "train", "--compile", "--output", str(tmp_path), "device=cpu"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 2, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: train.compile: torch cannot compile this network here (")
    assert last.endswith("leave train.compile and --compile out")
