"""Initial weights: from files and caches, with the head replaced; nothing else may differ silently."""

import hashlib
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from norm_matters.core.config import ModelConfig
from norm_matters.core.errors import UserError
from norm_matters.models import build_model, create_model


def build(name: str, pretrained: bool | str, *, num_classes: int = 4, in_channels: int = 1, **settings):
    config = ModelConfig(name=name, pretrained=pretrained, **settings)
    return build_model(config, num_classes=num_classes, in_channels=in_channels, input_size=8)


@pytest.fixture
def trained():
    """A resnet8 whose every tensor differs from a fresh one's."""
    module = create_model("resnet8", num_classes=4, in_channels=1)
    state = module.state_dict()
    return {key: torch.randn(t.shape).abs() if t.is_floating_point() else t + 7 for key, t in state.items()}


@pytest.fixture
def file(tmp_path, trained):
    path = tmp_path / "weights.safetensors"
    save_file(trained, path)
    return path


def test_every_tensor_is_loaded(file, trained):
    built = build("resnet8", str(file))
    for key, tensor in built.module.state_dict().items():
        assert torch.equal(tensor, trained[key]), key
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    assert built.weights == {"path": str(file), "sha256": sha256, "fresh": []}


def test_weights_of_one_norm_serve_another(file, trained):
    module = build("resnet8", str(file), norm="l1").module
    assert torch.equal(module.state_dict()["bn1.running_var"], trained["bn1.running_var"])


def test_norm_without_running_statistics_passes_them_over(file, trained):
    module = build("resnet8", str(file), norm="group:groups=4").module
    assert torch.equal(module.state_dict()["bn1.weight"], trained["bn1.weight"])


def test_missing_batch_counts_stay_zero(tmp_path, trained):
    path = tmp_path / "old.safetensors"
    save_file({key: tensor for key, tensor in trained.items() if "num_batches" not in key}, path)
    assert build("resnet8", str(path)).module.state_dict()["bn1.num_batches_tracked"] == 0


def test_head_is_replaced_when_the_classes_differ(file, trained):
    built = build("resnet8", str(file), num_classes=3)
    assert built.weights is not None
    assert built.weights["fresh"] == ["fc.bias", "fc.weight"]
    state = built.module.state_dict()
    assert state["fc.weight"].shape == (3, 64)
    assert state["fc.weight"].std() < 0.02
    assert torch.equal(state["layer3.0.conv2.weight"], trained["layer3.0.conv2.weight"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("layer1.0.conv1.weight"), r"no layer1\.0\.conv1\.weight"),
        (lambda state: state.update(extra=torch.zeros(1)), "unknown extra"),
        (lambda state: state.pop("bn1.running_mean"), r"no bn1\.running_mean"),
        (lambda state: state.update({"conv1.weight": torch.zeros(16, 3, 3, 3)}), r"of another shape: conv1\.weight"),
        (lambda state: state.update({"fc.weight": torch.zeros(9, 63)}), r"of another shape: fc\.weight"),
        (lambda state: [state.pop(f"fc.{name}") for name in ("weight", "bias")], r"no fc\.bias, fc\.weight"),
    ],
)
def test_anything_else_that_differs_is_refused(tmp_path, trained, change, message):
    change(trained)
    path = tmp_path / "changed.safetensors"
    save_file(trained, path)
    with pytest.raises(UserError, match=rf"model\.pretrained: the weights do not fit the network: {message}"):
        build("resnet8", str(path))


def test_unreadable_files(tmp_path, file):
    with pytest.raises(UserError, match=r"there is no file '.*none\.safetensors'"):
        build("resnet8", str(tmp_path / "none.safetensors"))
    torch.save({}, tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"a\.pth' is no \.safetensors file"):
        build("resnet8", str(tmp_path / "a.pth"))
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(UserError, match="cannot be read"):
        build("resnet8", str(file))


def test_networks_without_published_weights():
    with pytest.raises(UserError, match="no weights of resnet8 are published"):
        build("resnet8", True)


@pytest.fixture
def publish(tmp_path, monkeypatch):
    """Put weights for resnet18 into torchvision's cache, with the right or a wrong SHA-256 in the name."""
    from norm_matters.core.torchvision import torchvision

    def publish(*, damaged: bool = False) -> dict[str, torch.Tensor]:
        state = torchvision.models.resnet18().state_dict()
        torch.save(state, tmp_path / "file")
        digest = "00000000" if damaged else hashlib.sha256((tmp_path / "file").read_bytes()).hexdigest()[:8]
        (tmp_path / "checkpoints").mkdir()
        (tmp_path / "file").rename(tmp_path / f"checkpoints/resnet18-{digest}.pth")
        weights = SimpleNamespace(DEFAULT=SimpleNamespace(url=f"https://example.com/resnet18-{digest}.pth"))
        monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
        monkeypatch.setattr(torchvision.models, "get_model_weights", lambda name: weights)
        return state

    return publish


@pytest.mark.parametrize("name", ["resnet18", "torchvision:resnet18"])
def test_weights_from_torchvisions_cache(publish, name):
    state = publish()
    config = ModelConfig(name=name, pretrained=True, norm="l1")
    built = build_model(config, num_classes=5, in_channels=3, input_size=32)
    loaded = built.module.state_dict()
    assert torch.equal(loaded["layer4.1.conv2.weight"], state["layer4.1.conv2.weight"])
    assert loaded["fc.weight"].shape == (5, 512)
    assert built.weights is not None
    assert built.weights["fresh"] == ["fc.bias", "fc.weight"]


def test_damaged_weights_in_torchvisions_cache(publish):
    publish(damaged=True)
    with pytest.raises(UserError, match="is damaged"):
        build_model(ModelConfig(name="resnet18", pretrained=True), num_classes=5, in_channels=3, input_size=32)


def test_weights_that_were_not_downloaded_yet(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(UserError, match=r"download https://.*resnet18-f37072fd\.pth to "):
        create_model("resnet18", num_classes=5, pretrained=True)


def test_weights_from_timms_cache(tmp_path, monkeypatch):
    import norm_matters.core.torchvision  # noqa: F401

    timm = pytest.importorskip("timm")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    name = "timm:resnet10t"
    with pytest.raises(UserError, match=r"hf download timm/resnet10t\.\S+ model\.safetensors"):
        create_model(name, num_classes=5, pretrained=True)
    published = timm.create_model("resnet10t")
    repository = published.pretrained_cfg["hf_hub_id"].replace("/", "--")
    folder = tmp_path / f"models--{repository}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs/main").write_text("abc")
    (folder / "snapshots/abc").mkdir(parents=True)
    save_file(published.state_dict(), folder / "snapshots/abc/model.safetensors")
    module = create_model(name, num_classes=5, norm="l1", pretrained=True)
    assert torch.equal(module.state_dict()["conv1.0.weight"], published.state_dict()["conv1.0.weight"])
    assert module.state_dict()["fc.weight"].shape[0] == 5
