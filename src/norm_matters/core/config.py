"""The configuration of a run: a frozen tree, read from file < options < overrides, with all mistakes told at once."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from norm_matters.core.clock import parse_interval, parse_seconds
from norm_matters.core.errors import UserError, nearest
from norm_matters.core.names import PATTERN, RULE, is_plain_name
from norm_matters.core.yaml import MAX_BYTES, MAX_DEPTH, read_yaml, write_yaml

OPTION_KEYS: dict[str, str] = {
    "model": "model.name",
    "norm": "model.norm",
    "weight_norm": "model.weight_norm",
    "pretrained": "model.pretrained",
    "dataset": "data.name",
    "data_dir": "data.dir",
    "download": "data.download",
    "bad_images": "data.bad_images",
    "batch_size": "data.batch_size",
    "lr": "regime.lr",
    "epochs": "train.epochs",
    "precision": "train.precision",
    "nonfinite": "train.nonfinite",
    "compile": "train.compile",
    "save_memory": "train.save_memory",
    "checkpoint_every": "train.checkpoint_every",
    "keep": "train.keep",
    "max_time": "train.max_time",
    "seed": "seed",
    "device": "device",
    "output": "output",
    "name": "name",
}
"""Name of a common command-line option -> the dotted key it sets."""

MAX_PROBLEMS = 50
"""How many of a file's mistakes are told: one that is no configuration at all may have thousands."""


def _plain(value: Any) -> Any:
    """The value as config.yaml gives it back (tuples are lists there); ValueError for what it cannot hold."""
    try:
        value = read_yaml(write_yaml(value), "value", max_depth=MAX_DEPTH - 2)
    except UserError as error:
        raise ValueError(str(error)) from None
    if not _all_finite(value):
        raise ValueError("it holds a number that is not finite")
    return value


def _all_finite(value: Any) -> bool:
    if isinstance(value, float):
        return abs(value) < float("inf")
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return all(map(_all_finite, items))


def _interval(value: str) -> str:
    parse_interval(value)
    return value


def _time(value: str) -> str:
    parse_seconds(value)
    return value


def _run_name(value: str) -> str:
    if not is_plain_name(value):
        raise ValueError(f"it is no folder name on every system; use {RULE}, and no name of a device such as CON")
    return value


# Text that is not empty, no longer than a path may be, and has no NUL, which no path may hold.
_Text = Annotated[str, Field(pattern=r"^[^\x00]+$", max_length=4096)]
_Plain = AfterValidator(_plain)


