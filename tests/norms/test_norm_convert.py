"""Conversion of built networks: what is carried over, what is refused, and that an error changes nothing."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from norm_matters.core.errors import UserError
from norm_matters.norms import canonical_spec, convert_norm, create_norm, kinds_to_convert, norms_of, spec_of
from norm_matters.norms.selection import Row

GROUPS = nn.GroupNorm(2, 8)
IMAGES = (4, 8, 5, 5)
TOKENS = (4, 7, 8)


def network() -> nn.Sequential:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))
    )
    for _ in range(3):
        model(torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0)))
    return model


def library_layers():
    import norm_matters.core.torchvision  # noqa: F401  (timm needs it on a CPU build of torch)

    return pytest.importorskip("timm.layers")


def perturbed(norm):
    """The layer with an affine map that is not the identity."""
    with torch.no_grad():
        for tensor in (norm.weight, norm.bias):
            if tensor is not None:
                tensor.add_(0.5 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1)))
    return norm


@pytest.mark.parametrize("spec", ["l2", "l1", "linf", "topk:k=10", "lp:p=3"])
def test_conversion_keeps_the_network_in_evaluation(spec):
    model = network().eval()
    x = torch.randn(2, 3, 6, 6)
    before, keys = model(x), list(model.state_dict())
    report = convert_norm(model, spec)
    assert report.count == 2
    assert report.rows == [Row("1", "BatchNorm2d", spec), Row("3.1", "BatchNorm2d", spec)]
    assert "3.1" in str(report)
    assert [spec_of(norm) for _, norm in norms_of(model)] == [spec, spec]
    torch.testing.assert_close(model(x), before, rtol=1e-6, atol=1e-6)
    assert list(model.state_dict()) == keys
    model.train()(x).sum().backward()


def test_what_is_carried_over():
    old = nn.BatchNorm1d(4, eps=0.125, momentum=None, dtype=torch.float64)
    old(torch.randn(8, 4, dtype=torch.float64))
    old.weight.requires_grad_(False)
    model = nn.ModuleDict({"a": old, "b": nn.BatchNorm3d(4, affine=False, track_running_stats=False).eval()})
    weight, mean = old.weight, old.running_mean.clone()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    convert_norm(model, "l1")
    new = model["a"]
    assert (new.eps, new.momentum, new.training, new.layer_name) == (0.125, None, True, "a")
    assert new.weight is weight
    assert not new.weight.requires_grad
    assert new.bias is optimizer.param_groups[0]["params"][1]
    assert torch.equal(new.running_mean, mean)
    assert new.running_mean.dtype == torch.float64
    assert new.num_batches_tracked == 1
    assert model["b"].weight is None
    assert model["b"].running_mean is None
    assert not model["b"].training


def test_an_optimizer_built_before_goes_on_training_the_norms():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    convert_norm(model, "l1")
    before = [parameter.clone() for parameter in model.parameters()]
    (model(torch.randn(4, 3, 6, 6)) ** 3).sum().backward()
    optimizer.step()
    # A bias of a convolution before a norm has no gradient.
    changed = [not torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True)]
    assert changed[2:4] == changed[6:8] == [True, True]


def test_spec_and_options_go_before_the_old_layer():
    model = nn.Sequential(nn.BatchNorm2d(4, eps=0.25, momentum=0.5))
    convert_norm(model, "l1:eps=0.125", momentum=0.75, stats_dtype="input")
    assert model[0].spec == "l1:momentum=0.75,eps=0.125,stats_dtype=input"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layer", [nn.BatchNorm2d(4), nn.LayerNorm(4), nn.GroupNorm(2, 4)])
def test_half_network_gets_float32_statistics(layer, dtype):
    model = nn.Sequential(copy.deepcopy(layer)).to(dtype)
    convert_norm(model, "l1", kinds=("batch", "layer", "group"))
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert {buffer.dtype for buffer in model.buffers()} <= {torch.float32, torch.long}
    y = model(torch.randn(2, 4, 4, 4, dtype=dtype))
    assert y.dtype == dtype
    y.sum().backward()
    assert model[0].weight.grad.dtype == dtype


def test_a_network_on_the_meta_device_stays_there():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, affine=False, track_running_stats=False)).to("meta")
    convert_norm(model, "l1:track_running_stats=true,affine=true")
    assert {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} == {"meta"}


@pytest.mark.parametrize("layer", [nn.BatchNorm2d(8), nn.GroupNorm(2, 8)])
def test_the_memory_layout_stays(layer):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), copy.deepcopy(layer)).to(memory_format=torch.channels_last)
    convert_norm(model, "l1", kinds=("batch", "group"))
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)
    y = model(torch.randn(2, 3, 6, 6).contiguous(memory_format=torch.channels_last))
    assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("spec", ["group:groups=2", "layer", "instance", "position", "mean", "mean:scale=true", "none"])
def test_conversion_to_other_places(spec):
    model = network()
    weights = [norm.weight for _, norm in norms_of(model)]
    report = convert_norm(model, spec)
    assert report.count == 2
    model(torch.randn(4, 3, 6, 6)).sum().backward()
    if spec.startswith("mean"):
        # Its sigma is 1: another norm's estimate has no place in it.
        assert all(torch.equal(norm.running_var, torch.ones(8)) for _, norm in norms_of(model))
        assert norms_of(model)[0][1].running_mean.abs().max() > 0
        assert "running variance dropped" in report.rows[0].note
    else:
        assert "running statistics dropped" in report.rows[0].note
    if spec in ("mean", "none"):
        assert "weight dropped" in report.rows[0].note
    else:
        assert all(norm.weight is weight for (_, norm), weight in zip(norms_of(model), weights, strict=True))


def test_our_norms_are_converted_too():
    model = nn.Sequential(create_norm("mean", 4, momentum=0.5), create_norm("l1:eps=0.25", 4))
    report = convert_norm(model, "topk:k=2")
    assert report.rows == [
        Row("0", "mean:momentum=0.5", "topk:k=2,momentum=0.5"),
        Row("1", "l1:eps=0.25", "topk:k=2,eps=0.25"),
    ]


def norms_within_images():
    """A layer, its kind, the shape of an input, and the spec of what it is."""
    layers = library_layers()
    from norm_matters.core.torchvision import torchvision

    tokens, pixels = "position:channel_dim=-1", "position:channel_dim=1"
    return [
        (nn.LayerNorm(8), "layer", TOKENS, tokens),
        (nn.LayerNorm(8, bias=False), "layer", TOKENS, f"{tokens},bias=false"),
        (nn.LayerNorm(8, elementwise_affine=False), "layer", TOKENS, f"{tokens},affine=false"),
        (nn.GroupNorm(2, 8, eps=0.5), "group", IMAGES, "group:groups=2,eps=0.5"),
        (nn.GroupNorm(4, 8, affine=False), "group", (4, 8, 7), "group:groups=4,affine=false"),
        (nn.InstanceNorm2d(8), "instance", IMAGES, "instance:affine=false"),
        (nn.InstanceNorm1d(8, affine=True), "instance", (4, 8, 7), "instance:affine=true"),
        (layers.LayerNorm(8), "layer", TOKENS, f"{tokens},eps=1e-6"),
        (layers.LayerNormFp32(8), "layer", TOKENS, f"{tokens},eps=1e-6"),
        (layers.LayerNormAct(8, act_layer=nn.SiLU), "layer", TOKENS, tokens),
        (layers.LayerNormActFp32(8), "layer", TOKENS, tokens),
        (layers.LayerNorm2d(8), "layer", IMAGES, f"{pixels},eps=1e-6"),
        (layers.LayerNorm2dFp32(8), "layer", IMAGES, f"{pixels},eps=1e-6"),
        (layers.norm.LayerNormExp2d(8), "layer", IMAGES, f"{pixels},eps=1e-6"),
        (layers.LayerNormAct2d(8), "layer", IMAGES, pixels),
        (layers.LayerNormAct2dFp32(8), "layer", IMAGES, pixels),
        (torchvision.models.convnext.LayerNorm2d(8), "layer", IMAGES, pixels),
        (layers.GroupNorm(8, 2), "group", IMAGES, "group:groups=2"),
        (layers.GroupNorm1(8), "group", IMAGES, "group:groups=1"),
        (layers.GroupNormAct(8, 2), "group", IMAGES, "group:groups=2"),
        (layers.GroupNorm1Act(8), "group", IMAGES, "group:groups=1"),
    ]


def test_each_norm_within_images_keeps_its_place():
    for old, kind, shape, spec in norms_within_images():
        name = type(old).__name__
        model = nn.Sequential(perturbed(old))
        x = torch.randn(shape)
        # fused activations may work in place
        expected = model(x.clone())
        report = convert_norm(model, "l1", kinds=kind)
        assert report.rows == [Row("0", name, canonical_spec(f"{spec},statistic=l1"))]
        assert (model[0].weight, model[0].bias) == (old.weight, old.bias), name
        assert (model(x.clone()) - expected).abs().max() > 1e-3, name
        assert convert_norm(model, "l2", kinds=kind).rows[0].after == canonical_spec(spec)
        torch.testing.assert_close(model(x.clone()), expected, rtol=1e-5, atol=1e-5)


def test_rms_norms_are_a_kind_of_their_own():
    layers = library_layers()
    olds = {
        TOKENS: [nn.RMSNorm(8), nn.RMSNorm(8, eps=0.5), layers.RmsNorm(8), layers.RmsNormFp32(8), layers.RmsNormAct(8)],
        IMAGES: [layers.RmsNorm2d(8), layers.RmsNorm2dFp32(8), layers.RmsNormAct2d(8), layers.RmsNormAct2dFp32(8)],
    }
    for shape, several in olds.items():
        for old in several:
            x = torch.randn(shape)
            model = nn.Sequential(perturbed(old) if getattr(old, "bias", None) is not None else old)
            expected = model(x)
            with pytest.raises(ValueError, match="no batch or layer norm, but 1 of kind 'rms'; name them in kinds"):
                convert_norm(model, "rms", kinds=("batch", "layer"))
            convert_norm(model, "rms", kinds="rms")
            assert model[0].statistic == "rms"
            assert model[0].bias is None
            torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
            # ours are of that kind too, until they have another statistic
            convert_norm(model, "l1", kinds="rms")
            assert model[0].statistic == "l1"
            with pytest.raises(ValueError, match="no rms norm"):
                convert_norm(model, "l2", kinds="rms")


@pytest.mark.parametrize(
    ("old", "spec", "new"),
    [
        (nn.LayerNorm(8), "topk:k=3", "position:statistic=(topk:k=3),channel_dim=-1"),
        (nn.LayerNorm(8), "lp:p=3,eps=0.5", "position:statistic=(lp:p=3),eps=0.5,channel_dim=-1"),
        (nn.LayerNorm(8), "position:statistic=linf", "position:statistic=linf,channel_dim=-1"),
        (GROUPS, "position:statistic=linf", "position:statistic=linf"),
        # its place is the batch, so it is no statistic
        (GROUPS, "smooth:base=l1", "smooth:base=l1,beta=0.75"),
        (GROUPS, "group:statistic=l1", "group:groups=2,statistic=l1"),
        (GROUPS, "group:groups=4", "group:groups=4"),
        (GROUPS, "layer:statistic=l1", "layer:statistic=l1"),
        (nn.BatchNorm2d(8), "group:groups=4,statistic=l1", "group:groups=4,statistic=l1"),
        (create_norm("group:groups=2,stats_dtype=input", 8), "l1", "group:groups=2,statistic=l1,stats_dtype=input"),
        (GROUPS, "timm:frn", "timm:frn,eps=1e-05"),
        (create_norm("l1", 8), "frozen", "frozen"),
        (create_norm("l1:frozen=affine", 8), "frozen", "frozen"),
        (create_norm("l1:frozen=affine", 8), "l2", "l2:frozen=affine"),
        (create_norm("l1:frozen=all", 8), "layer", "layer:frozen=affine"),
        (create_norm("l1:frozen=stats", 8), "layer", "layer"),
    ],
    ids=str,
)
def test_where_stays_unless_the_spec_says_it(old, spec, new):
    model = nn.Sequential(copy.deepcopy(old))
    report = convert_norm(model, spec, kinds=("batch", "layer", "group"))
    assert report.rows[0].after == spec_of(model[0]) == new


def test_options_that_a_place_has_no_use_for_are_reported():
    model = nn.Sequential(nn.BatchNorm2d(4), nn.LayerNorm(4))
    report = convert_norm(model, "l1:momentum=0.5,sync=true,bias=false", kinds=("batch", "layer"))
    assert report.rows[0].after == "l1:momentum=0.5,sync=true,bias=false"
    assert report.rows[1].after == "position:statistic=l1,bias=false,channel_dim=-1"
    assert report.rows[1].note == "momentum, sync has no use, bias dropped"


def test_other_kinds_are_left_and_named():
    layers = library_layers()
    model = nn.Sequential(nn.BatchNorm2d(4), nn.LayerNorm(4), layers.EvoNorm2dS0(4, groups=2), create_norm("none", 4))
    report = convert_norm(model, "l1")
    assert report.count == 1
    assert report.left == [
        Row("1", "LayerNorm", "LayerNorm", "left: kinds has no 'layer'"),
        Row("2", "EvoNorm2dS0", "EvoNorm2dS0", "left: it is of no kind that is converted"),
        Row("3", "none", "none", "left: it is of no kind that is converted"),
    ]
    assert str(report).splitlines()[2].split() == ["1", *["LayerNorm"] * 2, "left:", "kinds", "has", "no", "'layer'"]
    assert type(model[1]) is nn.LayerNorm


def test_the_kinds_that_nobody_names():
    assert kinds_to_convert(nn.Sequential(nn.LayerNorm(4), nn.BatchNorm2d(4))) == ("batch",)
    assert kinds_to_convert(nn.Sequential(nn.LayerNorm(4))) == ("layer", "group")


def test_tied_layers_stay_one_layer():
    shared = nn.BatchNorm1d(4)
    model = nn.ModuleDict({"a": nn.Sequential(shared), "b": nn.Sequential(shared, nn.BatchNorm1d(4))})
    model["b"][1].weight = shared.weight
    report = convert_norm(model, "l1")
    assert [row.note for row in report.rows] == ["also b.0", ""]
    assert model["a"][0] is model["b"][0]
    assert model["b"][1].weight is model["a"][0].weight


@pytest.mark.parametrize(
    ("include", "exclude", "converted"),
    [(None, "3.*", ["1"]), ("3.*", None, ["3.1"]), (["1", "3.1"], "1", ["3.1"]), ("*", [], ["1", "3.1"])],
)
def test_include_and_exclude(include, exclude, converted):
    report = convert_norm(network(), "l1", include=include, exclude=exclude)
    assert [row.name for row in report.rows] == converted


@pytest.mark.parametrize("include", [None, "3.*"])
def test_a_dry_run_reports_the_same_and_changes_nothing(include):
    model = network()
    model[3].eval()
    model[1].register_forward_hook(lambda *_: None)
    modules, state = list(model.modules()), copy.deepcopy(model.state_dict())
    fields = [{**vars(module)} for module in modules]
    plan = convert_norm(model, "l1:frozen=all", include=include, dry_run=True)
    assert list(model.modules()) == modules
    assert [vars(module) for module in modules] == fields
    assert all(torch.equal(tensor, state[key]) for key, tensor in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    done = convert_norm(model, "l1:frozen=all", include=include)
    assert (plan.rows, plan.left) == (done.rows, done.left)
    assert not model[3][1].weight.requires_grad


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"spec": "l1", "include": "nothing"}, "leave none of 1, 3.1"),
        ({"spec": "l1", "exclude": "*"}, "leave none of"),
        ({"spec": "l9"}, "unknown norm 'l9'"),
        ({"spec": "group:groups=3"}, "8 channels do not divide into 3"),
        ({"spec": "position:channel_dim=-1"}, "layer '1' has its channels at dimension 1, and .* takes them last"),
        ({"spec": "l1", "kinds": "bach"}, "there is no kind of norm 'bach'; did you mean 'batch'"),
        ({"spec": "l1", "kinds": ["layer", "group"]}, "no layer or group norm, but 2 of kind 'batch'; name them in"),
    ],
)
def test_an_error_changes_nothing(arguments, message):
    model = network()
    before = list(model.modules())
    with pytest.raises((ValueError, UserError), match=message):
        convert_norm(model, **arguments)
    assert list(model.modules()) == before


def test_no_norm_at_all():
    with pytest.raises(ValueError, match=r"nothing was converted to 'l1': the model has no batch norm$"):
        convert_norm(nn.Sequential(nn.Linear(2, 2)), "l1")


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(4), nn.LayerNorm(4), create_norm("l1", 4)], ids=type)
def test_a_norm_itself_is_refused(norm):
    with pytest.raises(ValueError, match="itself a norm"):
        convert_norm(norm, "l1")


class OwnForward(nn.BatchNorm2d):
    def forward(self, input):
        return super().forward(input).relu()


class NeverTrains(nn.BatchNorm2d):
    def train(self, mode: bool = True):
        return super().train(False)


class OnlyNamed(nn.LayerNorm):
    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-3, bias=False)


def patched() -> nn.Module:
    norm = nn.BatchNorm2d(4)
    norm.forward = lambda x: x  # type: ignore[method-assign]
    return norm


def pruned() -> nn.Module:
    norm = nn.BatchNorm2d(4)
    prune.random_unstructured(norm, "weight", amount=1)
    return norm


def with_state_hook() -> nn.Module:
    norm = nn.BatchNorm2d(4)
    norm.register_state_dict_post_hook(lambda *_: None)
    return norm


def changed_tracking() -> nn.Module:
    norm = nn.BatchNorm2d(4)
    norm.track_running_stats = False
    return norm


@pytest.mark.parametrize(
    ("norm", "message"),
    [
        (OwnForward(4), "(OwnForward) has its own forward, which"),
        (NeverTrains(4), "(NeverTrains) has its own train, which"),
        (patched(), "has its own forward, which"),
        (torch.ao.nn.quantized.BatchNorm2d(4), "forward, from_float"),
        (pruned(), "has weight_orig, weight_mask, which"),
        (parametrizations.weight_norm(nn.BatchNorm2d(4), dim=None), "has a parametrized weight"),
        (parametrizations.weight_norm(create_norm("l2", 4), dim=None), "has a parametrized weight"),
        (nn.LazyBatchNorm2d(), "has no channels yet"),
        (with_state_hook(), "has hooks on its state"),
        (changed_tracking(), "had its track_running_stats changed"),
        (nn.LayerNorm((4, 2)), "normalises over 2 dimensions, (4, 2)"),
        (nn.InstanceNorm2d(4, track_running_stats=True), "instance norm with running statistics"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_no_norm_here_does_is_refused_by_name(norm, message):
    model = nn.Sequential(nn.BatchNorm2d(4), norm)
    with pytest.raises(ValueError, match="layer '1' \\(") as caught:
        convert_norm(model, "l1", kinds=("batch", "layer", "instance"))
    assert message in str(caught.value)
    assert "to leave it, exclude it" in str(caught.value)
    assert type(model[0]) is nn.BatchNorm2d
    assert convert_norm(model, "l1", exclude="1").count == 1
    assert model[1] is norm


def test_a_class_that_only_sets_options_is_known():
    model = nn.Sequential(OnlyNamed(4))
    assert convert_norm(model, "l1", kinds="layer").rows == [
        Row("0", "OnlyNamed", "position:statistic=l1,eps=0.001,bias=false,channel_dim=-1")
    ]


def test_what_only_one_norm_has_is_dropped_and_named():
    model = nn.Sequential(nn.GroupNorm(2, 8))
    assert convert_norm(model, "smooth:base=l1", kinds="group").rows[0].note == "running statistics start anew"
    assert convert_norm(model, "l1").rows[0].note == "smoothed_sigma dropped"


@pytest.mark.parametrize("spec", ["group:groups=2", "layer", "instance", "smooth", "none"])
def test_tokens_take_no_norm_of_images(spec):
    model = nn.Sequential(nn.LayerNorm(8))
    with pytest.raises(ValueError, match=r"layer '0' has its channels last, and '.*' takes them at dimension 1"):
        convert_norm(model, spec, kinds="layer")
    assert type(model[0]) is nn.LayerNorm


def wrapped_models():
    layer = nn.Sequential(nn.BatchNorm1d(4))
    compiled = copy.deepcopy(layer)
    compiled.compile(backend="eager")
    return {
        # what `fully_shard` makes of a class
        "FSDPModule": type("FSDPSequential", (type("FSDPModule", (), {}), nn.Sequential), {})(nn.BatchNorm1d(4)),
        "DataParallel": nn.DataParallel(layer),
        "OptimizedModule": torch.compile(layer, backend="eager"),
        "compiled module": compiled,
    }


@pytest.mark.parametrize("name", ["FSDPModule", "DataParallel", "OptimizedModule", "compiled module"])
@pytest.mark.parametrize("inner", [False, True])
def test_wrapped_networks_are_refused(name, inner):
    model = wrapped_models()[name]
    model = nn.ModuleDict({"inner": model}) if inner else model
    where = "layer 'inner'" if inner else "the model"
    with pytest.raises(ValueError, match=rf"{where} is wrapped \({name}\): convert its norms first, then wrap it"):
        convert_norm(model, "l1")


def test_distributed_and_scripted_networks_are_refused(tmp_path):
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(nn.Sequential(nn.BatchNorm1d(4)))
    finally:
        dist.destroy_process_group()
    with pytest.raises(ValueError, match=r"wrapped \(DistributedDataParallel\)"):
        convert_norm(model, "l1")
    with pytest.warns(DeprecationWarning, match="torch.jit.script"):
        scripted = torch.jit.script(nn.Sequential(nn.BatchNorm1d(4)))
    with pytest.raises(ValueError, match=r"wrapped \(ScriptModule\)"):
        convert_norm(scripted, "l1")


def test_hooks_are_kept_and_can_be_removed():
    model = network()
    seen = []
    handles = [
        model[1].register_forward_pre_hook(lambda norm, inputs: seen.append(spec_of(norm))),
        model[1].register_forward_hook(lambda norm, inputs, output: output * 0),
        model[1].register_full_backward_hook(lambda norm, inputs, outputs: seen.append("backward")),
    ]
    report = convert_norm(model, "l1")
    assert report.rows[0].note == "hooks kept: 3"
    x = torch.randn(4, 3, 6, 6)
    assert torch.count_nonzero(model[:2](x)) == 0
    model(x).sum().backward()
    assert seen == ["l1", "l1", "backward"]
    for handle in handles:
        handle.remove()
    assert torch.count_nonzero(model[:2](x)) > 0
    assert len(seen) == 3


def test_synchronised_batch_norm_stays_synchronised():
    model = nn.Sequential(nn.SyncBatchNorm(4), nn.SyncBatchNorm(4, process_group="a group"), nn.SyncBatchNorm(4))
    report = convert_norm(model, "l1", exclude="2")
    assert report.rows == [
        Row("0", "SyncBatchNorm", "l1:sync=true"),
        Row("1", "SyncBatchNorm", "l1:sync=true", "process group dropped"),
    ]
    assert convert_norm(model, "l1:sync=false").rows[2].after == "l1"


def frozen_norms():
    from norm_matters.core.torchvision import torchvision

    layers = library_layers()
    return [torchvision.ops.FrozenBatchNorm2d(8, eps=0.5), layers.FrozenBatchNormAct2d(8, eps=0.5, act_layer=nn.SiLU)]


@pytest.mark.parametrize("index", [0, 1])
def test_frozen_batch_norm_stays_frozen(index):
    frozen = frozen_norms()[index]
    frozen.running_mean.normal_()
    frozen.running_var.uniform_(0.5, 2)
    frozen.weight.normal_()
    model = nn.Sequential(frozen)
    x = torch.randn(IMAGES)
    expected, keys = model(x), set(model.state_dict())
    assert convert_norm(model, "l1").rows == [Row("0", type(frozen).__name__, "l1:eps=0.5,frozen=all")]
    assert model.training
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert set(model.state_dict()) - keys == {"0.num_batches_tracked"}
    convert_norm(model, "l1:frozen=none")
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert (model(x) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("spec", ["l1:frozen=affine", "layer:frozen=affine", "frozen"])
def test_a_spec_that_freezes_stops_training_and_drops_gradients(spec):
    model = network()
    model(torch.randn(4, 3, 6, 6)).sum().backward()
    weight = model[1].weight
    convert_norm(model, spec, include="1")
    assert model[1].weight is weight
    assert not weight.requires_grad
    assert weight.grad is None
    assert model[3][1].weight.grad is not None


def test_timms_fused_activation_is_kept():
    layers = library_layers()
    model = nn.Sequential(
        layers.BatchNormAct2d(4, act_layer=nn.PReLU, drop_layer=nn.Dropout2d), layers.BatchNormAct2d(4, apply_act=False)
    )
    sync = layers.convert_sync_batchnorm(copy.deepcopy(model)).eval()
    keys = list(model.state_dict())
    model[0].drop.eval()
    x = torch.randn(4, 4, 3, 3)
    expected = model(x)
    report = convert_norm(model, "l2")
    assert report.rows == [Row("0", "BatchNormAct2d", "l2"), Row("1", "BatchNormAct2d", "l2")]
    torch.testing.assert_close(model(x), expected)
    assert isinstance(model[0].act, nn.PReLU)
    assert isinstance(model[0].drop, nn.Dropout2d)
    assert not model[0].drop.training
    assert set(model.state_dict()) == set(keys)
    convert_norm(model, "none")
    assert isinstance(model[0].act, nn.PReLU)
    expected = sync(x)
    assert [row.before for row in convert_norm(sync, "l2").rows] == ["SyncBatchNormAct"] * 2
    torch.testing.assert_close(sync(x), expected)


def test_timms_split_batch_norm_is_refused():
    model = library_layers().convert_splitbn_model(network())
    with pytest.raises(ValueError, match=r"layer '1' \(SplitBatchNorm2d\) has its own forward"):
        convert_norm(model, "l1")
    with pytest.raises(ValueError, match=r"include and exclude leave none of 1, 3\.1$"):
        convert_norm(model, "l1", exclude=["1", "3.1"])


@pytest.mark.parametrize("nested", [False, True])
def test_torchs_encoder_layer_does_not_pass_over_the_new_norm(nested):
    model: nn.Module = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    perturbed(model.norm1)
    perturbed(model.norm2)
    model = nn.TransformerEncoder(model, 1, enable_nested_tensor=True) if nested else nn.Sequential(model)
    report = convert_norm(model, "l1", kinds="layer")
    assert [row.note for row in report.rows] == ["torch's fused encoder layer switched off"] * 2
    x = torch.randn(TOKENS)
    mask = {"src_key_padding_mask": torch.arange(7).expand(4, 7) > 4} if nested else {}
    expected = model.train()(x, **mask)
    with torch.no_grad():
        y = model.eval()(x, **mask)
    assert y.shape == x.shape
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
