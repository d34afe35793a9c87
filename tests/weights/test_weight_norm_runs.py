"""Weight norms in runs: every kind of network, pretrained weights, precisions, projection, resuming, decay groups."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import norm_matters.core.torchvision  # noqa: F401  (before timm, which needs torchvision importable)
from norm_matters import inference
from norm_matters.cli import main
from norm_matters.core.clock import Clock
from norm_matters.core.config import ModelConfig, RegimeConfig, load_config
from norm_matters.core.errors import UserError
from norm_matters.engine.evaluate import evaluate
from norm_matters.engine.metrics import Meter
from norm_matters.engine.precision import PRECISIONS
from norm_matters.engine.state import TrainingState
from norm_matters.engine.step import StepOptions, train_step
from norm_matters.models import build_model, create_model
from norm_matters.models.trust import trust_file
from norm_matters.norms import norms_of, spec_of
from norm_matters.record import find_checkpoint, load_checkpoint
from norm_matters.regimes import build_regime
from norm_matters.regimes.groups import group_parameters
from norm_matters.run import CHECKS, resume, train
from norm_matters.weights import normalise_weights, weight_norms_of

SPECS = ["bounded:p=2", "bounded:p=2,learn_g=true", "projected:p=2", "weight", "standardised"]
SMALL = ["data.name=digits", "model.options.width=8", "model.norm=mean", "device=cpu", "deterministic=true"]


def settings(output: Path, *overrides: str):
    return load_config(overrides=[*SMALL, f"output={output}", *overrides], checks=CHECKS)


def build(name: str, **options):
    return build_model(ModelConfig(name=name, **options), num_classes=4, in_channels=3, input_size=64)


def weighted(module: nn.Module) -> list[nn.Module]:
    return [layer for layer in module.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]


def test_our_networks_are_built_with_it():
    built = build("resnet18", norm="mean", weight_norm="bounded", options={"width": 4})
    assert built.weight_norms == len(weight_norms_of(built.module)) == 20
    assert {norm.spec for norm in weight_norms_of(built.module).values()} == {"bounded:p=2"}
    assert not isinstance(built.module.get_submodule("fc"), torch.nn.utils.parametrize.ParametrizationList)
    assert "fc.weight" in built.module.state_dict()
    assert build("resnet18", options={"width": 4}).weight_norms == 0


@pytest.mark.parametrize("name", ["timm:resnet10t", "torchvision:mobilenet_v3_small"])
def test_library_networks_are_wrapped_after_conversion(name):
    if name.startswith("timm"):
        pytest.importorskip("timm")
    built = build(name, norm="mean", weight_norm="bounded:p=1")
    assert built.converted > 0
    assert built.weight_norms == len(weighted(built.module)) - 1
    built.module(torch.randn(2, 3, 64, 64)).square().sum().backward()


def test_a_users_network_is_wrapped_and_its_faults_are_told(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from torch import nn\n"
        "def model(num_classes, in_channels, zero=False):\n"
        "    net = nn.Sequential(nn.Conv2d(in_channels, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1),\n"
        "                        nn.Flatten(), nn.Linear(4, num_classes))\n"
        "    if zero: nn.init.zeros_(net[0].weight)\n"
        "    return net\n"
    )
    trust_file(file, lasting=False)
    built = build(str(file), norm="mean", weight_norm="bounded")
    assert (built.converted, built.weight_norms) == (1, 1)
    assert [spec_of(norm) for _, norm in norms_of(built.module)] == ["mean"]
    with pytest.raises(UserError, match=r"model\.weight_norm: 'bounded': layer '0': its weights have the norm 0"):
        build(str(file), weight_norm="bounded", options={"zero": True})


def test_pretrained_weights_are_loaded_before_the_norm_is_taken(tmp_path):
    plain = create_model("resnet8", num_classes=4)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.add_(torch.randn(parameter.shape))
    save_file(plain.state_dict(), tmp_path / "weights.safetensors")
    built = build("resnet8", weight_norm="bounded", pretrained=str(tmp_path / "weights.safetensors"))
    for path, norm in weight_norms_of(built.module).items():
        v = plain.get_submodule(path).weight
        torch.testing.assert_close(norm.rho, v.norm() / len(v) ** 0.5)


def noise() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(16, 1, 8, 8, generator=generator), torch.randint(0, 10, (16,), generator=generator)


def state_of(precision: str, spec: str, norm: str = "l1") -> TrainingState:
    torch.manual_seed(0)
    module = create_model("resnet8", num_classes=10, in_channels=1, norm=norm, width=4, weight_norm=spec)
    phases = [{"epoch": 0, "optimizer": "SGD", "lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3}]
    regime = build_regime(RegimeConfig(phases=phases), default="constant")
    return TrainingState(module, regime, Clock(0, 10, 2), device=torch.device("cpu"), precision=precision)


def steps(state: TrainingState, count: int = 3) -> None:
    for _ in range(count):
        train_step(state, *noise(), options=StepOptions(), meter=Meter(state.device))


QUICK = [*((precision, "bounded:p=2") for precision in PRECISIONS), *(("bf16", spec) for spec in SPECS[1:])]
PAIRS = [(precision, spec) for precision in PRECISIONS for spec in SPECS]


@pytest.mark.parametrize(
    ("precision", "spec"),
    [*QUICK, *[pytest.param(*pair, marks=pytest.mark.slow) for pair in PAIRS if pair not in QUICK]],
)
def test_every_precision_trains(precision, spec):
    state = state_of(precision, spec)
    if state.scale:
        state.scale.scale = 2.0**8
    before = {name: tensor.clone() for name, tensor in state.model_tensors().items()}
    bounds = {name: tensor for name, tensor in before.items() if name.endswith(".rho")}
    steps(state)
    assert state.skipped_steps == 0
    after = state.model_tensors()
    for name, parameter in state.module.named_parameters():
        assert torch.isfinite(parameter).all(), name
        assert after[name].dtype == torch.float32, name
        assert not torch.equal(after[name], before[name]), name
    assert all(torch.equal(after[name], tensor) and tensor.dtype == torch.float32 for name, tensor in bounds.items())
    # What is saved gives the same network.
    other = state_of(precision, spec)
    other.load(state.model_tensors(), state.training_tensors(), state.numbers())
    steps(state, 1)
    steps(other, 1)
    for name, tensor in state.model_tensors().items():
        assert torch.equal(other.model_tensors()[name], tensor), name


@pytest.mark.parametrize("precision", PRECISIONS)
def test_projection_holds_for_what_the_optimizer_changes(precision):
    """In low precision that is the float32 master: projecting the rounded weight would be undone by the next step."""
    state = state_of(precision, "projected")
    if state.scale:
        state.scale.scale = 2.0**8
    steps(state)
    tensors = state.model_tensors()
    for path, norm in weight_norms_of(state.module).items():
        master, used = tensors[f"{path}.parametrizations.weight.original"], state.module.get_submodule(path).weight
        lengths = master.flatten(1).norm(dim=1)
        torch.testing.assert_close(lengths, norm.rho.expand(len(lengths)))
        assert torch.equal(used, master.to(used.dtype))


def test_a_step_that_is_skipped_projects_nothing_new():
    state = state_of("fp16", "projected")
    before = {name: tensor.clone() for name, tensor in state.model_tensors().items()}
    assert state.scale is not None
    state.scale.scale = 2.0**60
    steps(state, 1)
    assert state.skipped_steps == 1
    for name, _ in state.module.named_parameters():
        assert torch.equal(state.model_tensors()[name], before[name])


@pytest.mark.parametrize("spec", SPECS)
def test_evaluation_changes_nothing(spec):
    """The successor of the released code rewrites its parameter in every forward pass."""
    state = state_of("fp32", spec)
    steps(state)
    before = {name: tensor.clone() for name, tensor in (state.model_tensors() | state.training_tensors()).items()}

    class Batch:
        images, labels = noise()

    evaluate(state.module, [Batch, Batch], device=state.device, precision=state.precision)
    after = state.model_tensors() | state.training_tensors()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_decay_groups():
    """The trained v is decayed like any weight; learned scales are spared where a norm's are."""
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(2, 2), nn.Linear(2, 2))
    normalise_weights(model, "weight", include=["0", "3"])
    names = [name for name, _ in model.named_parameters()]
    groups = group_parameters(model, names, ["norm", "bias"])
    assert groups["rest"] == [
        "0.parametrizations.weight.original",
        "2.weight",
        "3.parametrizations.weight.original",
    ]
    assert groups["norm"] == ["0.parametrizations.weight.0.g", "3.parametrizations.weight.0.g"]
    assert groups["bias"] == ["0.bias", "2.bias", "3.bias"]
    assert set(group_parameters(model, names, ["last"])["last"]) == {name for name in names if name.startswith("3.")}


