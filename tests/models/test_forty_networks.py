"""Forty networks of timm and torchvision, each converted to l1 and back.

Run as a script it writes `results/forty-networks.csv`.
"""

import copy
import csv
import io
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import norm_matters.core.torchvision  # noqa: F401  (before timm, which needs torchvision importable)
from norm_matters.models.libraries import build_library_model
from norm_matters.norms import convert_norm, norms_of, spec_of

KINDS = ("batch", "layer", "group", "instance", "rms")
# Side of the images where it is not 64, and options of the network.
SIZES: dict[str, tuple[int, dict[str, Any]]] = {
    **{
        f"timm:{name}": (64, {"img_size": 64})
        for name in (
            *("test_vit", "levit_128s", "efficientvit_m0", "xcit_nano_12_p16_224", "cait_xxs24_224", "coat_tiny"),
            *("swin_tiny_patch4_window7_224", "pit_ti_224", "gmlp_ti16_224", "mixer_s32_224"),
            *("maxvit_rmlp_pico_rw_256",),
        )
    },
    "timm:eva02_tiny_patch14_224": (56, {"img_size": 56}),
    "timm:inception_v3": (80, {}),
    "torchvision:inception_v3": (80, {}),
    "torchvision:vit_b_16": (32, {"image_size": 32}),
    "torchvision:maxvit_t": (224, {}),
}
FEW = [
    "timm:resnet10t",
    "timm:test_efficientnet",
    "timm:test_convnext",
    "timm:test_vit",
    "timm:shvit_s1",
    "torchvision:shufflenet_v2_x0_5",
]
MANY = [
    *(
        f"timm:{name}"
        for name in (
            *("cait_xxs24_224", "coat_tiny", "convformer_s18", "convnextv2_atto", "densenet121", "dla46_c"),
            *("edgenext_xx_small", "efficientvim_m1", "efficientvit_m0", "eva02_tiny_patch14_224", "fastvit_t8"),
            *("ghostnet_050", "gmlp_ti16_224", "hgnetv2_b0", "inception_next_atto", "inception_v3", "levit_128s"),
            *("maxvit_rmlp_pico_rw_256", "mixer_s32_224", "mnasnet_small", "mobilenetv3_small_050", "mobileone_s0"),
            *("mobilevit_xxs", "pit_ti_224", "poolformer_s12", "pvt_v2_b0", "regnetx_002", "repvgg_a0", "repvit_m0_9"),
            *("resnest14d", "resnetv2_50d_gn", "rexnet_100", "skresnet18", "starnet_s1", "swiftformer_xs"),
            *("swin_tiny_patch4_window7_224", "xcit_nano_12_p16_224"),
        )
    ),
    *(
        f"torchvision:{name}"
        for name in (
            *("convnext_tiny", "densenet121", "efficientnet_b0", "googlenet", "inception_v3", "maxvit_t"),
            *("mnasnet0_5", "mobilenet_v2", "mobilenet_v3_small", "regnet_y_400mf", "resnet18", "resnext50_32x4d"),
            *("swin_t", "swin_v2_t", "vit_b_16"),
        )
    ),
]


class Original(NamedTuple):
    """What a norm was before it was converted, as this test sees it: `sets` makes (sets, values) of its input."""

    sets: Callable[[Tensor], Tensor]
    channel_dim: int
    eps: float
    weight: Tensor | None
    bias: Tensor | None


def original_of(norm: Any) -> Original:
    """Say by its class which values of the input share a mean."""
    if isinstance(norm, nn.modules.batchnorm._BatchNorm):
        sets, channel_dim = (lambda x: x.transpose(0, 1).flatten(1)), 1
    elif isinstance(norm, nn.GroupNorm):
        sets, channel_dim = (lambda x: x.reshape(len(x) * norm.num_groups, -1)), 1
    else:
        assert isinstance(norm, nn.LayerNorm)
        # torchvision's and timm's LayerNorm2d and what derives from them
        channel_dim = 1 if any("2d" in cls.__name__ for cls in type(norm).__mro__) else -1
        sets = lambda x: x.movedim(channel_dim, -1).flatten(0, -2)  # noqa: E731
    tensors = (None if tensor is None else tensor.detach().double() for tensor in (norm.weight, norm.bias))
    return Original(sets, channel_dim, norm.eps, *tensors)


def reference(x: Tensor, original: Original, power: int) -> Tensor:
    """The norm in float64, sigma from the mean absolute (power 1) or mean squared (power 2) deviation."""
    x = x.double()
    # What shares a mean, told by numbering the places of the input.
    places = original.sets(torch.arange(x.numel()).view(x.shape))
    d = original.sets(x)
    d = d - d.mean(1, keepdim=True)
    sigma = d.abs().mean(1) * (torch.pi / 2) ** 0.5 if power == 1 else d.square().mean(1).sqrt()
    normalised = torch.empty(x.numel(), dtype=x.dtype)
    normalised[places.flatten()] = (d / (sigma.square() + original.eps).sqrt()[:, None]).flatten()
    shape = [1] * x.dim()
    shape[original.channel_dim] = -1
    y = normalised.view(x.shape)
    y = y if original.weight is None else y * original.weight.view(shape)
    return y if original.bias is None else y + original.bias.view(shape)


