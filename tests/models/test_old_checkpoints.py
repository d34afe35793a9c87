"""Import of old checkpoints: the outputs of evaluation stay what they were, and what does not fit is told by name.

The old layers below are written for this test from the described behaviour of the released code: what they keep under
which name, and what they compute from it. They are trained for a few batches, so that every buffer is a real one.
"""

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from norm_matters.core.errors import UserError
from norm_matters.models import create_model
from norm_matters.models.old_checkpoints import ImportedCheckpoint, import_checkpoint

EPS = 1e-5


def channels(values: Tensor) -> Tensor:
    return values.view(1, -1, 1, 1)


def lp_inverse(p: float) -> Callable[[Tensor], Tensor]:
    return lambda d: ((d.abs() ** p).mean(0) + EPS) ** (-1 / p)


def l1_inverse(constant: float) -> Callable[[Tensor], Tensor]:
    return lambda d: 1 / (constant * d.abs().mean(0) + EPS)


def topk_inverse(k: int) -> Callable[[Tensor], Tensor]:
    def inverse(d: Tensor) -> Tensor:
        constant = 0.5 * (1 + math.sqrt(math.pi * math.log(4))) / math.sqrt(2 * math.log(len(d)))
        return 1 / (constant * d.abs().topk(k, 0).values.mean(0) + EPS)

    return inverse


class OldNorm(nn.Module):
    """A norm that keeps the inverse of sigma, the past weighing 0.1; parameters `scale`, `mean` or `weight`, `bias`."""

    def __init__(self, num_features: int, inverse: Callable[[Tensor], Tensor], *, names=("scale", "mean")) -> None:
        super().__init__()
        self.inverse, self.names = inverse, names
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.zeros(num_features))
        for name in reversed(names):
            setattr(self, name, nn.Parameter(torch.rand(num_features) + 0.5))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            values = x.transpose(0, 1).flatten(1).t()
            mean = values.mean(0)
            inverse = self.inverse(values - mean)
            self.running_mean.mul_(0.1).add_(0.9 * mean.detach())
            self.running_var.mul_(0.1).add_(0.9 * inverse.detach())
        else:
            mean, inverse = self.running_mean, self.running_var
        scale, bias = (getattr(self, name) for name in self.names)
        return (x - channels(mean)) * channels(inverse) * channels(scale) + channels(bias)


class OldSmoothedTop(OldNorm):
    """Keeps one buffer more, for training."""

    def __init__(self, num_features: int) -> None:
        super().__init__(num_features, topk_inverse(10))
        self.register_buffer("meanTOPK", torch.rand(num_features))


class OldScaleL1(nn.Module):
    """L1 of the paper's resnet: keeps sigma itself, without eps."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_scale", torch.zeros(num_features))
        self.bias = nn.Parameter(torch.rand(num_features))
        self.weight = nn.Parameter(torch.rand(num_features) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        mean, scale = self.running_mean, self.running_scale
        if self.training:
            mean = x.mean((0, 2, 3))
            scale = (x - channels(mean)).abs().mean((0, 2, 3)) * math.sqrt(math.pi / 2)
            self.running_mean.mul_(0.1).add_(0.9 * mean.detach())
            self.running_scale.mul_(0.1).add_(0.9 * scale.detach())
        return (x - channels(mean)) / channels(scale) * channels(self.weight) + channels(self.bias)


class OldMean(nn.Module):
    """Mean-only: one buffer, one parameter."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.bias = nn.Parameter(torch.rand(num_features))

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean((0, 2, 3)) if self.training else self.running_mean
        if self.training:
            self.running_mean.mul_(0.1).add_(0.9 * mean.detach())
        return x - channels(mean) + channels(self.bias)


class OldBlock(nn.Module):
    """Two convolutions and a shortcut, named as in both code bases."""

    def __init__(self, inputs: int, outputs: int, stride: int, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = norm(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = norm(outputs)
        self.downsample = None
        if stride != 1:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), norm(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return (y + (x if self.downsample is None else self.downsample(x))).relu()


class OldResNet(nn.Module):
    """Eight layers for small images; `spare` is the parameter that one version had and never used."""

    def __init__(self, norm: Callable[[int], nn.Module], *, spare: bool = False) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = norm(16)
        self.layer1 = nn.Sequential(OldBlock(16, 16, 1, norm))
        self.layer2 = nn.Sequential(OldBlock(16, 32, 2, norm))
        self.layer3 = nn.Sequential(OldBlock(32, 64, 2, norm))
        if spare:
            self.scale = nn.Parameter(torch.tensor([10.0]))
        self.fc = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x)).relu()
        return self.fc(self.layer3(self.layer2(self.layer1(x))).mean((2, 3)))


