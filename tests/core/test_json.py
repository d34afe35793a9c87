"""JSON of strangers: plain data, or a ValueError in one line."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from norm_matters.core.json import MAX_DEPTH, parse_json

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**20), 10**20)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=20,
)


@given(VALUES)
def test_what_json_writes_is_read_back(value) -> None:
    assert parse_json(json.dumps(value)) == value
    assert parse_json(json.dumps(value).encode()) == value


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"a": 1, "a": 2}', "'a' is given twice"),
        ('[{"x": {"b": 1, "c": 2, "b": 1}}]', "'b' is given twice"),
        ("NaN", "NaN is no number"),
        ("[-Infinity]", "-Infinity is no number"),
        ("[" * 100 + "]" * 100, "nested deeper"),
        ('{"a":' * 100 + "1" + "}" * 100, "nested deeper"),
        ("[" * 10**5 + "]" * 10**5, "nested too deep"),
        ("9" * 5000, "digits"),
        ('"' + "x" * 200, "Unterminated"),
        ("", "Expecting value"),
        (b"\xff\xfe\xfa", "UTF-8|utf"),
        ("[1] 2", "Extra data"),
    ],
)
def test_refused(text: str | bytes, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        parse_json(text)
    assert "\n" not in str(caught.value)


def test_limits() -> None:
    assert parse_json("[" * MAX_DEPTH + "]" * MAX_DEPTH) is not None
    with pytest.raises(ValueError, match="more than 10 bytes"):
        parse_json("[1, 2, 3, 4]", max_bytes=10)
    assert math.isnan(parse_json("NaN", nan=True))
