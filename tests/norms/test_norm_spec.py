"""The text of a norm: grammar, canonical form, mistakes; the factory and the questions about a network."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from norm_matters.core.errors import UserError
from norm_matters.norms import (
    NORMS,
    canonical_spec,
    check_spec,
    create_norm,
    has_spec,
    is_norm,
    name_norms,
    norm_factory,
    norms_of,
    spec_of,
)
from norm_matters.norms.spec import Option, format_spec, parse_spec

CANONICAL = {
    "l2": "l2",
    " l1 ": "l1",
    "topk": "topk:k=10",
    "topk:k=3": "topk:k=3",
    "topk: k = 3 , eps = 1e-3": "topk:k=3,eps=0.001",
    "topk:eps=1e-5": "topk:k=10",
    "lp": "lp:p=2",
    "lp:p=1.5": "lp:p=1.5",
    "linf:constant=paper": "linf:constant=paper",
    "l1:constant=0.3": "l1:constant=0.3",
    "l2:momentum=none": "l2:momentum=none",
    "l2:momentum=0.1": "l2",
    "l1:track_running_stats=false,affine=false": "l1:track_running_stats=false,affine=false",
    "mean:bias=false": "mean:bias=false",
    "mean:scale=true": "mean:scale=true",
    "group": "group:groups=8",
    "group:groups=4,eps=0.25": "group:groups=4,eps=0.25",
    "layer": "layer",
    "group:groups=4,statistic=topk:k=3": "group:groups=4,statistic=(topk:k=3)",
    "layer:statistic=l1": "layer:statistic=l1",
    "layer:statistic=(topk)": "layer:statistic=(topk:k=10)",
    "position:channel_dim=-1": "position:channel_dim=-1",
    "rms": "rms",
    "range": "range",
    "ghost": "ghost:size=32,base=l2",
    "ghost:base=topk": "ghost:size=32,base=(topk:k=10)",
    "ghost:base=(topk: k = 3),size=4,eps=1e-3": "ghost:size=4,base=(topk:k=3),eps=0.001",
    "smooth": "smooth:base=(topk:k=10),beta=0.75",
    "smooth:base=lp:p=3": "smooth:base=(lp:p=3),beta=0.75",
    "renorm:r_max=3": "renorm:base=l2",
    "renorm:base=(l1:constant=paper),d_max=0.5": "renorm:base=(l1:constant=paper),d_max=0.5",
    "noisy:like=(topk)": "noisy:base=l2,like=(topk:k=10)",
    "frozen": "frozen",
    "frozen:frozen=none": "frozen:frozen=none",
    "timm:frn": "timm:frn",
    "timm:layer=GroupNorm_1,eps=0.25": "timm:groupnorm1,eps=0.25",
    "timm: evonorm_s0 , act=true, groups=4": "timm:evonorms0,groups=4,act=true",
    "l1:sync=true,frozen=stats": "l1:sync=true,frozen=stats",
    "instance:stats_dtype=input": "instance:stats_dtype=input",
    "none": "none",
    "lp:p=(3)": "lp:p=3",
}

WRONG = {
    "l3": "unknown norm 'l3'",
    "topkk": "did you mean 'topk'",
    "batch": "there are: l2, l1",
    "": "does not start with a name",
    ":k=3": "does not start with a name",
    "topk:": "is no KEY=VALUE",
    "topk:k": "'k' is no KEY=VALUE",
    "topk:k=": "is no KEY=VALUE",
    "topk:=3": "is no KEY=VALUE",
    "topk:k=3,,": "is no KEY=VALUE",
    "topk:k=3,k=4": "names the option 'k' twice",
    "topk:kk=3": "has no option 'kk'; did you mean 'k'?",
    "topk:k=0": "k=0 must be an integer from 1",
    "topk:k=2.5": "k=2.5 must be an integer",
    "topk:k=ten": "k=ten must be an integer",
    "lp:p=0.5": "p=0.5 must be a number from 1 to 100",
    "lp:p=nan": "p=nan must be a number",
    "lp:p=inf": "p=inf must be a number",
    "l1:momentum=2": "momentum=2 must be a number from 0 to 1 or none",
    "l1:eps=-1": "eps=-1 must be a number from 0",
    "l1:eps=none": "eps=none must be",
    "l1:affine=yes": "affine=yes must be true or false",
    "l1:constant=papr": "constant=papr must be a number above 0 or calibrated or paper",
    "l1:constant=0": "constant=0 must be a number above 0",
    "l1:stats_dtype=float16": "stats_dtype=float16 must be float32 or input",
    "none:eps=1": "has no option 'eps'; it takes none",
    "group:statistics=l1": "has no option 'statistics'; did you mean 'statistic'?",
    "group:statistic=l3": "statistic=l3: unknown norm 'l3'",
    "group:statistic=layer": "'layer' is no statistic; take a batch norm such as l1",
    "group:statistic=(l1:momentum=0.2)": "momentum cannot be given here but to the norm around it",
    "layer:statistic=topk:kk=3": "has no option 'kk'; did you mean 'k'?",
    "mean:eps=0.1": "has no option 'eps'",
    "ghost:size=0": "size=0 must be an integer from 1",
    "ghost:base=(renorm)": "base=renorm: 'renorm' is no statistic; take a batch norm such as l1",
    "smooth:base=(ghost:size=4,base=(l1))": "base=(ghost:size=4,base=(l1)): 'ghost:size=4,base=(l1)' is no statistic",
    "renorm:base=frozen": "'frozen' is no statistic",
    "noisy:like=mixed": "like=mixed: unknown norm 'mixed'",
    "group:statistic=smooth": "'smooth' is no statistic",
    "ghost:base=(l1:eps=1)": "eps cannot be given here but to the norm around it",
    "smooth:beta=1.5": "beta=1.5 must be a number from 0 to 1",
    "renorm:r_max=0.5": "r_max=0.5 must be a number from 1",
    "timm": "norm 'timm' needs its layer; write timm:NAME",
    "timm:evonorm": "timm has no norm 'evonorm'; did you mean 'evonorm",
    "timm:frn,momentum=0.1": "has no option 'momentum'",
    "l1:frn": "'frn' is no KEY=VALUE",
    "topk:(k=3": "parentheses do not match",
    "topk:k=3)": "parentheses do not match",
}


@pytest.mark.parametrize(("text", "canonical"), CANONICAL.items())
def test_canonical_spec(text, canonical):
    assert canonical_spec(text) == canonical
    assert canonical_spec(canonical) == canonical
    norm = create_norm(text, 8)
    assert spec_of(norm) == canonical
    assert canonical in str(norm)
    assert norm_factory(text).spec == canonical
    check_spec(text)


@pytest.mark.parametrize(("text", "problem"), WRONG.items())
def test_wrong_spec(text, problem):
    for refuse in (check_spec, canonical_spec, norm_factory, lambda text: create_norm(text, 8)):
        with pytest.raises(UserError) as caught:
            refuse(text)
        assert problem in str(caught.value)
        assert "\n" not in str(caught.value)


def test_all_problems_at_once():
    with pytest.raises(UserError) as caught:
        check_spec("topk:k=0,epz=1")
    assert len(caught.value.problems) == 2


words = st.from_regex(r"[A-Za-z0-9_.-]{1,8}", fullmatch=True)
values = st.recursive(words, lambda inner: st.builds(lambda a, b: f"{a}:{b}=({a}:k=1,{b}=2)", inner, words))


@settings(deadline=None, max_examples=50)
@given(name=words, options=st.dictionaries(words, values, max_size=4))
def test_text_reads_back(name, options):
    parsed = parse_spec(format_spec(name, options))
    assert (parsed.name, parsed.options) == (name, options)


def test_nested_spec_keeps_its_inner_text():
    parsed = parse_spec("ghost:size=32,base=(topk:k=10,eps=1e-3)")
    assert parsed.options == {"size": "32", "base": "topk:k=10,eps=1e-3"}
    deeper = "ghost:base=(ghost:size=2,base=(l1:eps=1))"
    assert format_spec(**vars(parse_spec(deeper))) == deeper


statistics = st.one_of(
    st.sampled_from(["l2", "l1", "linf", "mean", "rms", "range"]),
    st.builds("topk:k={}".format, st.integers(1, 99)),
    st.builds("lp:p={}".format, st.floats(1, 100)),
    st.builds("l1:constant={}".format, st.floats(1e-3, 1e3)),
)
nested = st.one_of(
    st.builds("ghost:size={},base=({})".format, st.integers(1, 99), statistics),
    st.builds("smooth:base=({}),beta={}".format, statistics, st.floats(0, 1)),
    st.builds("renorm:base=({}),r_max={},d_max={}".format, statistics, st.floats(1, 9), st.floats(0, 9)),
    st.builds("noisy:base=({}),like=({})".format, statistics, statistics),
    st.builds("group:groups={},statistic=({})".format, st.sampled_from([1, 2, 4, 8]), statistics),
)


@settings(deadline=None, max_examples=50)
@given(spec=nested, eps=st.floats(0, 1))
def test_a_nested_spec_reads_back(spec, eps):
    norm = create_norm(f"{spec},eps={eps}", 8)
    twin = create_norm(norm.spec, 8)
    assert (twin.spec, twin.settings()) == (norm.spec, norm.settings())
    assert norm.eps == eps


@settings(deadline=None, max_examples=50)
@given(
    name=st.sampled_from([name for name in NORMS.names() if name != "timm"]),
    eps=st.floats(0, 1e3),
    momentum=st.none() | st.floats(0, 1),
    flag=st.booleans(),
)
def test_a_norms_text_builds_an_equal_norm(name, eps, momentum, flag):
    norm = norm_factory(name, eps=eps, momentum=momentum, bias=flag, stats_dtype="input")(8) if name != "mean" else None
    norm = norm or norm_factory(name, momentum=momentum, bias=flag)(8)
    twin = create_norm(norm.spec, 8)
    assert type(twin) is type(norm)
    assert twin.settings() == norm.settings()


def test_options_are_defaults_for_what_the_spec_does_not_say():
    assert norm_factory("l1", eps=0.5, stats_dtype="input").spec == "l1:eps=0.5,stats_dtype=input"
    assert norm_factory("l1:eps=0.25", eps=0.5)(4).eps == 0.25
    assert norm_factory(None).spec == "l2"
    # Options of batch norms that another norm has no use for fall away; options nobody shares do not.
    assert norm_factory("none", momentum=0.3, stats_dtype="input").spec == "none"
    assert norm_factory("layer", momentum=0.3).spec == "layer"
    for wrong in ({"k": 3}, {"epz": 1}, {"eps": -1}, {"affine": 1}, {"eps": True}, {"momentum": "0.1"}):
        with pytest.raises(UserError):
            norm_factory("l1", **wrong)
    with pytest.raises(UserError, match="has no option"):
        NORMS.get("l1")(8, k=3)


def test_groups_must_divide_the_channels():
    with pytest.raises(UserError, match="12 channels do not divide into 8 groups"):
        create_norm("group", 12)


@pytest.mark.parametrize("channels", [0, -1, 2.0, True, "8"])
def test_number_of_channels(channels):
    with pytest.raises(ValueError, match="num_features"):
        create_norm("l1", channels)


def test_factory_places_parameters():
    norm = norm_factory("l1", dtype=torch.float64, device="meta")(4)
    assert norm.weight.dtype == norm.running_var.dtype == torch.float64
    assert norm.weight.device.type == norm.num_batches_tracked.device.type == "meta"
    assert norm_factory("none", dtype=torch.float64)(4).num_features == 4


def test_every_norm_has_a_summary_and_a_name():
    for name in NORMS.names():
        assert NORMS.summary(name)
        assert NORMS.get(name).name == name
        assert is_norm(create_norm("timm:frn" if name == "timm" else name, 8))


def test_questions_about_a_network():
    model = torch.nn.Sequential(
        create_norm("l1", 4), torch.nn.Sequential(torch.nn.BatchNorm1d(4), torch.nn.ReLU()), create_norm("none", 4)
    )
    assert [name for name, _ in norms_of(model)] == ["0", "1.0", "2"]
    assert [spec_of(module) for _, module in norms_of(model)] == ["l1", None, "none"]
    model[0].eps = 0.25
    assert spec_of(model[0]) == "l1:eps=0.25"
    assert has_spec(model[0], "l1")
    assert not has_spec(model[0], "l1:eps=0.5")
    assert not has_spec(model[0], "l2")
    assert not has_spec(model[1][0], "l2")
    assert has_spec(create_norm("topk:k=5", 4), "topk:k=5")
    assert not has_spec(create_norm("topk:k=5", 4), "topk:k=6")
    name_norms(model)
    assert model[0].layer_name == "0"


@pytest.mark.parametrize(
    "norm",
    [
        torch.nn.BatchNorm2d(4),
        torch.nn.SyncBatchNorm(4),
        torch.nn.InstanceNorm1d(4),
        torch.nn.GroupNorm(2, 4),
        torch.nn.LayerNorm(4),
        torch.nn.RMSNorm(4),
        torch.nn.LazyBatchNorm2d(),
    ],
    ids=lambda norm: type(norm).__name__,
)
def test_is_norm_knows_torchs(norm):
    assert is_norm(norm)


def test_is_norm_knows_libraries_and_nothing_else():
    from norm_matters.core.torchvision import torchvision

    assert is_norm(torchvision.ops.FrozenBatchNorm2d(4))
    layers = pytest.importorskip("timm.layers")
    assert is_norm(layers.BatchNormAct2d(4))
    assert is_norm(layers.GroupNormAct(4, 2))
    assert is_norm(layers.LayerNorm2d(4))
    assert is_norm(layers.RmsNorm(4))
    assert not any(is_norm(module) for module in (torch.nn.Conv2d(1, 1, 1), torch.nn.ReLU(), torch.nn.Sequential()))


@pytest.mark.parametrize(
    ("option", "good", "bad"),
    [
        (Option("int", 1, minimum=1, maximum=9), [1, 9], [0, 10, 1.0, True, "1", None]),
        (Option("float", 1.0, minimum=0, above=True), [1, 0.5], [0, float("nan"), float("inf"), False, "x"]),
        (Option("bool", True), [True, False], [1, 0, None, "true"]),
        (Option("word", "a", words=("a", "b")), ["a", "b"], ["c", None, 1]),
        (Option("float", None, words=("none",)), [None, 3], ["nil"]),
    ],
)
def test_option_accepts(option, good, bad):
    assert all(option.accepts(value) for value in good)
    assert not any(option.accepts(value) for value in bad)