def test_a_run_records_its_weights_and_loads(tmp_path):
    run = train(settings(tmp_path, "model.weight_norm=bounded", "train.epochs=1"))
    assert load_config(run.folder / "config.yaml", checks=CHECKS).model.weight_norm == "bounded:p=2"
    assert "and bounded:p=2 weights" in (run.folder / "log.txt").read_text()
    assert len(weight_norms_of(inference.load_run(run.folder, device="cpu").model)) == 9
    assert inference.evaluate(run.folder, device="cpu")["error1"] == run.last["val_error1"]


@pytest.mark.slow
@pytest.mark.parametrize("spec", ["bounded:p=2", "projected:p=1", "bounded:p=2,learn_g=true"])
def test_a_run_resumes_exactly(spec, tmp_path):
    whole = train(settings(tmp_path, f"model.weight_norm={spec}", "train.epochs=2", "name=whole"))

    def stop(progress):
        if progress.kind == "epoch" and progress.epoch == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(settings(tmp_path, f"model.weight_norm={spec}", "train.epochs=2", "name=stopped"), on_progress=stop)
    resumed = resume(tmp_path / "stopped")
    a, b = (load_checkpoint(find_checkpoint(folder, prefer="last")).model for folder in (whole.folder, resumed.folder))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    with pytest.raises(UserError, match=r"model\.weight_norm"):
        resume(tmp_path / "whole", overrides=["model.weight_norm=weight"])


def test_the_command_lists_them_and_names_the_nearest(capsys):
    assert main(["list", "weight-norms"]) == 0
    assert capsys.readouterr().out.startswith("bounded")
    assert main(["train", "--weight-norm", "bouded"]) == 2
    assert "model.weight_norm: unknown weight norm 'bouded'; did you mean 'bounded'?" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "worst"),
    [
        (["model.norm=mean", "train.epochs=10"], 35),
        (["model.norm=none", "model.options.activation=trelu", "train.epochs=5"], 25),
        (["model.norm=none", "model.options.activation=trelu", "train.epochs=5", "model.name=resnet20"], 30),
    ],
)
def test_the_papers_networks_learn_the_digits(options, worst, tmp_path):
    result = train(settings(tmp_path, "model.weight_norm=bounded", "model.options.width=16", *options))
    assert result.last["val_error1"] <= worst
