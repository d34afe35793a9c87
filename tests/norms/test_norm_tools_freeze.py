"""Freezing: what it holds, what it gives back, and that a run keeps it."""

from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import norm_matters as nm
from norm_matters.core.config import load_config
from norm_matters.norms import create_norm, freeze_norm, spec_of, unfreeze_norm
from norm_matters.run import CHECKS


def mixed() -> nn.Sequential:
    """A norm that can do all, one without parameters, one without statistics, one with neither, and one of torch's."""
    layers = {
        "full": create_norm("l1", 4),
        "plain": create_norm("l1:affine=false", 4),
        "image": create_norm("layer", 4),
        "none": create_norm("none", 4),
        "torchs": nn.BatchNorm2d(4),
    }
    return nn.Sequential(OrderedDict(layers))


def test_each_norm_gets_what_it_has_and_the_report_says_the_rest():
    model = mixed()
    report = freeze_norm(model)
    assert [(row.name, row.after, row.note) for row in report.rows] == [
        ("full", "l1:frozen=all", ""),
        ("plain", "l1:affine=false,frozen=stats", "no affine to freeze"),
        ("image", "layer:frozen=affine", "no stats to freeze"),
    ]
    assert [row.name for row in report.left] == ["none"]
    assert model.torchs.weight.requires_grad
    assert "no stats to freeze" in str(report)


def test_parts_add_up_and_come_off_one_by_one():
    model = mixed()
    freeze_norm(model, affine=False, include="full")
    freeze_norm(model, stats=False, include="full")
    assert model.full.spec == "l1:frozen=all"
    unfreeze_norm(model, affine=False, include="full")
    assert model.full.spec == "l1:frozen=affine"
    assert not model.full.weight.requires_grad
    unfreeze_norm(model)
    assert [spec_of(norm) for norm in model] == ["l1", "l1:affine=false", "layer", "none", None]
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_patterns_choose_the_norms():
    model = mixed()
    freeze_norm(model, include=["full", "im*"], exclude="image")
    assert [norm.frozen for norm in (model.full, model.plain, model.image)] == ["all", None, None]


@pytest.mark.parametrize("times", [1, 2])
def test_what_did_not_train_before_does_not_train_after(times):
    model = mixed()
    model.full.weight.requires_grad_(False)
    for _ in range(times):
        freeze_norm(model)
    unfreeze_norm(model)
    assert not model.full.weight.requires_grad
    assert model.full.bias.requires_grad
    model.full.bias.requires_grad_(False)
    unfreeze_norm(model)
    assert not model.full.bias.requires_grad, "a norm that is not frozen is left alone"


def test_a_norm_built_frozen_can_be_unfrozen():
    model = nn.Sequential(create_norm("l1:frozen=all", 4))
    assert not model[0].weight.requires_grad
    unfreeze_norm(model)
    assert model[0].weight.requires_grad
    assert model[0].spec == "l1"


def test_an_optimizer_built_before_leaves_frozen_parameters():
    """The last gradient would go on moving them, and so would the decay."""
    model = mixed()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=0.1)
    model(torch.randn(8, 4, 3, 3)).square().sum().backward()
    optimizer.step()
    freeze_norm(model, stats=False)
    before, torchs = model.full.weight.detach().clone(), model.torchs.weight.detach().clone()
    optimizer.step()
    assert torch.equal(model.full.weight, before)
    assert not torch.equal(model.torchs.weight, torchs)


def test_a_fused_activation_goes_on_training():
    norm = create_norm("l1", 4)
    norm.add_module("act", nn.PReLU())
    freeze_norm(nn.Sequential(norm))
    assert norm.act.weight.requires_grad
    assert not norm.weight.requires_grad


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stats": False, "affine": False}, "names nothing"),
        ({"include": "none"}, r"'none' \(none\): has no running statistics"),
        ({"affine": False, "include": "image"}, r"'image' \(layer\): has no running statistics"),
        ({"stats": False, "include": "plain"}, r"'plain' \(l1:affine=false\): has no weight and no bias"),
        ({"include": "torchs"}, r"'torchs' \(BatchNorm2d\): not a norm of ours; convert_norm"),
        ({"include": "nowhere"}, "no norm that is selected"),
    ],
)
def test_it_refuses_by_name(options, message):
    for tool in (freeze_norm, unfreeze_norm):
        with pytest.raises(ValueError, match=message):
            tool(mixed(), **options)


def train(output: Path, *overrides: str) -> nm.run.RunResult:
    small = ["data.name=digits", "data.batch_size=256", "train.epochs=1", "device=cpu", "model.options.width=4"]
    return nm.train(load_config(overrides=[*small, f"output={output}", *overrides], checks=CHECKS))


def norms(model: nn.Module) -> dict[str, torch.Tensor]:
    named = [(name, norm) for name, norm in model.named_modules() if spec_of(norm)]
    return {f"{name}.{key}": value for name, norm in named for key, value in norm.state_dict().items()}


def test_a_run_keeps_what_is_frozen(tmp_path, monkeypatch):
    """Fine-tuning: pretrained weights, frozen statistics; these are what they were an epoch later, as is the spec."""
    monkeypatch.setattr("norm_matters.report.write_report", lambda folder: folder / "report.html")
    first = nm.load_run(train(tmp_path, "model.norm=l1", "name=first").folder, device="cpu")
    weights = {key: value.contiguous() for key, value in first.model.state_dict().items()}
    assert not any((value == 0).all() for key, value in weights.items() if key.endswith("running_mean"))
    save_file(weights, tmp_path / "weights.safetensors")
    tuned = train(
        tmp_path, "model.norm=l1:frozen=all", "name=tuned", f"model.pretrained={tmp_path / 'weights.safetensors'}"
    )
    second = nm.load_run(tuned.folder, device="cpu")
    assert {spec_of(norm) for norm in second.model.modules() if spec_of(norm)} == {"l1:frozen=all"}
    assert second.config.model.norm == "l1:frozen=all"
    before, after = norms(first.model), norms(second.model)
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert before.keys() == after.keys()
    moved = [key for key, value in second.model.state_dict().items() if not torch.equal(value, weights[key])]
    assert any("conv" in key for key in moved)
