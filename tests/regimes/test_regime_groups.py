"""Parameters by kind: who belongs where, and that each belongs somewhere once."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from norm_matters.core.errors import UserError
from norm_matters.norms import create_norm
from norm_matters.regimes.groups import group_parameters


def network():
    return nn.Sequential(
        nn.Conv2d(1, 4, 3),
        create_norm("l1", 4),
        nn.Conv2d(4, 4, 3, bias=False),
        nn.BatchNorm2d(4),
        nn.Flatten(),
        nn.Linear(4, 3),
        create_norm("l2", 3),
    )


NETWORK = network()
NAMES = [name for name, _ in NETWORK.named_parameters()]


@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        ([], {"rest": NAMES}),
        (["bias"], {"bias": ["0.bias", "1.bias", "3.bias", "5.bias", "6.bias"]}),
        (["norm"], {"norm": ["1.weight", "1.bias", "3.weight", "3.bias", "6.weight", "6.bias"]}),
        (["last"], {"last": ["5.weight", "5.bias"]}),
        (
            ["bias", "norm", "last"],
            {
                "last": ["5.weight", "5.bias"],
                "norm": ["1.weight", "1.bias", "3.weight", "3.bias", "6.weight", "6.bias"],
                "bias": ["0.bias"],
            },
        ),
        (["norm", r"name:^1\.", "name:bias"], {"name:bias": ["0.bias", "3.bias", "5.bias", "6.bias"]}),
    ],
)
def test_who_belongs_where(kinds, expected):
    groups = group_parameters(NETWORK, NAMES, kinds)
    for kind, names in expected.items():
        assert groups[kind] == names
    assert next(iter(groups)) == "rest"


@given(
    kinds=st.lists(st.sampled_from(["norm", "bias", "last", "name:weight", "name:^0", r"name:\d"]), unique=True),
    names=st.sets(st.sampled_from(NAMES), min_size=1),
)
@settings(deadline=None, max_examples=60)
def test_each_parameter_is_in_exactly_one_group(kinds, names):
    ordered = [name for name in NAMES if name in names]
    patterns = [kind.removeprefix("name:") for kind in kinds if kind.startswith("name:")]
    if not all(any(re.search(pattern, name) for name in ordered) for pattern in patterns):
        with pytest.raises(UserError, match="fits no parameter"):
            group_parameters(NETWORK, ordered, kinds)
        return
    groups = group_parameters(NETWORK, ordered, kinds)
    assert sorted(name for group in groups.values() for name in group) == sorted(names)
    assert all(groups.values())


def test_a_network_without_norms_has_no_group_of_them():
    assert group_parameters(nn.Linear(2, 2), ["weight", "bias"], ["norm"]) == {"rest": ["weight", "bias"]}


def test_a_norm_is_never_the_last_layer():
    network = nn.Sequential(nn.Linear(4, 4), nn.Unflatten(1, (2, 2)), nn.LayerNorm((2, 2)))
    names = [name for name, _ in network.named_parameters()]
    assert group_parameters(network, names, ["last"])["last"] == ["0.weight", "0.bias"]


def test_a_norm_may_be_the_whole_network():
    assert group_parameters(create_norm("l2", 3), ["weight", "bias"], ["norm"]) == {"norm": ["weight", "bias"]}


def test_the_last_layer_of_a_parametrized_network_keeps_its_parts_together():
    network = nn.Sequential(nn.Linear(2, 2), nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)))
    names = [name for name, _ in network.named_parameters()]
    assert set(group_parameters(network, names, ["last"])["last"]) == {name for name in names if name.startswith("1.")}


def test_a_name_that_fits_nothing_is_refused():
    with pytest.raises(UserError, match="'name:layer9' fits no parameter"):
        group_parameters(NETWORK, NAMES, ["name:layer9"])
