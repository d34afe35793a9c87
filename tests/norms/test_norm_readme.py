"""The README's block of Python runs in its order, as a reader would try it."""

import re
from pathlib import Path

import torch
from torch import nn

import norm_matters as nm

README = Path(__file__).parents[2] / "README.md"


def network() -> nn.Module:
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3))


def test_the_block_runs(monkeypatch) -> None:
    (code,) = (code for code in re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL) if "nm." in code)
    # Not the subject here: it takes seconds, or needs a run.
    for name in ("create_model", "load_run"):
        monkeypatch.setattr(nm, name, lambda *_, **__: None)
    images, labels = torch.randn(8, 3, 8, 8), torch.randint(0, 3, (8,))
    given = {"batches": [images], "images": images, "labels": labels, "loss_function": nn.CrossEntropyLoss()}
    models = {"your_model": network(), "another_model": network()}
    exec(compile(code, README.name, "exec"), {**given, **models})
    assert not [layer for layer in models["your_model"].modules() if nm.is_norm(layer)], "absorbed at the end"
