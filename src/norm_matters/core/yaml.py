"""YAML as plain data: the YAML 1.2 core schema, with everything refused that makes YAML surprising or dangerous.

Values are built from the parser's events, not by a loader: no tag can construct an object, nothing is a timestamp,
`no` and `on` are text, `1e-3` is a number and `0123` is 123. Anchors, aliases, tags, duplicate keys, keys that are not
text, several documents in one file, and files larger than 1 MiB or nested deeper than 20 levels are refused.
"""

import re
from collections.abc import Iterator
from typing import Any

import yaml

from norm_matters.core.errors import UserError

MAX_BYTES = 1 << 20
MAX_DEPTH = 20

_PARSER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_NULL = {"", "~", "null", "Null", "NULL"}
_BOOL = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_INT = re.compile(r"[-+]?[0-9]+")
_OCTAL = re.compile(r"0o[0-7]+")
_HEX = re.compile(r"0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_INFINITE = re.compile(r"[-+]?\.(inf|Inf|INF)")
_NAN = re.compile(r"\.(nan|NaN|NAN)")


def read_yaml(text: str, source: str, *, max_depth: int = MAX_DEPTH) -> Any:
    """Read one YAML document.

    Args:
        text: the document; an empty one is None.
        source: the file's name, for messages.
        max_depth: how deep lists and mappings may be nested.

    Returns:
        None, bool, int, float, str, or lists and dicts (keys are text) of these.

    Raises:
        UserError: one line with source, line and what is wrong.
    """
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise UserError(f"{source}: not valid UTF-8 text") from None
    if size > MAX_BYTES:
        raise UserError(f"{source}: larger than {MAX_BYTES} bytes")
    try:
        return _document(yaml.parse(text, Loader=_PARSER), source, max_depth)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = min(mark.line, text.count("\n")) + 1 if mark else 1  # the end of the text may be one line behind it
        raise UserError(f"{source}, line {line}: broken YAML: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{source}: broken YAML: {str(error).splitlines()[0]}") from None


def write_yaml(value: Any) -> str:
    """Return YAML text that `read_yaml` reads back as the same value, keys in their order.

    Raises:
        ValueError: for anything but None, bool, int, float, str, and lists, tuples and dicts (with text keys) of these.
    """
    check_plain(value)
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=2**30)


def check_plain(value: Any, where: str = "value") -> None:
    """Raise ValueError that names the place, unless `value` is data that YAML can hold."""
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise ValueError(f"{where}: key {key!r} is no text")
            check_plain(item, f"{where}.{key}")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            check_plain(item, f"{where}[{index}]")
    elif value is not None and not isinstance(value, (bool, int, float, str)):
        raise ValueError(f"{where}: {value!r} is no plain data (numbers, text, lists, mappings)")


def _document(events: Iterator[Any], source: str, max_depth: int) -> Any:
    """The value of the only document in the stream of events."""
    value, documents = None, 0
    for event in events:
        if isinstance(event, yaml.DocumentStartEvent):
            documents += 1
            if documents > 1:
                raise UserError(f"{_place(source, event.start_mark)}: a second document; one is taken")
            value = _value(next(events), events, source, max_depth)
    return value


def _value(event: Any, events: Iterator[Any], source: str, depth: int) -> Any:
    """The value that starts with `event`; takes the events up to its end."""
    place = _place(source, event.start_mark)
    if getattr(event, "anchor", None) is not None:
        raise UserError(f"{place}: anchors and aliases (&{event.anchor}, *{event.anchor}) are not taken")
    if getattr(event, "tag", None) is not None:
        raise UserError(f"{place}: tags ({event.tag}) are not taken; values are numbers, text, lists and mappings")
    if isinstance(event, yaml.ScalarEvent):
        return event.value if event.style else _scalar(event.value, place)
    if depth == 0:
        raise UserError(f"{place}: nested too deep")
    if isinstance(event, yaml.SequenceStartEvent):
        items = []
        while not isinstance(event := next(events), yaml.SequenceEndEvent):
            items.append(_value(event, events, source, depth - 1))
        return items
    mapping = {}
    while not isinstance(event := next(events), yaml.MappingEndEvent):
        place = _place(source, event.start_mark)
        key = _value(event, events, source, depth - 1)
        if not isinstance(key, str):
            raise UserError(f"{place}: key {key!r:.40} is no text; put it in quotes")
        if key in mapping:
            raise UserError(f"{place}: key {key!r:.80} is given twice")
        mapping[key] = _value(next(events), events, source, depth - 1)
    return mapping


def _scalar(text: str, place: str) -> Any:
    """The value of a scalar without quotes, by the YAML 1.2 core schema."""
    if text in _NULL:
        return None
    if text in _BOOL:
        return _BOOL[text]
    if _INFINITE.fullmatch(text):
        return float(text.replace(".", ""))
    if _NAN.fullmatch(text):
        return float("nan")
    try:
        if _INT.fullmatch(text):
            return int(text)
        if _OCTAL.fullmatch(text) or _HEX.fullmatch(text):
            number = int(text, 0)
            str(number)  # that could not be shown in any message
            return number
    except ValueError:  # Python refuses decimal numbers of more than 4,300 digits
        raise UserError(f"{place}: a whole number with {len(text)} digits") from None
    return float(text) if _FLOAT.fullmatch(text) else text


def _place(source: str, mark: Any) -> str:
    return f"{source}, line {mark.line + 1}"


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    """Text with line breaks or other control characters is written with escapes: PyYAML's folding loses some."""
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if text.isprintable() else '"')


class _Dumper(yaml.SafeDumper):
    """PyYAML's, with quotes around every text that YAML 1.2 (or 1.1, for other readers) takes for something else."""

    def ignore_aliases(self, data: Any) -> bool:
        """An object met twice is written twice: the reader takes no aliases."""
        return True


_Dumper.add_representer(tuple, _Dumper.represent_list)
_Dumper.add_representer(str, _represent_text)
# The tag only has to differ from text's and the number's own: the dumper then quotes such a text.
for _pattern in (_INT, _OCTAL, _HEX, _FLOAT):
    _Dumper.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(rf"(?:{_pattern.pattern})$"), list("-+.0123456789")
    )
