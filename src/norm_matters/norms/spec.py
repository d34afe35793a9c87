"""The text that names a norm: `l2`, `topk:k=10`, `ghost:size=32,base=(topk:k=10)`.

Grammar: `NAME[:KEY=VALUE[,KEY=VALUE]...]`. A value in parentheses is taken as it stands, so that it can hold a spec
with colons and commas of its own. `timm:frn` gives a value without its key, to the option marked `positional`.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, Literal

from norm_matters.core.errors import UserError, nearest

# A spec of more characters, or nested deeper, is no name that somebody wrote: taking it apart would take its time.
LONGEST, DEEPEST = 10_000, 20

_FLAGS = {"true": True, "false": False}


@dataclass(frozen=True)
class ParsedSpec:
    """A spec taken apart, its values still text.

    Attributes:
        name: of the norm; not looked up yet.
        options: key -> text of the value, parentheses removed, in the order written; the key of a first value without
            one is empty.
    """

    name: str
    options: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Option:
    """What one option of a norm accepts.

    Attributes:
        kind: type of the value; "text" is any text that `canonical` takes.
        default: what holds when the option is not given.
        minimum: smallest number accepted; `above=True` excludes it.
        maximum: largest number accepted.
        words: texts accepted besides (or, with kind "word", instead of) a number; "none" stands for None.
        shown: the canonical text always names this option, also at its default.
        positional: the text gives this option without its key.
        required: there is no default; an error says what to write.
        canonical: brings a value to the form that equal values share; raises UserError for one that it does not know.
    """

    kind: Literal["int", "float", "bool", "word", "text"]
    default: Any
    minimum: float = -math.inf
    maximum: float = math.inf
    above: bool = False
    words: tuple[str, ...] = ()
    shown: bool = False
    positional: bool = False
    required: bool = False
    canonical: Callable[[Any], Any] | None = None

    def read(self, text: str) -> Any:
        """The value a text stands for; a text that stands for none is returned as it is, for `check` to refuse."""
        if text in self.words:
            return None if text == "none" else text
        if self.kind == "bool":
            return _FLAGS.get(text, text)
        try:
            return int(text) if self.kind == "int" else float(text) if self.kind == "float" else text
        except ValueError:
            return text

    def accepts(self, value: Any) -> bool:
        """Whether `value` (not its text) is valid."""
        if value in self.words or (value is None and "none" in self.words):
            return True
        if self.kind == "text":
            return isinstance(value, str)
        if self.kind in ("bool", "word"):
            return self.kind == "bool" and isinstance(value, bool)
        if isinstance(value, bool) or not isinstance(value, int if self.kind == "int" else (int, float)):
            return False
        inside = self.minimum < value if self.above else self.minimum <= value
        return inside and value <= self.maximum and math.isfinite(value)

    def describe(self) -> str:
        """What is valid, for messages: `an integer from 1`."""
        names = {"int": "an integer", "float": "a number", "bool": "true or false", "word": "", "text": "a text"}
        lower = "" if self.minimum == -math.inf else f" {'above' if self.above else 'from'} {self.minimum:g}"
        upper = "" if self.maximum == math.inf else f" to {self.maximum:g}"
        number = names[self.kind] + lower + upper
        return " or ".join(filter(None, (number, *self.words)))


def parse_spec(text: str) -> ParsedSpec:
    """Take a spec apart.

    Raises:
        UserError: the text does not follow the grammar, or names an option twice.
    """
    if len(text) > LONGEST or _depth(text) > DEEPEST:
        raise UserError(f"norm '{text[:60]}...' has more than {LONGEST:,} characters, or {DEEPEST} nested parentheses")
    name, colon, rest = text.strip().partition(":")
    if not re.fullmatch(r"[A-Za-z0-9_.-]+", name.strip()):
        raise UserError(f"norm '{text}' does not start with a name; write e.g. l1 or topk:k=10")
    options: dict[str, str] = {}
    for part in _split_outside_parentheses(rest, text) if colon else []:
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if key and not equals and not options:
            key, value = "", key
        elif not equals or not key or not value:
            raise UserError(f"norm '{text}': '{part.strip()}' is no KEY=VALUE; write e.g. topk:k=10")
        if key in options:
            raise UserError(f"norm '{text}' names the option '{key}' twice")
        enclosed = value.startswith("(") and value.endswith(")")
        options[key] = value[1:-1].strip() if enclosed else value
    return ParsedSpec(name.strip(), options)


def _depth(text: str) -> int:
    """How deep parentheses are nested."""
    steps = ({"(": 1, ")": -1}.get(character, 0) for character in text)
    return max(accumulate(steps), default=0)


def _split_outside_parentheses(text: str, whole: str) -> list[str]:
    """Split at the commas that no parenthesis encloses."""
    parts, depth = [""], 0
    for character in text:
        depth += {"(": 1, ")": -1}.get(character, 0)
        if depth < 0:
            break
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    if depth != 0:
        raise UserError(f"norm '{whole}': the parentheses do not match")
    return parts


def format_spec(name: str, options: Mapping[str, Any]) -> str:
    """The text of a name and options, such that `parse_spec` reads it back.

    Args:
        name: of the norm.
        options: key -> value (None, bool, number or text), printed in this order; an empty key is not printed.
    """
    pairs = ",".join(f"{key}={_format_value(value)}" if key else str(value) for key, value in options.items())
    return f"{name}:{pairs}" if pairs else name


def canonical_text(name: str, values: Mapping[str, Any], valid: Mapping[str, Option]) -> str:
    """The text of a norm without the options that are at their default, unless they are always shown.

    Args:
        name: of the norm.
        values: a value for every key of `valid`.
        valid: what the norm accepts; its order is the text's.
    """
    shown = {key: option for key, option in valid.items() if option.shown or values[key] != option.default}
    return format_spec(name, {"" if option.positional else key: values[key] for key, option in shown.items()})


def _format_value(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    text = str(value)
    return f"({text})" if any(character in text for character in ",:=()") else text


def complete_options(norm: str, options: Mapping[str, Any], valid: Mapping[str, Option]) -> dict[str, Any]:
    """Check options and add the defaults of those not given.

    Args:
        norm: name or text, for messages.
        options: key -> value.
        valid: what the norm accepts.

    Returns:
        A value for every key of `valid`, in its order and in its canonical form.

    Raises:
        UserError: with a line for every option that is unknown to the norm or has an invalid value.
    """
    problems = []
    values = {key: option.default for key, option in valid.items()}
    for key, value in options.items():
        if key not in valid:
            hint = nearest(key, valid) or (f"; it takes {', '.join(valid)}" if valid else "; it takes none")
            problems.append(f"norm '{norm}' has no option '{key}'{hint}")
        elif not valid[key].accepts(value):
            problems.append(f"norm '{norm}': {key}={_format_value(value)} must be {valid[key].describe()}")
        else:
            canonical = valid[key].canonical
            try:
                values[key] = canonical(value) if canonical and value is not None else value
            except UserError as error:
                problems += [f"norm '{norm}': {key}={_format_value(value)}: {problem}" for problem in error.problems]
    for key, option in valid.items():
        if option.required and key not in options:
            problems.append(f"norm '{norm}' needs its {key}; write {norm}:{'' if option.positional else key + '='}NAME")
    if problems:
        raise UserError(*problems)
    return values