class _Section(BaseModel):
    """What all parts share: frozen, no unknown keys, no conversion of types, finite numbers only.

    The description of a field says what it takes: it ends the message about a wrong value.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class ModelConfig(_Section):
    """Which network, with which norm."""

    name: _Text = Field(default="resnet8", description="the name of a model")
    norm: _Text | None = Field(default=None, description="a norm such as l1 or topk:k=10")
    norm_kinds: list[_Text] | None = Field(default=None, description="a list such as [batch, layer]")
    norm_precision: Literal["float32", "input"] = Field(default="float32", description="float32 or input")
    sync_norm: bool = Field(default=False, description="true or false")
    weight_norm: _Text | None = Field(default=None, description="a weight norm such as bounded or bounded:p=1")
    pretrained: bool | _Text = Field(default=False, description="true, false or a file")
    options: Annotated[dict[str, Any], _Plain] = Field(default={}, description="a mapping of numbers, text and lists")


class DataConfig(_Section):
    """Which images, and how they are fed."""

    name: _Text = Field(default="digits", description="the name of a dataset")
    dir: _Text | None = Field(default=None, description="a folder")
    download: bool = Field(default=False, description="true or false")
    input_size: int | None = Field(default=None, ge=8, le=4096, description="a whole number from 8 to 4096")
    holdout: float | None = Field(default=None, gt=0, lt=1, description="a number between 0 and 1")
    workers: Annotated[int, Field(ge=0)] | Literal["auto"] = Field(
        default="auto", description="auto or a whole number from 0"
    )
    batch_size: int = Field(default=128, ge=1, description="a whole number from 1")
    cutout: int = Field(default=0, ge=0, description="a whole number from 0")
    draft: bool = Field(default=True, description="true or false")
    # Whether links in a folder of images may lead out of it.
    links: bool = Field(default=False, description="true or false")
    # What happens when training meets an image that cannot be read; evaluation always fails.
    bad_images: Annotated[str, Field(pattern=r"^(fail|skip:[1-9][0-9]{0,8})$")] = Field(
        default="fail", description="fail, or skip:N with the number of images that may be skipped at most"
    )


class RegimeConfig(_Section):
    """How the optimizer's settings develop: a named regime, phases of one's own, or else the model's default."""

    name: _Text | None = Field(default=None, description="the name of a regime")
    phases: Annotated[list[dict[str, Any]], Field(min_length=1), _Plain] | None = Field(
        default=None, description="a list of phases, each a mapping"
    )
    lr: float | None = Field(default=None, gt=0, description="a number above 0")
    weight_decay: float | None = Field(default=None, ge=0, description="a number from 0")
    # How learning rates follow the batch size, and the batch size that they are written for.
    lr_rule: Literal["none", "linear", "sqrt"] = Field(default="none", description="none, linear or sqrt")
    lr_batch: int | None = Field(default=None, ge=1, description="a whole number from 1")
    # The run whose recorded norms `instead_of_decay` in a phase follows.
    norms: _Text | None = Field(default=None, description="a run folder with recorded norms")

    @model_validator(mode="after")
    def _rule_has_a_batch(self) -> "RegimeConfig":
        if (self.lr_rule == "none") != (self.lr_batch is None):
            raise ValueError(
                f"lr_rule {self.lr_rule} with lr_batch {_show(self.lr_batch)}: a rule, linear or sqrt, goes with the "
                "batch size that the learning rates are written for, such as lr_batch 256"
            )
        return self

    @model_validator(mode="after")
    def _phases_stand_alone(self) -> "RegimeConfig":
        given = {key: getattr(self, key) for key in ("name", "lr", "weight_decay") if getattr(self, key) is not None}
        if self.phases is not None and given:
            values = " and ".join(f"{key} {_show(value)}" for key, value in given.items())
            raise ValueError(f"phases are given together with {values}; put these settings in the phases")
        return self


class TrainConfig(_Section):
    """How long and how exactly to train."""

    epochs: int | None = Field(default=None, ge=1, description="a whole number from 1")
    precision: Literal["fp32", "bf16", "amp-bf16", "amp-fp16", "fp16"] = Field(
        default="fp32", description="fp32, bf16, amp-bf16, amp-fp16 or fp16"
    )
    clip_norm: float | None = Field(default=None, gt=0, description="a number above 0")
    accumulate: int = Field(default=1, ge=1, description="a whole number from 1")
    label_smoothing: float = Field(default=0.0, ge=0, lt=1, description="a number from 0, below 1")
    nonfinite: Literal["stop", "skip", "rollback"] = Field(default="stop", description="stop, skip or rollback")
    instruments: Literal["none", "default", "all"] = Field(default="default", description="none, default or all")
    record_norms: Literal["none", "epoch", "step"] = Field(default="none", description="none, epoch or step")
    compile: bool = Field(default=False, description="true or false")
    cuda_graphs: bool = Field(default=False, description="true or false")
    save_memory: bool = Field(default=False, description="true or false")
    # Of runs on many ranks: whether each keeps a part of the optimizer's state, and how long it waits for the others.
    shard_optimizer: bool = Field(default=False, description="true or false")
    rank_timeout: float = Field(default=600.0, gt=0, le=86400, description="seconds, above 0")
    # When a checkpoint is written, how many of the newest are kept (beside the best), and how long the process may run.
    checkpoint_every: Annotated[str, AfterValidator(_interval)] = Field(
        default="1ep", description="an interval such as 1ep, 500st or 5min"
    )
    keep: int = Field(default=2, ge=2, description="a whole number from 2")
    max_time: Annotated[str, AfterValidator(_time)] | None = Field(default=None, description="a time such as 55min")