class Watch:
    """Compares each converted norm with the references, on the input that it really gets."""

    def __init__(self, model: nn.Module, originals: dict[str, Original]) -> None:
        self.errors: dict[str, float] = {}
        self.gaps: dict[str, float] = {}
        self.norms = {name: model.get_submodule(name) for name in originals}
        for name, original in originals.items():
            self._watch(name, original)

    def _watch(self, name: str, original: Original) -> None:
        norm: Any = self.norms[name]
        normalise = norm.normalise_and_activate

        def watched(x: Tensor, residual: Tensor | None, *, relu: bool) -> Tensor:
            assert residual is None
            y = normalise(x, residual, relu=relu)
            with torch.no_grad():
                l1, l2 = (reference(x.detach(), original, power) for power in (1, 2))
                l1, l2 = (l1.relu(), l2.relu()) if relu else (l1, l2)
                scale = l1.abs().max().item() + 1e-30
                self.errors[name] = (y.detach() - l1).abs().max().item() / scale
                self.gaps[name] = (l2 - l1).abs().max().item() / scale
            return y

        norm.normalise_and_activate = watched

    def stop(self) -> None:
        """Leave the norms as they were."""
        for norm in self.norms.values():
            del norm.normalise_and_activate


def theirs(model: nn.Module) -> list[tuple[str, nn.Module]]:
    kinds = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
    return [(name, module) for name, module in model.named_modules() if isinstance(module, kinds)]


def scores(model: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return model.eval()(x)


def take_running_statistics(model: nn.Module, x: Tensor) -> None:
    """Set them to those of x: evaluation is then of the size of training."""
    norms = [norm for _, norm in theirs(model) if isinstance(norm, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0
    model.train()(x)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def check_network(name: str) -> dict[str, Any]:
    """Convert a network to l1 and back, and check all that is promised.

    Returns:
        The row of the table.
    """
    begin = time.process_time()
    torch.manual_seed(0)
    size, options = SIZES.get(name, (64, {}))
    model = build_library_model(name, num_classes=5, in_channels=3, options=options)
    x = torch.randn(2, 3, size, size)
    before = theirs(model)
    assert before
    with torch.no_grad():
        # Affine maps, and many a last layer, start at 0 or 1, where a mistake would not show.
        own = {id(parameter) for _, norm in before for parameter in norm.parameters(recurse=False)}
        for parameter in model.parameters():
            if id(parameter) in own or not parameter.count_nonzero():
                parameter.add_(0.2 * torch.randn_like(parameter))
    take_running_statistics(model, x)
    first, keys = scores(model, x), set(model.state_dict())
    assert 0 < first.abs().max() < torch.inf
    originals = {layer: original_of(norm) for layer, norm in before}

    report = convert_norm(model, "l1", kinds=KINDS)
    assert report.count == len(before)
    assert [row.name for row in report.rows] == list(originals)
    assert not report.left
    assert not theirs(model)
    assert all("l1" in str(spec_of(norm)) for _, norm in norms_of(model))
    assert len(norms_of(model)) == len(before)

    in_l1 = scores(model, x)
    state = copy.deepcopy(model.state_dict())
    assert set(state) == keys
    watch = Watch(model.train(), originals)
    y = model(x)
    watch.stop()
    assert watch.errors.keys() == originals.keys(), f"never used: {originals.keys() - watch.errors.keys()}"
    wrong = {layer: error for layer, error in watch.errors.items() if not error < 1e-4}
    assert not wrong, f"not l1: {wrong}"
    alike = {layer: gap for layer, gap in watch.gaps.items() if not gap > 10 * max(watch.errors[layer], 1e-5)}
    assert not alike, f"l1 and l2 are the same: {alike}"
    (y * torch.randn_like(y)).sum().backward()
    assert torch.isfinite(y).all()
    gradients = {key: parameter.grad for key, parameter in model.named_parameters() if parameter.grad is not None}
    assert all(torch.isfinite(gradient).all() for gradient in gradients.values())
    affine = [f"{layer}.{key}" for layer, norm in norms_of(model) for key, _ in norm.named_parameters(recurse=False)]
    assert not set(affine) - gradients.keys()

    statistics = [key for key in state if key.endswith("running_mean")]
    assert all(not torch.equal(model.state_dict()[key], state[key]) for key in statistics)
    model.load_state_dict(state)
    assert torch.equal(scores(model, x), in_l1)
    assert convert_norm(model, "l2", kinds=KINDS).count == len(before)
    back = scores(model, x)
    torch.testing.assert_close(back, first, rtol=1e-5, atol=1e-5 * first.abs().max().item())
    classes = Counter(type(norm).__name__ for _, norm in before)
    return {
        "network": name,
        "image": size,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "norms": len(before),
        "classes": " ".join(f"{cls}:{count}" for cls, count in classes.items()),
        "converted": report.count,
        "error_to_l1": f"{max(watch.errors.values()):.1e}",
        "gap_to_l2": f"{min(watch.gaps.values()):.1e}",
        "eval_l2_to_l1": f"{_difference(in_l1, first):.1e}",
        "eval_l2_to_l1_to_l2": f"{_difference(back, first):.1e}",
        "cpu_seconds": f"{time.process_time() - begin:.1f}",
    }


def _difference(a: Tensor, b: Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.mark.parametrize("name", FEW)
def test_network(name):
    pytest.importorskip("timm")
    check_network(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", MANY)
def test_many_networks(name):
    pytest.importorskip("timm")
    check_network(name)


def write_table(path: Path) -> None:
    """Check all networks and write a row for each."""
    from norm_matters.record import write_file

    torch.set_num_threads(1)
    rows = []
    for name in sorted([*FEW, *MANY]):
        rows.append(check_network(name))
        print(rows[-1], flush=True)
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_file(path, text.getvalue())


if __name__ == "__main__":
    write_table(Path(__file__).parents[2] / "results" / "forty-networks.csv")
