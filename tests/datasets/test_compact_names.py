import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from norm_matters.datasets.names import Names

names = st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=9), max_size=12)


@given(names=names, data=st.data())
def test_names_behave_like_a_list(names, data):
    compact = Names.of(names)
    assert list(compact) == names
    assert len(compact) == len(names)
    for index in range(-len(names), len(names)):
        assert compact[index] == names[index]
    part = data.draw(st.slices(len(names)))
    assert list(compact[part]) == names[part]
    indices = data.draw(st.lists(st.integers(0, len(names) - 1), max_size=9)) if names else []
    taken = compact.take(np.array(indices, dtype=np.int64))
    assert list(taken) == [names[index] for index in indices]
    # What was cut out can be cut again.
    assert list(taken[1:]) == [names[index] for index in indices][1:]


@pytest.mark.parametrize("names", [[], ["a", "b"]])
def test_a_slice_of_any_step(names):
    assert list(Names.of(names)[:: 2**63]) == names[:: 2**63]


@given(parts=st.lists(names, max_size=4))
def test_joined_names_follow_each_other(parts):
    assert list(Names.joined([Names.of(part) for part in parts])) == [name for part in parts for name in part]


def test_names_that_are_no_text_survive():
    name = b"caf\xe9.jpg".decode(errors="surrogateescape")
    assert Names.of([name, "a"])[0] == name
