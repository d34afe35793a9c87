"""YAML 1.2 values as plain data, written and read back; everything else refused in one line."""

import math
import time

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from norm_matters.core.errors import UserError
from norm_matters.core.yaml import MAX_BYTES, read_yaml, write_yaml

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
TRICKY = st.text("0123456789eE+-._xo~nulinfatrsyTN: #'\"\n\t\x85\u2028", max_size=8)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT | TRICKY
PLAIN = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3))


@pytest.fixture(params=["CSafeLoader", "SafeLoader"])
def parser(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both of PyYAML's parsers: the one in C is not on every machine."""
    if not hasattr(yaml, request.param):
        pytest.skip("PyYAML was built without libyaml")
    monkeypatch.setattr("norm_matters.core.yaml._PARSER", getattr(yaml, request.param))


@settings(deadline=None, max_examples=200)
@given(PLAIN)
def test_what_is_written_reads_back_the_same(value: object) -> None:
    # By repr: 1, 1.0 and True are equal, and must not become one another.
    assert repr(read_yaml(write_yaml(value), "text")) == repr(value)


def test_repeated_objects_are_written_twice_and_tuples_as_lists() -> None:
    shared = {"a": 1}
    assert read_yaml(write_yaml({"x": shared, "y": (shared,)}), "text") == {"x": shared, "y": [shared]}


@pytest.mark.parametrize("value", [object(), {1: 2}, {"a": [b"bytes"]}, {1, 2}, 1j])
def test_only_plain_data_is_written(value: object) -> None:
    with pytest.raises(ValueError, match=r"no plain data|is no text"):
        write_yaml(value)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001),
        ("1E5", 1e5),
        ("-.5", -0.5),
        ("5.", 5.0),
        ("+12", 12),
        ("0123", 123),
        ("0o17", 15),
        ("0x1F", 31),
        (".inf", math.inf),
        ("-.INF", -math.inf),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("# nothing", None),
        ("no", "no"),
        ("on", "on"),
        ("Yes", "Yes"),
        ("y", "y"),
        ("1_000", "1_000"),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        ("0b101", "0b101"),
        ("1e", "1e"),
        ("inf", "inf"),
        ("nan", "nan"),
        ("'1'", "1"),
        ('"true"', "true"),
        ("topk:k=10", "topk:k=10"),
        ("<<", "<<"),
        ("=", "="),
        ("{a: 1, 'b': [x, 2]}", {"a": 1, "b": ["x", 2]}),
        ("---\na: |\n  two\n  lines\n...\n", {"a": "two\nlines\n"}),
    ],
)
@pytest.mark.usefixtures("parser")
def test_scalars_follow_the_core_schema(text: str, value: object) -> None:
    assert repr(read_yaml(text, "text")) == repr(value)


def test_nan() -> None:
    assert math.isnan(read_yaml(".nan", "text"))


@pytest.mark.parametrize(
    ("text", "line", "problem"),
    [
        ("a: 1\nb: 2\na: 3", 3, "key 'a' is given twice"),
        ("a:\n  b: 1\n  b: 1", 3, "key 'b' is given twice"),
        ("a: 1\n'a': 2", 2, "key 'a' is given twice"),
        ("a: [1, 2", 1, "broken YAML"),
        ("a: 1\n b: 2", 2, "broken YAML"),
        ("a: @x", 1, "broken YAML"),
        ("a: 1\n\tb: 2", 2, "broken YAML"),
        ("a: &x 1\nb: *x", 1, "anchors and aliases"),
        ("a: *x", 1, "anchors and aliases"),
        ("a: &x [1]", 1, "anchors and aliases"),
        ("a: !!python/object/apply:os.system ['true']", 1, "tags"),
        ("a: !!str 1", 1, "tags"),
        ("!own {a: 1}", 1, "tags"),
        ("a: 1\n---\nb: 1", 2, "second document"),
        ("1: a", 1, "no text"),
        ("null: a", 1, "no text"),
        ("[a]: b", 1, "no text"),
        ("a:\n  " + "9" * 5000, 2, "5000 digits"),
        ("a: 0x" + "f" * 4000, 1, "a whole number with 4002 digits"),
        ("a: 0o" + "7" * 5000, 1, "a whole number with 5002 digits"),
        ("[" * 21 + "]" * 21, 1, "too deep"),
        ("[" * 100_000, 1, "too deep"),
        ("\n".join("  " * i + "a:" for i in range(30)), 21, "too deep"),
    ],
)
@pytest.mark.usefixtures("parser")
def test_refused_with_file_and_line(text: str, line: int, problem: str) -> None:
    with pytest.raises(UserError, match=problem) as caught:
        read_yaml(text, "my.yaml")
    (message,) = caught.value.problems
    assert message.startswith(f"my.yaml, line {line}: ")
    assert "\n" not in message
    assert len(message) < 200


@pytest.mark.parametrize(
    ("text", "problem"), [("a" * (MAX_BYTES + 1), "larger"), ("a: \x01", "broken"), ("a: \ud800", "UTF-8")]
)
@pytest.mark.usefixtures("parser")
def test_refused_as_a_whole(text: str, problem: str) -> None:
    with pytest.raises(UserError, match=f"^my.yaml: .*{problem}"):
        read_yaml(text, "my.yaml")


def test_twenty_levels_are_taken() -> None:
    assert str(read_yaml("[" * 20 + "]" * 20, "text")) == "[" * 20 + "]" * 20


def test_a_bomb_of_aliases_costs_nothing() -> None:
    lines = ["a0: &a0 [x, x]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30)]
    start = time.perf_counter()
    with pytest.raises(UserError, match="anchors"):
        read_yaml("\n".join(lines), "bomb.yaml")
    assert time.perf_counter() - start < 1
