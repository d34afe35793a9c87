"""The cells of a grid: each a whole configuration, checked, with a name that depends on nothing but the configuration.

A name tells model, norm, dataset, epochs and seed, and between them what else differs from the defaults, so that a
run keeps its name when the grid grows: `resnet8-l1-digits-20ep-lr0.1-s0`.
"""

import copy
import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from norm_matters.core.config import OPTION_KEYS, RunConfig, flatten, load_config
from norm_matters.core.errors import UserError
from norm_matters.core.yaml import read_yaml, write_yaml
from norm_matters.experiments.grid import Grid, Settings
from norm_matters.record.folder import default_name

_TOLD = ("model.name", "model.norm", "data.name", "seed", "train.epochs", "output", "name")
_LONGEST = 60  # of what stands between a name's usual words
_SHORT = {key: option for option, key in OPTION_KEYS.items()}
_DEFAULTS = flatten(RunConfig())


Complete = Callable[[RunConfig], RunConfig]
"""Fills in what depends on dataset and model, as `run.complete` does."""


@dataclass(frozen=True)
class Cell:
    """One run of a sweep.

    Attributes:
        name: of its folder.
        config: everything, as the run will record it; `output` and `name` are left out.
        settings: dotted key -> value of the keys that are varied in the sweep.
    """

    name: str
    config: RunConfig
    settings: Settings

    @property
    def epochs(self) -> int:
        """How long it is."""
        assert self.config.train.epochs is not None, "complete configs only"
        return self.config.train.epochs

    @property
    def arm(self) -> Settings:
        """What it is an example of: the varied settings but for the seed."""
        return {key: value for key, value in self.settings.items() if key != "seed"}

    def overrides(self) -> list[str]:
        """The `KEY=VALUE`s that make this configuration from the defaults."""
        return [
            setting_text(key, value)
            for key, value in flatten(self.config).items()
            if value != _DEFAULTS[key] and key not in ("output", "name")
        ]


def make_cells(
    grid: Grid,
    *,
    complete: Complete,
    checks: Mapping[str, Callable[[Any], None]],
    free: Collection[str] = (),
) -> list[Cell]:
    """Turn a grid into cells; combinations that come to the same configuration are one cell.

    Args:
        complete: see `Complete`.
        checks: see `load_config`.
        free: keys that are no part of a name unless they are varied.

    Raises:
        UserError: with every mistake of every cell, each once.
    """
    problems: list[str] = []
    found = list(grid.combinations())
    configs: list[RunConfig] = []
    for settings in found:
        try:
            # Copied: an option of the model is set within the mapping of the others.
            configs.append(complete(load_config(options=copy.deepcopy(settings), checks=checks)))
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(*dict.fromkeys(problems))
    configs, problems = _without_excluded(configs, grid, complete)
    if problems:
        raise UserError(*problems)
    if not configs:
        raise UserError("grid: everything is excluded; no run is left")
    distinct = list({write_yaml(config.model_dump()): config for config in configs}.values())
    keys = dict.fromkeys(key for settings in found for key in settings)
    varied = [key for key in keys if len({repr(value_of(config, key)) for config in distinct}) > 1]
    names = _names(distinct, [key for key in free if key not in varied])
    return [
        Cell(name, config, {key: value_of(config, key) for key in varied})
        for name, config in zip(names, distinct, strict=True)
    ]


def value_of(config: RunConfig, key: str) -> Any:
    """The value of a dotted key, also of one option of the model."""
    if key.startswith("model.options."):
        return config.model.options.get(key.removeprefix("model.options."))
    return flatten(config)[key]


def short_key(key: str) -> str:
    """The name of a key for the eye: the common option's, else the last part where that is no other option's."""
    last = key.rpartition(".")[2]
    return _SHORT.get(key) or (key if last in OPTION_KEYS else last)