class OldVGG(nn.Sequential):
    """VGG11 of the weight decay experiments, a sixteenth as wide."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = 3
        for outputs in (4, 0, 8, 0, 16, 16, 0, 32, 32, 0, 32, 32, 0):
            if outputs:
                layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
                inputs = outputs
            else:
                layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers, nn.AvgPool2d(1))
        self.flatten = nn.Flatten()
        self.lastlayer_classifier = nn.Linear(32, 10)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def trained(network: nn.Module, *, side: int = 16) -> nn.Module:
    """The network after some batches of images of that side, in evaluation mode."""
    for layer in network.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = 0.9  # as few batches are enough for the statistics of the others
    with torch.no_grad():
        for _ in range(3):
            network(torch.randn(8, 3, side, side))
    return network.eval()


def saved(tmp_path: Path, state: Mapping[str, Tensor], **more) -> Path:
    path = tmp_path / "checkpoint.pth.tar"
    torch.save({"epoch": 5, "state_dict": state, "best_prec1": 61.25, **more}, path)
    return path


def assert_same_outputs(
    tmp_path: Path, old: nn.Module, imported: ImportedCheckpoint, *, side: int = 16, **settings
) -> None:
    """Through the file that --pretrained reads; in float64, so that only the import can differ."""
    path = tmp_path / "imported.safetensors"
    save_file(imported.tensors, path)
    new = create_model(num_classes=10, pretrained=str(path), **settings).eval().double()
    x = torch.randn(8, 3, side, side, dtype=torch.float64)
    with torch.no_grad():
        expected, given = copy.deepcopy(old).double()(x), new(x)
    # Against what differs between images, for a constant part would hide much.
    assert (given - expected).abs().max() < 1e-5 * (expected - expected.mean(0)).abs().max()


def successor(inverse: Callable[[Tensor], Tensor]) -> Callable[[int], OldNorm]:
    return lambda n: OldNorm(n, inverse, names=("weight", "bias"))


KINDS = {
    "lp p=2": ("l2", lambda n: OldNorm(n, lp_inverse(2))),
    "lp p=1": ("lp:p=1", lambda n: OldNorm(n, lp_inverse(1))),
    "lp p=3": ("lp:p=3", lambda n: OldNorm(n, lp_inverse(3))),
    "l1": ("l1", lambda n: OldNorm(n, l1_inverse(math.sqrt(math.pi / 2)))),
    "l1 without its constant": ("l1:constant=1", lambda n: OldNorm(n, l1_inverse(1))),
    "linf": ("linf", lambda n: OldNorm(n, topk_inverse(1))),
    "topk": ("topk:k=10", lambda n: OldNorm(n, topk_inverse(10))),
    "smoothed topk": ("topk:k=10", OldSmoothedTop),
    "l1 that keeps sigma": ("l1", OldScaleL1),
    "successor l1": ("l1", successor(l1_inverse(math.sqrt(math.pi / 2)))),
    "successor topk": ("topk:k=10", successor(topk_inverse(10))),
    "plain": ("l2", nn.BatchNorm2d),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shrink", [1.0, 1e-3])
def test_evaluation_gives_the_old_outputs(tmp_path, kind, shrink):
    """Also with sigmas far below the square root of eps, where the eps of old and new matter most."""
    norm, old_norm = KINDS[kind]
    old = OldResNet(old_norm)
    with torch.no_grad():
        for name in ("layer1.0.conv1", "layer2.0.conv1", "layer3.0.downsample.0"):
            old.get_parameter(f"{name}.weight")[::2] *= shrink
    old = trained(old)
    undecided = "inverse" if kind.startswith("successor") else None
    imported = import_checkpoint(saved(tmp_path, old.state_dict()), model="resnet8", norm=norm, running_var=undecided)
    assert_same_outputs(tmp_path, old, imported, name="resnet8", norm=norm)
    assert imported.file.epoch == 5
    assert imported.num_classes == 10
    assert sum(imported.norms.kinds.values()) == 9
    # Lp with p from 2 cannot fall below the square root of our eps: its own eps is in units of sigma^p.
    assert bool(imported.norms.rescaled) == (shrink < 1 and kind not in ("plain", "lp p=2", "lp p=3"))


def test_estimate_is_sigma_squared(tmp_path):
    """In our sense: the constant is in it, eps is not."""
    old = trained(OldResNet(lambda n: OldNorm(n, l1_inverse(math.sqrt(math.pi / 2)))))
    tensors = import_checkpoint(saved(tmp_path, old.state_dict()), model="resnet8", norm="l1").tensors
    x = torch.randn(64, 3, 16, 16)
    with torch.no_grad():
        for _ in range(20):  # the running statistics become this batch's
            old.bn1.train()(old.conv1(x))
        converged = import_checkpoint(saved(tmp_path, old.state_dict()), model="resnet8", norm="l1").tensors
        d = old.conv1(x).transpose(0, 1).flatten(1)
    sigma = math.sqrt(math.pi / 2) * (d - d.mean(1, keepdim=True)).abs().mean(1)
    torch.testing.assert_close(converged["bn1.running_var"], sigma**2, rtol=1e-4, atol=0)
    assert not torch.allclose(tensors["bn1.running_var"], sigma**2, rtol=1e-4, atol=0)


def test_smaller_eps_needs_no_factor(tmp_path):
    """The old floor of sigma, 1e-5, is that of our norm with eps 1e-10: nothing is below it, dead channels included."""
    old = OldResNet(lambda n: OldNorm(n, l1_inverse(math.sqrt(math.pi / 2))))
    with torch.no_grad():
        old.layer1[0].conv1.weight[3] = 0
        old.layer2[0].conv1.weight *= 1e-3
    path = saved(tmp_path, trained(old).state_dict())
    plain = import_checkpoint(path, model="resnet8", norm="l1")
    assert plain.norms.rescaled == {"layer1.0.bn1": 1, "layer2.0.bn1": 32}
    assert any("33 channels" in line for line in plain.lines())
    exact = import_checkpoint(path, model="resnet8", norm="l1:eps=1e-10")
    assert exact.norms.rescaled == {}
    assert torch.equal(exact.tensors["layer2.0.bn1.weight"], old.state_dict()["layer2.0.bn1.scale"])
    assert_same_outputs(tmp_path, old, exact, name="resnet8", norm="l1:eps=1e-10")


def test_plain_norms_and_their_counts_are_left_as_they_are(tmp_path):
    old = trained(OldResNet(nn.BatchNorm2d))
    imported = import_checkpoint(saved(tmp_path, old.state_dict()), model="resnet8")
    assert imported.tensors.keys() == old.state_dict().keys()
    for name, tensor in old.state_dict().items():
        assert torch.equal(imported.tensors[name], tensor), name
    assert not any("hint" in line for line in imported.lines())


def test_what_a_running_var_holds_is_not_guessed(tmp_path):
    """Before torch 0.4.1 a plain batch norm looked like the successor's own."""
    old = trained(OldResNet(nn.BatchNorm2d))
    state = {name: tensor for name, tensor in old.state_dict().items() if "num_batches" not in name}
    path = saved(tmp_path, state)
    with pytest.raises(UserError, match=r"bn1, layer1.0.bn1, layer1.0.bn2 and 6 more: .*--running-var inverse or var"):
        import_checkpoint(path, model="resnet8")
    imported = import_checkpoint(path, model="resnet8", running_var="variance")
    assert imported.tensors["bn1.num_batches_tracked"] == 0
    assert_same_outputs(tmp_path, old, imported, name="resnet8")


