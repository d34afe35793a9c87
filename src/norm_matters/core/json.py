"""JSON as plain data, with everything refused that makes a file of a stranger's dangerous or ambiguous.

Refused are duplicate keys, texts larger than a limit or nested deeper than `MAX_DEPTH` levels, whole numbers of
thousands of digits and, unless they are asked for, NaN and infinities, which JSON does not know.
"""

import json
from typing import Any

MAX_BYTES = 2**26
MAX_DEPTH = 64


def parse_json(data: bytes | str, *, max_bytes: int = MAX_BYTES, nan: bool = False) -> Any:
    """Read one JSON document.

    Args:
        data: UTF-8, or text.
        max_bytes: of the longest text that is read.
        nan: whether NaN and infinities are taken, which Python writes.

    Returns:
        None, bool, int, float, str, or lists and dicts of these.

    Raises:
        ValueError: in one line, with what is wrong.
    """
    if len(data) > max_bytes:
        raise ValueError(f"more than {max_bytes:,} bytes")
    options: dict[str, Any] = {} if nan else {"parse_constant": _refuse_constant}
    try:
        value = json.loads(data, object_pairs_hook=_mapping, **options)
    except RecursionError:
        raise ValueError("nested too deep") from None
    except UnicodeDecodeError:
        raise ValueError("not valid UTF-8 text") from None
    _check_depth(value)
    return value


def _mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    mapping = dict(pairs)
    if len(mapping) < len(pairs):
        seen = set[str]()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"key {twice!r:.80} is given twice")
    return mapping


def _refuse_constant(text: str) -> Any:
    raise ValueError(f"{text} is no number")


def _check_depth(value: Any) -> None:
    """Level by level: whoever goes through the value later may do so by recursion."""
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        containers = [item for item in level if isinstance(item, (dict, list)) and item]
        if not containers:
            return
        level = [item for each in containers for item in (each.values() if isinstance(each, dict) else each)]
    raise ValueError(f"nested deeper than {MAX_DEPTH} levels")
