"""A grid of settings, from a file, the command line or Python: what is the same in all runs, and what is varied."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from norm_matters.core.config import OPTION_KEYS, RunConfig, flatten
from norm_matters.core.errors import UserError, nearest
from norm_matters.core.yaml import MAX_BYTES, MAX_DEPTH, read_yaml

MAX_CELLS = 10_000
"""A grid with more is a mistake, most likely of a range."""

Settings = Mapping[str, Any]
"""Dotted key -> value."""

_PARTS = ("base", "grid", "exclude", "include")
_RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)")
_KEYS = frozenset(flatten(RunConfig()))
_SECTIONS = frozenset(key.partition(".")[0] for key in _KEYS if "." in key)
_OWN = ("output", "name")  # where a run lies is the sweep's affair
_PAIRS = {"(": ")", "[": "]", "{": "}"}


@dataclass(frozen=True)
class Grid:
    """What a sweep runs: the product of the axes upon the base, less `exclude`, plus `include`.

    Attributes:
        base: what all runs have.
        axes: name -> the points on this axis; each point sets one key, or several that go together.
        exclude: a combination that has all the values of one of these is left out; a value may be a list (any of them).
        include: combinations beside the product, upon the base.
        anew: keys that were set anew, so that `exclude` may name values of them that no run has.
    """

    base: Settings
    axes: Mapping[str, Sequence[Settings]]
    exclude: Sequence[Settings] = ()
    include: Sequence[Settings] = ()
    anew: frozenset[str] = frozenset()

    def combinations(self) -> Iterator[dict[str, Any]]:
        """The settings of every run, `exclude` not yet applied.

        Raises:
            UserError: there are more than `MAX_CELLS`, or two axes set the same key.
        """
        keys = [{key for point in points for key in point} for points in self.axes.values()]
        for index, (name, own) in enumerate(zip(self.axes, keys, strict=True)):
            for other, others in list(zip(self.axes, keys, strict=True))[:index]:
                if own & others:
                    raise UserError(f"grid: '{other}' and '{name}' both set {', '.join(sorted(own & others))}")
        has_product = bool(self.axes) or not self.include
        count = len(self.include) + has_product * math.prod(map(len, self.axes.values()))
        if count > MAX_CELLS:
            raise UserError(f"grid: {count:,} runs; a sweep takes {MAX_CELLS:,} at most")
        if has_product:
            for points in product(*self.axes.values()):
                yield {key: value for point in ({**self.base}, *points) for key, value in point.items()}
        for extra in self.include:
            yield {**self.base, **extra}

    def document(self) -> dict[str, Any]:
        """The grid as plain data, from which `parse_grid` makes it again."""
        plain = {
            name: [point[name] if set(point) == {name} else dict(point) for point in points]
            for name, points in self.axes.items()
        }
        parts = {
            "base": dict(self.base),
            "grid": plain,
            "exclude": [dict(each) for each in self.exclude],
            "include": [dict(each) for each in self.include],
        }
        return {name: part for name, part in parts.items() if part}


def read_grid(file: Path) -> Grid:
    """Read GRID.yaml: `base`, `grid`, `exclude` and `include`; the sweep.yaml of a sweep is one.

    Raises:
        UserError: with every mistake of its form; whether keys and values exist is found out with the configurations.
    """
    document = read_mapping(file)
    # A sweep.yaml has one, and its sweep may have set keys anew.
    recorded = document.pop("history", None) is not None
    grid = parse_grid(document, str(file))
    return replace(grid, anew=frozenset(key for entry in grid.exclude for key in entry)) if recorded else grid


def read_mapping(file: Path) -> dict[str, Any]:
    """The mapping in a YAML file; an empty file is an empty one.

    Raises:
        UserError: it cannot be read, or holds something else.
    """
    try:
        with file.open("rb") as stream:
            text = stream.read(MAX_BYTES + 1).decode()
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None
    except ValueError:
        raise UserError(f"{file}: not valid UTF-8 text") from None
    document = read_yaml(text, str(file), max_depth=MAX_DEPTH)
    if not isinstance(document, dict | None):
        raise UserError(f"{file}: holds {document!r:.60}; a grid is a mapping such as 'grid: {{norm: [l2, l1]}}'")
    return document or {}


def parse_grid(document: Mapping[str, Any], source: str = "grid") -> Grid:
    """Make a grid from plain data.

    Args:
        document: `base`: a tree of settings; `grid`: key -> list of values, or any name -> list of mappings whose
            keys go together; `exclude`, `include`: lists of mappings.
        source: what to call it in messages.

    Raises:
        UserError: with every mistake of its form.
    """
    problems = []
    if unknown := [part for part in document if part not in _PARTS]:
        problems += [f"{source}: unknown part '{part}'{nearest(part, _PARTS)}" for part in unknown]
        if not set(document) & set(_PARTS):
            problems.append(f"{source}: it has none of {', '.join(_PARTS)}; a configuration alone is for --config")
    parts: dict[str, Any] = {
        part: document.get(part) or kind for part, kind in zip(_PARTS, ({}, {}, [], []), strict=True)
    }
    for part, what in zip(_PARTS, ("mapping", "mapping", "list of mappings", "list of mappings"), strict=True):
        value = parts[part]
        fits = isinstance(value, dict) if what == "mapping" else _is_mappings(value)
        if not fits:
            problems.append(f"{source}: {part} holds {value!r:.60}; it takes a {what}")
            parts[part] = {} if what == "mapping" else []
    base = flat_settings(parts["base"])
    axes: dict[str, Sequence[Settings]] = {}
    for name, values in parts["grid"].items():
        key = full_key(name)
        listed = values if isinstance(values, list) else [values]
        known = key in _KEYS or key.startswith("model.options.")
        if not listed:
            problems.append(f"{source}: {name} has no values")
        elif _is_mappings(listed) and not known:
            axes[name] = [flat_settings(point) for point in listed]
        else:
            axes[key] = points(key, listed)
    include = [
        dict(pairs)
        for extra in parts["include"]
        for pairs in product(*([(key, value) for value in _listed(value)] for key, value in _flat(extra)))
    ]
    exclude = [{key: _listed(value) for key, value in _flat(each)} for each in parts["exclude"]]
    grid = Grid(base, axes, exclude, include)
    problems += _own_keys(grid)
    if problems:
        raise UserError(*problems)
    return grid


def override(grid: Grid, settings: Mapping[str, Sequence[Any]]) -> Grid:
    """The grid with some keys set anew, as the command line does.

    Args:
        settings: key -> values, for the included runs too; one value goes to the base and replaces an axis, several
            are an axis.
    """
    base, axes, include = dict(grid.base), dict(grid.axes), [dict(entry) for entry in grid.include]
    given = {full_key(name): values for name, values in settings.items()}
    for key, values in given.items():
        kept = {axis: [{k: v for k, v in point.items() if k != key} for point in axes[axis]] for axis in axes}
        axes = {axis: values for axis, values in kept.items() if any(values)}
        base.pop(key, None)
        others = [{k: v for k, v in entry.items() if k != key} for entry in include]
        include = list({repr(entry): entry for entry in others}.values())
        if len(values) == 1:
            base[key] = values[0]
            continue
        found = points(key, values)
        include = [{**entry, **point} for entry in include for point in found]
        if grid.axes or not include:
            axes[key] = found
    if grid.axes and include and not axes:
        # Without an axis there would be the included runs alone.
        key = next(iter(given))
        axes[key] = [{key: base[key]}]
    changed = replace(grid, base=base, axes=axes, include=include, anew=grid.anew.union(given))
    if problems := _own_keys(changed):
        raise UserError(*problems)
    return changed


def read_setting(text: str) -> tuple[str, list[Any]]:
    """Read `KEY=a,b,c` (see `read_values`)."""
    key, equals, values = text.partition("=")
    if not equals or not key:
        raise UserError(f"'{text}': no setting of the form KEY=VALUE,VALUE...")
    return full_key(key), read_values(values, key)


def read_values(text: str, key: str) -> list[Any]:
    """The values in a text: `l2,l1`, `0..2`, `[YAML, list]`.

    Commas in parentheses, brackets and quotes do not part values, nor do those between the options of a spec: a piece
    of the form `name=...` belongs to the spec before it.

    Raises:
        UserError: an empty value, or broken YAML.
    """
    if text.startswith("[") and text.endswith("]"):
        values = read_yaml(text, f"{key}={text}")
    else:
        pieces: list[str] = []
        for piece in _split(text):
            if pieces and re.match(r"\w+=", piece) and ":" in pieces[-1]:
                pieces[-1] += f",{piece}"
            else:
                pieces.append(piece)
        if "" in pieces:
            raise UserError(f"{key}: an empty value in '{text}'; write KEY=VALUE,VALUE")
        values = [
            piece if _RANGE.fullmatch(piece) else read_yaml(piece, f"{key}={text}", max_depth=MAX_DEPTH - 2)
            for piece in pieces
        ]
    if not values:
        raise UserError(f"{key}: an empty list; it takes one value at least")
    return [point[full_key(key)] for point in points(full_key(key), values)]


def points(key: str, values: Sequence[Any]) -> list[dict[str, Any]]:
    """The points of a key's axis, ranges written out, each value once.

    Raises:
        UserError: a range that is empty or longer than `MAX_CELLS`.
    """
    found: list[Any] = []
    for value in values:
        match = _RANGE.fullmatch(value) if isinstance(value, str) else None
        if not match:
            found.append(value)
            continue
        first, last = int(match[1]), int(match[2])
        if not 0 <= last - first < MAX_CELLS:
            raise UserError(f"{key}: the range {value} has no numbers, or more than {MAX_CELLS:,}")
        found += range(first, last + 1)
    # Compared as text as well: 1, 1.0 and true are equal in Python.
    return [{key: value} for value in {repr(value): value for value in found}.values()]


def full_key(name: str) -> str:
    """The dotted key of a common option (`norm`, `batch-size`); any other name as it is."""
    return OPTION_KEYS.get(name.replace("-", "_"), name)


def flat_settings(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted key -> value of a tree of settings; dotted keys and the names of common options are taken too."""
    return dict(_flat(tree))