def test_vgg_of_the_weight_decay_experiments(tmp_path):
    """Trained under DataParallel with a torch before 0.4.1."""
    old = trained(OldVGG(), side=32)
    state = {f"module.{name}": t for name, t in old.state_dict().items() if "num_batches" not in name}
    imported = import_checkpoint(saved(tmp_path, state), model="vgg11", options={"width": 4})
    assert imported.renamed["module.lastlayer_classifier.bias"] == "classifier.bias"
    assert_same_outputs(tmp_path, old, imported, side=32, name="vgg11", width=4)


@pytest.mark.parametrize(("name", "width"), [("resnet18", 4), ("resnet50", 4), ("resnet56", 2)])
def test_names_of_the_other_resnets(tmp_path, name, width):
    """Under DataParallel, with a stage under the successor's activation checkpointing."""
    old = create_model(name, num_classes=10, width=width)
    for path, layer in list(old.named_modules()):
        if path.rpartition(".")[2].startswith("bn") or path.endswith("downsample.1"):
            parent = old.get_submodule(path.rpartition(".")[0])
            setattr(parent, path.rpartition(".")[2], OldNorm(layer.num_features, topk_inverse(4)))
    with torch.no_grad():
        for _ in range(3):
            old(torch.randn(8, 3, 32, 32))
    old.eval()
    state = {f"module.{key}".replace("layer2.", "layer2.module."): t for key, t in old.state_dict().items()}
    assert "module.layer2.module.0.downsample.1.scale" in state
    imported = import_checkpoint(saved(tmp_path, state), model=name, norm="topk:k=4", options={"width": width})
    assert imported.renamed["module.layer2.module.0.downsample.1.scale"] == "layer2.0.downsample.1.weight"
    assert_same_outputs(tmp_path, old, imported, side=32, name=name, norm="topk:k=4", width=width)