class RunConfig(_Section):
    """Everything that a run is asked to do."""

    model: ModelConfig = Field(default=ModelConfig(), description="a mapping of settings")
    data: DataConfig = Field(default=DataConfig(), description="a mapping of settings")
    regime: RegimeConfig = Field(default=RegimeConfig(), description="a mapping of settings")
    train: TrainConfig = Field(default=TrainConfig(), description="a mapping of settings")
    seed: int = Field(default=0, ge=0, description="a whole number from 0")
    device: Annotated[str, Field(pattern=r"^(auto|cpu|mps|cuda(:[0-9]+)?)$")] = Field(
        default="auto", description="auto, cpu, cuda, cuda:N or mps"
    )
    deterministic: bool = Field(default=False, description="true or false")
    # On a CPU, whether malloc keeps the pages of what a step frees (see core.allocator).
    allocator: Literal["keep", "default"] = Field(default="keep", description="keep or default")
    kernels: Literal["auto", "reference"] = Field(default="auto", description="auto or reference")
    output: _Text = Field(default="runs", description="a folder")
    name: Annotated[str, Field(pattern=PATTERN), AfterValidator(_run_name)] | None = Field(
        default=None, description=f"a folder name: {RULE}"
    )


def load_config(
    file: Path | None = None,
    options: Mapping[str, Any] | None = None,
    overrides: Sequence[str] = (),
    checks: Mapping[str, Callable[[Any], None]] | None = None,
) -> RunConfig:
    """Read and check a configuration; later sources win: file < options < overrides.

    Args:
        file: YAML file with the tree of `RunConfig`, any part left out; `config.yaml` of a run is one.
        options: dotted key -> value.
        overrides: `KEY=VALUE` with a dotted key and a value in YAML 1.2; `model.options.NAME` sets one option.
        checks: dotted key -> function that raises UserError or ValueError for a value that it does not know.
            Called for the keys that are set, to other than null, and valid so far.

    Raises:
        UserError: with every problem found, each one line `key: value ...`.
    """
    problems: list[str] = []
    tree: dict[str, Any] = {}
    if file is not None:
        with _collecting(problems):
            tree = _read_tree(file)
    for key, value in (options or {}).items():
        with _collecting(problems):
            _set(tree, key, value)
    for text in overrides:
        with _collecting(problems):
            _set(tree, *_read_override(text))

    config, invalid = RunConfig(), dict[str, str]()
    try:
        config = RunConfig.model_validate(tree)
    except ValidationError as error:
        invalid = _explain(error)
    problems += invalid.values()
    defaults = flatten(RunConfig())
    for key, check in (checks or {}).items():
        value = _get(tree, key, default=defaults[key])
        if value is None or key in invalid or key.split(".")[0] in invalid:
            continue
        with _collecting(problems, key=key):
            check(value)
    if problems:
        raise UserError(*problems)
    return config


def dump_config(config: RunConfig) -> str:
    """The whole tree as YAML, defaults included; `load_config` reads it back equal."""
    return write_yaml(config.model_dump())


def flatten(config: RunConfig) -> dict[str, Any]:
    """Dotted key -> value, in the order of the tree; `model.options` and `regime.phases` are one value each."""
    flat: dict[str, Any] = {}
    for key, value in config:
        flat |= {f"{key}.{inner}": item for inner, item in value} if isinstance(value, _Section) else {key: value}
    return flat


def differences(a: RunConfig, b: RunConfig) -> list[str]:
    """The dotted keys whose values differ."""
    flat = flatten(b)
    return [key for key, value in flatten(a).items() if value != flat[key]]


def _read_text(file: Path) -> str:
    """The text of a configuration file; UserError where it cannot be read or is no UTF-8 text."""
    try:
        with file.open("rb") as stream:
            return stream.read(MAX_BYTES + 1).decode()
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None
    except ValueError:
        raise UserError(f"{file}: not valid UTF-8 text") from None


def _read_tree(file: Path) -> dict[str, Any]:
    """The mapping in a configuration file; an empty file, and a section left empty, mean the defaults."""
    tree = read_yaml(_read_text(file), str(file))
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UserError(f"{file}: holds {_show(tree)}; a configuration is a mapping such as 'model: {{norm: l1}}'")
    return {key: {} if value is None and key in _SECTIONS else value for key, value in tree.items()}