def _flat(tree: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if key in _SECTIONS and (isinstance(value, dict) or value is None):
            yield from ((f"{key}.{name}", item) for name, item in (value or {}).items())
        else:
            yield full_key(key), value


def _listed(value: Any) -> list[Any]:
    return [point["key"] for point in points("key", value if isinstance(value, list) else [value])]


def _is_mappings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, dict) for item in value)


def _own_keys(grid: Grid) -> list[str]:
    """What is wrong with a grid that sets where its runs lie."""
    given = {*grid.base, *(key for points in grid.axes.values() for point in points for key in point)}
    given |= {key for extra in grid.include for key in extra}
    return [f"{key}: a sweep names its runs itself; choose their folder with --output" for key in _OWN if key in given]


def _split(text: str) -> list[str]:
    """The text's pieces between commas that no bracket and no quotes enclose."""
    pieces, closing, quote = [""], [], ""
    for char in text:
        if char == "," and not closing and not quote:
            pieces.append("")
            continue
        pieces[-1] += char
        if quote:
            quote = "" if char == quote else quote
        elif char in "'\"":
            quote = char
        elif char in _PAIRS:
            closing.append(_PAIRS[char])
        elif closing and char == closing[-1]:
            closing.pop()
    return [piece.strip() for piece in pieces]