def norms(v: Tensor, p: float = 2) -> Tensor:
    return v.flatten(1).norm(p, dim=1).view(-1, 1, 1, 1)


def old_weights(kind: str, v: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """What a layer with weight v kept after training, and the weight it computed."""
    g, bound = torch.rand(len(v), 1, 1, 1) + 0.5, torch.rand(1) + 1.5
    if kind == "weight norm":
        return {"weight_g": g, "weight_v": v}, g * v / norms(v)
    if kind.startswith("bounded, learned g"):
        p = float(kind.rpartition("=")[2])
        bound = bound * math.sqrt(len(v)) * (norms(v, p) / norms(v)).mean()  # weights of a usual size
        return {"weight_g_prenorm": bound, "weight_g": g, "weight_v": v}, bound / g.norm() * g * v / norms(v, p)
    suffix = {"bounded": "weight_v_prenorm", "successor's bounded": "weight_init_norm"}[kind]
    return {suffix: bound, "weight_v": v}, bound * v / norms(v)


@pytest.mark.parametrize(
    "kind",
    ["weight norm", *(f"bounded, learned g, p={p}" for p in (1, 2, "inf")), "bounded", "successor's bounded"],
)
def test_normalised_weights(tmp_path, kind):
    """The paper's network: mean-only norms, and a parameter at the top that nothing used."""
    old = OldResNet(OldMean, spare=True)
    state: dict[str, Tensor] = {}
    for name, tensor in list(old.state_dict().items()):
        layer = name.removesuffix(".weight")
        if isinstance(old.get_submodule(layer) if layer != name else None, nn.Conv2d):
            parts, weight = old_weights(kind, torch.randn(tensor.shape))
            old.get_parameter(name).data = weight
            state |= {f"{layer}.{part}": value for part, value in parts.items()}
    old = trained(old)
    state |= {name: tensor for name, tensor in old.state_dict().items() if tensor.dim() < 4}
    p = float(kind.rpartition("=")[2]) if "p=" in kind else 2.0
    imported = import_checkpoint(saved(tmp_path, state), model="resnet8", norm="mean", weight_p=p)
    assert len(imported.computed) == 9
    assert imported.passed_over == {"scale": "the old network had it and never used it"}
    assert (imported.tensors["bn1.running_var"] == 1).all()
    assert_same_outputs(tmp_path, old, imported, name="resnet8", norm="mean")
    # Wrapped again, the weights bring their bound and g along: training goes on as it was.
    spec = f"bounded:p={kind.rpartition('=')[2]},learn_g=true" if "p=" in kind else "bounded"
    if kind != "weight norm":
        assert_same_outputs(tmp_path, old, imported, name="resnet8", norm="mean", weight_norm=spec)


def test_one_g_for_the_whole_weight(tmp_path):
    """Torch's weight norm with dim=None."""
    old = trained(OldResNet(nn.BatchNorm2d))
    state = dict(old.state_dict())
    v = state.pop("conv1.weight")
    state = {"conv1.weight_g": torch.tensor(3.0), "conv1.weight_v": v, **state}
    imported = import_checkpoint(saved(tmp_path, state), model="resnet8")
    torch.testing.assert_close(imported.tensors["conv1.weight"], 3 * v / v.norm())


def test_nothing_is_dropped_silently(tmp_path):
    old = trained(OldResNet(OldSmoothedTop, spare=True))
    path = saved(tmp_path, {f"module.{name}": tensor for name, tensor in old.state_dict().items()})
    imported = import_checkpoint(path, model="resnet8", norm="topk")
    assert imported.passed_over.keys() == {
        name for name in imported.file.tensors if name.endswith("meanTOPK") or name == "module.scale"
    }
    used = imported.file.tensors.keys() - imported.passed_over.keys()
    assert {imported.renamed.get(name, name) for name in used} == {
        name for name in imported.tensors if not name.endswith("num_batches_tracked")
    }
    report = "\n".join(imported.lines())
    for expected in (
        "epoch 5, best accuracy 61.25%",
        "norms: 9 kept the inverse of sigma",
        "passed over: module.scale: the old network had it and never used it",
        "hint: the old momentum 0.1 was the weight of the past",
    ):
        assert expected in report


def changed(state: dict[str, Tensor]) -> Iterator[tuple[dict[str, Tensor], str]]:
    """Broken states, and what is to be said of each."""

    def without(*names: str) -> dict[str, Tensor]:
        return {name: tensor for name, tensor in state.items() if name not in names}

    def filled(name: str, value: float) -> dict[str, Tensor]:
        return state | {name: torch.full_like(state[name], value)}

    yield without("layer1.0.conv2.weight"), r"the file lacks layer1\.0\.conv2\.weight"
    yield without("bn1.mean"), r"the file lacks bn1\.bias"
    yield state | {"extra.bias": torch.zeros(2)}, r"the network has no extra\.bias"
    yield state | {"bn1.extra": torch.zeros(2)}, r"the network has no bn1\.extra"
    yield state | {"module.fc.bias": torch.zeros(10)}, r"'module\.fc\.bias' is there twice"
    yield state | {"scale": torch.zeros(3)}, "the network has no scale"
    yield state | {"fc.weight": torch.zeros(10, 5)}, r"fc\.weight is \(10, 5\) in the file, \(10, 64\) in the network"
    yield filled("bn1.running_var", 0), r"bn1: a running_var holds 0, .* before the first step"
    yield filled("bn1.running_var", -1), "bn1: a running_var holds 0, a negative"
    yield filled("bn1.running_var", math.inf), "bn1: a running_var holds 0, a negative or no finite"
    yield filled("bn1.running_var", math.nan), "bn1: a running_var holds 0, a negative or no finite"
    yield filled("conv1.weight", math.nan), r"not finite: conv1\.weight"
    yield without("bn1.running_var"), r"bn1: the old norm only subtracts the mean; import it with the norm 'mean'"
    v = {"conv1.weight_v": state["conv1.weight"]}
    yield without("conv1.weight") | v | {"conv1.weight_g": torch.ones(5, 1, 1, 1)}, r"conv1\.weight_g: its shape"
    yield without("conv1.weight") | v | {"conv1.weight_init_norm": torch.ones(2)}, r"conv1\.weight: its bound has"
    yield without("conv1.weight") | v, r"the network has no conv1\.weight_v"


@pytest.mark.parametrize("case", range(16))
def test_what_does_not_fit_is_named(tmp_path, case):
    state = dict(trained(OldResNet(lambda n: OldNorm(n, lp_inverse(2)))).state_dict())
    broken, message = list(changed(state))[case]
    with pytest.raises(UserError, match=message):
        import_checkpoint(saved(tmp_path, broken), model="resnet8")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": "resnet20"}, r"the file lacks layer1\.1\.conv1\.weight"),
        ({"model": "vgg11"}, r"the network has no conv1\.weight, bn1\.mean, bn1"),
        ({"model": "resnet8", "num_classes": 4}, r"fc\.weight is \(10, 64\) in the file, \(4, 64\) in the network"),
        ({"model": "resnet8", "norm": "mean"}, "the old norm divides by sigma, and the norm asked for does not"),
        ({"model": "resnet8", "norm": "group:groups=4"}, r"the network has no .*bn1\.running_mean"),
        ({"model": "resnet8", "norm": "none"}, r"the network has no .*bn1\.running_mean"),
        ({"model": "resnet9"}, "did you mean 'resnet"),
        ({"model": "resnet8", "options": {"norm": "l1"}}, r"model\.options\.norm: unknown option"),
    ],
)
def test_wrong_network(tmp_path, settings, message):
    path = saved(tmp_path, trained(OldResNet(lambda n: OldNorm(n, lp_inverse(2)))).state_dict())
    with pytest.raises(UserError, match=message):
        import_checkpoint(path, **settings)


def test_importing_draws_from_no_shared_stream(tmp_path):
    path = saved(tmp_path, trained(OldResNet(nn.BatchNorm2d)).state_dict())
    before = torch.get_rng_state()
    import_checkpoint(path, model="resnet8")
    assert torch.equal(torch.get_rng_state(), before)