def _read_override(text: str) -> tuple[str, Any]:
    """Split `KEY=VALUE` and read its value."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UserError(f"{_show(text)}: no setting of the form KEY=VALUE{_suggest(text)}")
    # Below a section and a mapping there are two levels less to nest.
    return key, read_yaml(value, f"override {_show(text)}", max_depth=MAX_DEPTH - 2)


def _set(tree: dict[str, Any], key: str, value: Any) -> None:
    """Set a dotted key in the tree; UserError for a key that does not exist."""
    option_of_model = key.startswith("model.options.") and key.count(".") == 2 and not key.endswith(".")
    if key in _SECTIONS:
        keys = ", ".join(other for other in _FIELDS if other.startswith(f"{key}."))
        raise UserError(f"{key}: value {_show(value)} for a whole section; set one of {keys}")
    if key not in _FIELDS and not option_of_model:
        raise UserError(f"{_show_key(key)}: unknown key, given {_show(value)}{_suggest(key)}")
    *path, last = key.split(".")
    for part in path:
        if tree.get(part) is None:
            tree[part] = {}
        tree = tree[part]
        if not isinstance(tree, dict):
            return  # the file has something else in the section's place; validation tells
    tree[last] = value


def _get(tree: dict[str, Any], key: str, *, default: Any) -> Any:
    """The value of a dotted key, or the default where the tree has none."""
    node: Any = tree
    for part in key.split("."):
        if not isinstance(node, dict) or part not in node:
            return default
        node = node[part]
    return node


def _explain(error: ValidationError) -> dict[str, str]:
    """Wrong key -> line that says what is wrong with its value. The first problem of a key counts."""
    lines: dict[str, str] = {}
    for detail in error.errors(include_url=False)[:MAX_PROBLEMS]:
        path = [str(part) for part in detail["loc"]]
        dotted = [".".join(path[:length]) for length in range(1, len(path) + 1)]
        # Behind a field, pydantic goes on with the branch of a union, or with the place within a value.
        key = next((name for name in dotted if name in _FIELDS), dotted[-1] if dotted else "config")
        if key in lines:
            continue
        value = detail["input"]
        if detail["type"] == "extra_forbidden":
            lines[key] = f"{_show_key(key)}: unknown key, given {_show(value)}{_suggest(key)}"
        elif detail["type"] == "value_error":
            given = f"value {_show(value)}: " if key in _FIELDS else ""
            lines[key] = f"{key}: {given}{detail['ctx']['error']}"  # pyright: ignore[reportTypedDictNotRequiredAccess]
        else:
            lines[key] = f"{key}: value {_show(value)} is not valid; it takes {_valid(key, value)}"
    return lines


def _valid(key: str, value: Any) -> str:
    """What the key takes, with the nearest choice to the value, or the way to write the value as text."""
    field = _FIELDS.get(key) or RunConfig.model_fields[key]
    choices = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
    hint = nearest(value, choices) if isinstance(value, str) else ""
    kinds = {getattr(kind, "__origin__", kind) for kind in (field.annotation, *get_args(field.annotation))}
    if str in kinds and isinstance(value, (bool, int, float)):
        hint = f'; to give it as text, write "{_show(value)}" with its quotes'
    return f"{field.description}{hint}"


def _suggest(key: str) -> str:
    """A hint at the key that was probably meant."""
    if key in _FIELDS:  # the whole of 'model.norm' as one key of a file
        section, _, name = key.partition(".")
        return f"; in a file, write {section}: and below it {name}:"
    last = key.rpartition(".")[2].replace("-", "_")
    same = [OPTION_KEYS[last]] if last in OPTION_KEYS else [name for name in _FIELDS if name.split(".")[-1] == last]
    by_name = f"; did you mean '{same[0]}'?" if same else ""
    by_key = nearest(key, [*_FIELDS, *_SECTIONS])
    hint = by_key or by_name if "." in key else by_name or by_key
    return hint or f"; there are: {', '.join(RunConfig.model_fields)}"


def _show(value: Any) -> str:
    """A value as YAML would have it, on one line, shortened."""
    named = {None: "null", True: "true", False: "false"}
    text = named[value] if value is None or isinstance(value, bool) else repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _show_key(key: str) -> str:
    return key if key.isprintable() and len(key) <= 80 else _show(key)


@contextmanager
def _collecting(problems: list[str], key: str = "") -> Iterator[None]:
    """Turn the user's mistakes met inside into entries of `problems`; each begins with `key`, if it did not already."""
    try:
        yield
    except UserError as error:
        problems += [problem if problem.startswith(key) else f"{key}: {problem}" for problem in error.problems]
    except ValueError as error:
        problems.append(f"{key}: {error}" if key else str(error))


_SECTIONS = {key: value for key, value in RunConfig() if isinstance(value, _Section)}
_FIELDS = {
    f"{section}{name}": field
    for section, owner in [("", RunConfig), *((f"{key}.", type(value)) for key, value in _SECTIONS.items())]
    for name, field in owner.model_fields.items()
    if section or name not in _SECTIONS
}
