"""The configuration: what wins, what reads back, and that every mistake is told at once."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from norm_matters.core.config import OPTION_KEYS, RunConfig, differences, dump_config, flatten, load_config
from norm_matters.core.errors import UserError
from norm_matters.core.names import is_plain_name

TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=12)
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=5,
)
SETTINGS = st.fixed_dictionaries(
    {},
    optional={
        "model.name": TEXT,
        "model.norm": TEXT | st.none(),
        "model.pretrained": TEXT | st.booleans(),
        "model.options": st.dictionaries(TEXT, PLAIN, max_size=3),
        "data.holdout": st.floats(0.001, 0.999) | st.none(),
        "data.workers": st.integers(0, 10),
        "regime.phases": st.lists(st.dictionaries(TEXT, PLAIN, max_size=3), min_size=1, max_size=3),
        "train.label_smoothing": st.floats(0, 0.999),
        "train.clip_norm": st.integers(1, 5) | st.floats(1e-30, 1e30),
        "seed": st.integers(0, 2**70),
        "deterministic": st.booleans(),
        "output": TEXT,
        "name": st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,20}", fullmatch=True).filter(is_plain_name),
    },
)


def problems(**sources: Any) -> tuple[str, ...]:
    with pytest.raises(UserError) as caught:
        load_config(**sources)
    assert caught.value.exit_status == 2
    assert all("\n" not in problem for problem in caught.value.problems)
    return caught.value.problems


def write(folder: Path, text: str) -> Path:
    file = folder / "config.yaml"
    file.write_text(text, encoding="utf-8")
    return file


def test_nothing_given_means_the_defaults() -> None:
    config = load_config()
    assert config == RunConfig()
    assert (config.model.name, config.data.name, config.data.batch_size) == ("resnet8", "digits", 128)


@settings(deadline=None, max_examples=60)
@given(SETTINGS)
def test_a_dumped_config_reads_back_equal(tmp_path_factory: pytest.TempPathFactory, given: dict[str, Any]) -> None:
    config = load_config(options=given)
    for key, value in given.items():
        assert flatten(config)[key] == value
    assert load_config(write(tmp_path_factory.getbasetemp(), dump_config(config))) == config


def test_the_dump_is_complete() -> None:
    text = dump_config(RunConfig())
    for key in flatten(RunConfig()):
        assert f"{key.split('.')[-1]}:" in text


def test_file_below_options_below_overrides(tmp_path: Path) -> None:
    file = write(tmp_path, "seed: 1\nmodel: {norm: l2, options: {a: 1, b: 1}}\ndata: {workers: 1}\ntrain:\n")
    config = load_config(
        file, {"seed": 2, "model.norm": "linf"}, ["model.norm=topk:k=10", "model.options.b=2", "train.clip_norm=1e-3"]
    )
    assert (config.seed, config.model.norm, config.data.workers) == (2, "topk:k=10", 1)
    assert config.model.options == {"a": 1, "b": 2}
    assert config.train.clip_norm == 0.001


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("regime.lr=1e-3", "regime.lr", 0.001),
        ("regime.lr=1", "regime.lr", 1.0),
        ("model.name=no", "model.name", "no"),
        ("model.norm=", "model.norm", None),
        ("model.norm=none", "model.norm", "none"),
        ("model.norm=ghost:size=32,base=(topk:k=10)", "model.norm", "ghost:size=32,base=(topk:k=10)"),
        ("model.pretrained=true", "model.pretrained", True),
        ("model.pretrained=a/b.safetensors", "model.pretrained", "a/b.safetensors"),
        ("model.options={stem: small, width: 2}", "model.options", {"stem": "small", "width": 2}),
        ("regime.phases=[{epoch: 0, lr: 1e-1}]", "regime.phases", [{"epoch": 0, "lr": 0.1}]),
        ("name='2024'", "name", "2024"),
        ("device=cuda:3", "device", "cuda:3"),
    ],
)
def test_overrides_are_yaml(override: str, key: str, value: object) -> None:
    assert repr(flatten(load_config(overrides=[override]))[key]) == repr(value)


def test_every_option_names_a_key() -> None:
    assert set(OPTION_KEYS.values()) <= set(flatten(RunConfig()))


def test_differences_are_dotted_keys() -> None:
    other = load_config(overrides=["model.norm=l1", "seed=3", "model.options.a=1"])
    assert differences(RunConfig(), other) == ["model.norm", "model.options", "seed"]
    assert differences(other, other) == []


def test_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        RunConfig().seed = 1  # type: ignore[misc]
    with pytest.raises(ValueError, match="frozen"):
        RunConfig().model.norm = "l1"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.nrom=l1", ["model.nrom: unknown key", "'l1'", "did you mean 'model.norm'?"]),
        ("modle.name=x", ["modle.name: unknown key", "did you mean 'model.name'?"]),
        ("batch_size=1", ["batch_size: unknown key", "did you mean 'data.batch_size'?"]),
        ("lr=1", ["lr: unknown key", "did you mean 'regime.lr'?"]),
        ("dataset=digits", ["dataset: unknown key", "did you mean 'data.name'?"]),
        ("zzz=1", ["zzz: unknown key", "there are: model, data, regime, train"]),
        ("model.options.a.b=1", ["model.options.a.b: unknown key", "'model.options'"]),
        ("model=3", ["model: value 3", "model.norm"]),
        ("epochs", ["'epochs'", "KEY=VALUE", "did you mean 'train.epochs'?"]),
        ("=1", ["'=1'", "KEY=VALUE"]),
        ("seed=[1", ["override 'seed=[1'", "broken YAML"]),
        ("seed=\udcff", ["UTF-8"]),
        ("seed=-1", ["seed: value -1", "a whole number from 0"]),
        ("seed=1.5", ["seed: value 1.5", "a whole number from 0"]),
        ("seed=true", ["seed: value true", "a whole number from 0"]),
        ("seed=", ["seed: value null", "a whole number from 0"]),
        ("data.batch_size=0", ["data.batch_size: value 0", "a whole number from 1"]),
        ("data.batch_size=many", ["data.batch_size: value 'many'", "a whole number from 1"]),
        ("data.input_size=7", ["data.input_size: value 7", "from 8 to 4096"]),
        ("data.input_size=4097", ["data.input_size: value 4097", "from 8 to 4096"]),
        ("data.holdout=0", ["data.holdout: value 0", "between 0 and 1"]),
        ("data.holdout=1", ["data.holdout: value 1", "between 0 and 1"]),
        ("data.workers=-1", ["data.workers: value -1", "from 0"]),
        ("data.download=yes", ["data.download: value 'yes'", "true or false"]),
        ("data.download=1", ["data.download: value 1", "true or false"]),
        ("regime.lr=0", ["regime.lr: value 0", "above 0"]),
        ("regime.lr=.nan", ["regime.lr: value nan", "above 0"]),
        ("regime.lr=.inf", ["regime.lr: value inf", "above 0"]),
        ("regime.weight_decay=-1", ["regime.weight_decay: value -1", "from 0"]),
        ("regime.phases=[]", ["regime.phases: value []", "a list of phases"]),
        ("regime.phases=[3]", ["regime.phases: value 3", "each a mapping"]),
        ("regime.phases=[{lr: .inf}]", ["regime.phases: value [{'lr': inf}]", "not finite"]),
        ("train.epochs=0", ["train.epochs: value 0", "from 1"]),
        ("train.clip_norm=0", ["train.clip_norm: value 0", "above 0"]),
        ("train.accumulate=0", ["train.accumulate: value 0", "from 1"]),
        ("train.label_smoothing=1", ["train.label_smoothing: value 1", "below 1"]),
        ("train.precision=fp8", ["train.precision: value 'fp8'", "fp32, bf16, amp-bf16", "did you mean 'fp"]),
        ("model.norm_precision=flaot32", ["'flaot32'", "did you mean 'float32'?"]),
        ("model.options=3", ["model.options: value 3", "a mapping"]),
        ("model.pretrained=", ["model.pretrained: value null", "true, false or a file"]),
        ("model.name=", ["model.name: value null", "the name of a model"]),
        ("model.name=''", ["model.name: value ''", "the name of a model"]),
        ("device=gpu", ["device: value 'gpu'", "auto, cpu, cuda, cuda:N or mps"]),
        ('device="cpu\\n"', ["device: value 'cpu\\n'", "auto, cpu"]),
        ('output="a\\0b"', ["output: value 'a\\x00b'", "a folder"]),
        ("name=2024", ["name: value 2024", 'write "2024"']),
        ("name=../x", ["name: value '../x'", "a folder name"]),
        ("name=.hidden", ["name: value '.hidden'", "a folder name"]),
        ('name="a\\n"', ["name: value 'a\\n'", "a folder name"]),
        (f"name={'a' * 129}", ["name: value 'aaa", "at most 128"]),
    ],
)
def test_a_mistake_is_one_line_with_key_value_and_what_is_valid(override: str, words: list[str]) -> None:
    (problem,) = problems(overrides=[override])
    for word in words:
        assert word in problem
    assert len(problem) < 300


@pytest.mark.parametrize("other", ["name=cosine", "lr=0.1", "weight_decay=0"])
def test_phases_stand_alone(other: str) -> None:
    (problem,) = problems(overrides=["regime.phases=[{epoch: 0}]", f"regime.{other}"])
    key, value = other.split("=")
    assert problem.startswith("regime: phases")
    assert key in problem
    assert value in problem


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("3", ["holds 3", "mapping"]),
        ("[a]", ["holds ['a']", "mapping"]),
        ("a: [", ["line ", "broken YAML"]),
        ("seed: 1\nseed: 2", ["line 2", "given twice"]),
        ("model: 3", ["model: value 3", "a mapping of settings"]),
        ("model: {nrom: l1}", ["model.nrom: unknown key", "did you mean 'model.norm'?"]),
        ("norm: l1", ["norm: unknown key", "did you mean 'model.norm'?"]),
        ("model.norm: l1", ["model.norm: unknown key", "write model: and below it norm:"]),
        ('"a\\nb": 1', ["'a\\nb': unknown key"]),
        ("data: {download: on}", ["data.download: value 'on'"]),
        ("output: !!python/name:os.system x", ["line 1", "tags"]),
    ],
)
def test_mistakes_in_the_file(tmp_path: Path, text: str, words: list[str]) -> None:
    (problem,) = problems(file=write(tmp_path, text))
    for word in words:
        assert word in problem


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    assert "binary.yaml: not valid UTF-8" in problems(file=tmp_path / "binary.yaml")[0]
    assert "none.yaml: cannot be read: No such file" in problems(file=tmp_path / "none.yaml")[0]
    assert "cannot be read: Is a directory" in problems(file=tmp_path)[0]
    (tmp_path / "large.yaml").write_text("#" * (1 << 21))
    assert "large.yaml: larger than" in problems(file=tmp_path / "large.yaml")[0]


def test_an_empty_file_or_section_and_a_byte_order_mark_are_fine(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, "")) == RunConfig()
    assert load_config(write(tmp_path, "model:\ntrain:\n")) == RunConfig()
    assert load_config(write(tmp_path, "\ufeffseed: 3")).seed == 3


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    def refuse(value: object) -> None:
        raise UserError(f"unknown {value!r}; did you mean 'resnet20'?", "and a second thing")

    def refuse_with_value_error(value: object) -> None:
        raise ValueError(f"never {value}")

    found = problems(
        file=write(tmp_path, "model: {name: resnt20, nrom: l1}\ntrain: 5\nseed: -1"),
        options={"data.batch_size": 0, "nope": 1},
        overrides=["regime.lr=fast", "oops", "output=here"],
        checks={
            "model.name": refuse,
            "output": refuse_with_value_error,
            "seed": refuse,  # not asked: the value is wrong already
            "train.epochs": refuse,  # not asked: its section is wrong already
            "regime.name": refuse,  # not asked: not set
        },
    )
    assert sorted(problem.split(":")[0] for problem in found) == [
        "'oops'",
        "data.batch_size",
        "model.name",
        "model.name",
        "model.nrom",
        "nope",
        "output",
        "regime.lr",
        "seed",
        "train",
    ]
    assert "model.name: unknown 'resnt20'; did you mean 'resnet20'?" in found
    assert "output: never here" in found


def test_a_file_with_thousands_of_mistakes_is_answered_at_once(tmp_path: Path) -> None:
    assert len(problems(file=write(tmp_path, "".join(f"key{i}: {i}\n" for i in range(5_000))))) == 50


def test_checks_see_defaults_and_given_values() -> None:
    seen = []
    load_config(overrides=["data.name=random"], checks={"data.name": seen.append, "model.name": seen.append})
    assert seen == ["random", "resnet8"]


def test_options_must_be_plain_data() -> None:
    (problem,) = problems(options={"model.options": {"hook": print}})
    assert "model.options" in problem
    assert "no plain data" in problem
    assert load_config(options={"model.options": {"sizes": (1, 2)}}).model.options == {"sizes": [1, 2]}