def show_value(value: Any) -> str:
    """A value as one would write it on the command line."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def label(settings: Settings) -> str:
    """What sets an arm apart: `l1`, or `norm l1, lr 0.1`."""
    if len(settings) == 1:
        key, value = next(iter(settings.items()))
        return value if isinstance(value, str) else f"{short_key(key)} {show_value(value)}"
    return ", ".join(f"{short_key(key)} {show_value(value)}" for key, value in settings.items()) or "all runs"


def setting_text(key: str, value: Any) -> str:
    """`KEY=VALUE` as the command line reads it back, in plain words where that is possible."""
    if isinstance(value, str):
        try:
            if read_yaml(value, key) == value:
                return f"{key}={value}"
        except UserError:
            pass
    return f"{key}={json.dumps(value, ensure_ascii=False)}"


def _without_excluded(
    configs: Sequence[RunConfig], grid: Grid, complete: Complete
) -> tuple[list[RunConfig], list[str]]:
    """The configurations that no entry of `exclude` meets, and what is wrong with these entries.

    Included ones come last, and stay: they were asked for one by one.
    """
    own = len(configs) - len(grid.include)
    excluded, problems = set[int](), []
    for entry in grid.exclude:
        try:
            # Read as settings are, so that `topk` and `topk:k=10` are the same norm.
            choices = {
                key: [value_of(complete(load_config(options={"train.epochs": 1, key: value})), key) for value in values]
                for key, values in entry.items()
            }
        except UserError as error:
            problems += [f"exclude: {problem}" for problem in error.problems]
            continue
        hits = {
            index
            for index, config in enumerate(configs[:own])
            if all(value_of(config, key) in values for key, values in choices.items())
        }
        if not hits and not grid.anew.intersection(entry):
            text = ", ".join(f"{key}: {values}" for key, values in entry.items())
            problems.append(f"exclude: no run has {text}")
        excluded |= hits
    return [config for index, config in enumerate(configs) if index not in excluded], problems


def _names(configs: Sequence[RunConfig], silent: Collection[str]) -> list[str]:
    """A name for each; names that would be the same get a short hash of the whole configuration."""
    readable = [_name(config, silent) for config in configs]
    count = Counter(readable)
    return [
        name if count[name] == 1 else _name(config, silent, hashed=True)
        for name, config in zip(readable, configs, strict=True)
    ]


def _name(config: RunConfig, silent: Collection[str], *, hashed: bool = False) -> str:
    model, data = config.model, config.data
    usual = default_name(_short(model.name), model.norm, _short(data.name), config.seed)
    words = usual.removesuffix(f"-s{config.seed}")
    further = {
        key: value
        for key, value in flatten(config).items()
        if value != _DEFAULTS[key] and key not in _TOLD and key not in silent
    }
    further |= {f"model.options.{key}": value for key, value in further.pop("model.options", {}).items()}
    told = "".join(f"-{_word(key, value)}" for key, value in further.items())
    if hashed or len(told) > _LONGEST:
        whole = {key: value for key, value in flatten(config).items() if key not in ("seed", "output", "name", *silent)}
        told = f"-{hashlib.sha256(write_yaml(whole).encode()).hexdigest()[:8]}"
    return f"{words[:60]}-{config.train.epochs}ep{told}-s{config.seed}"


def _word(key: str, value: Any) -> str:
    """`lr0.1`, `save_memory`, or `norm_kinds-batch-layer`, in the letters of a name."""
    if value is True:
        return short_key(key)
    text = show_value(value)
    between = "" if isinstance(value, int | float) and not isinstance(value, bool) else "-"
    word = re.sub(r"[^A-Za-z0-9._]+", "-", f"{short_key(key)}{between}{text}".replace("=", ""))
    return word.strip("-")


def _short(name: str) -> str:
    """What default_name takes: the source and the last part of a path."""
    source, colon, rest = name.partition(":")
    return f"{source}-{rest.rstrip('/').rpartition('/')[2]}" if colon else name
