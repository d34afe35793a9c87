"""Checkpoints of strangers, every checksum of which is right: nothing in them is run, and memory stays in bounds."""

import gc
import json
import os
import pickle
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save

from norm_matters.cli import main
from norm_matters.core.errors import UserError
from norm_matters.inference import load_run
from norm_matters.models.weights import read_weights
from norm_matters.record import load_checkpoint
from norm_matters.record.tensors import MAX_HEADER, unpack_tensors

Forge = Callable[..., Path]


class Canary:
    """A pickle that leaves a file behind when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


def header(entries: Any, data: bytes = b"", *, length: int | None = None) -> bytes:
    """A safetensors file with this header."""
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def tensor(dtype: str = "F32", shape: Any = (1,), offsets: Any = (0, 4)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


FILES = {
    "nothing": b"",
    "zeros": bytes(100),
    "a zip": b"PK\x03\x04" + bytes(100),
    "a header of terabytes": header({}, length=2**40),
    "a header beyond the limit": header(b"{" + b" " * MAX_HEADER + b"}"),
    "a header that is no object": header([1, 2]),
    "a header nested deep": header(b'{"a":' * 5000 + b"1" + b"}" * 5000),
    "a header with a key twice": header(b'{"a": %s, "a": %s}' % ((json.dumps(tensor()).encode(),) * 2), bytes(4)),
    "a header with NaN": header(b'{"a": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 4]}}', bytes(4)),
    "a shape larger than its bytes": header({"a": tensor(shape=[10**6, 10**6])}, bytes(4)),
    "a shape that overflows": header({"a": tensor(shape=[2**62, 4])}, bytes(4)),
    "a shape below zero": header({"a": tensor(shape=[-1])}, bytes(4)),
    "a shape of text": header({"a": tensor(shape=["1"])}, bytes(4)),
    "a shape of a thousand sides": header({"a": tensor(shape=[1] * 1000)}, bytes(4)),
    "offsets beyond the file": header({"a": tensor(offsets=[0, 10**12], shape=[25 * 10**10])}, bytes(4)),
    "offsets below zero": header({"a": tensor(offsets=[-4, 0])}, bytes(4)),
    "offsets that overlap": header({"a": tensor(), "b": tensor()}, bytes(4)),
    "offsets with a hole": header({"a": tensor(offsets=[4, 8])}, bytes(8)),
    "numbers of four bits": header({"a": tensor("F4", [2], [0, 1])}, bytes(1)),
    "an unknown type": header({"a": tensor("OBJECT")}, bytes(4)),
    "a tensor that is text": header({"a": "os.system"}),
    "a boolean for a number": header({"a": tensor(shape=[True])}, bytes(4)),
}


@pytest.mark.parametrize("data", FILES.values(), ids=FILES.keys())
def test_a_file_of_tensors_that_is_none(data: bytes, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        unpack_tensors(data)
    assert "\n" not in str(caught.value)
    (tmp_path / "file.safetensors").write_bytes(data)
    with pytest.raises(UserError, match=r"model\.pretrained: '.*file\.safetensors'"):
        read_weights(tmp_path / "file.safetensors")


def test_files_of_tensors_that_are(tmp_path: Path) -> None:
    tensors = {
        "a": torch.arange(3),
        "b": torch.ones(2, 2, dtype=torch.bfloat16),
        "c": torch.tensor(True),
        "d": torch.ones(0, 4),
    }
    found = unpack_tensors(save(tensors, metadata={"format": "pt"}))
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("part", ["model", "training"])
@pytest.mark.parametrize("kind", ["pickle", "torch zip", "torch legacy", "nested"])
def test_a_pickle_in_the_place_of_tensors_is_not_read(part: str, kind: str, forge: Forge, tmp_path: Path) -> None:
    canary = Canary(tmp_path / "canary")
    if kind in ("pickle", "nested"):
        data = pickle.dumps(canary if kind == "pickle" else {"rng": [{"state": canary}]})
    else:
        torch.save({"state_dict": canary}, tmp_path / "file", _use_new_zipfile_serialization=kind == "torch zip")
        data = (tmp_path / "file").read_bytes()
    run = forge(**{part: data})
    for arguments in (["eval", str(run)], ["train", f"--resume={run}", "--epochs=2", "--extend"]):
        assert main(arguments) == 2
    assert not canary.path.exists()


def set_state(*path: str, to: Any) -> Callable[[dict[str, Any]], None]:
    """A change of the state: the value at a path."""

    def change(document: dict[str, Any]) -> None:
        node = document["state"]
        for name in path[:-1]:
            node = node[name]
        node[path[-1]] = to

    return change


STATES = {
    **{
        f"the model {name[:20]!r}": set_state("config", "model", "name", to=name)
        for name in (
            *("os.system", "__class__", "torch.hub.load", "../x", "timm:../../x", "timm:hf-hub:evil/model"),
            *("timm:local-dir:/tmp", "torchvision:os", "norm_matters.cli:main", "x" * 10_000_000, "evil.py\0", ""),
        )
    },
    "a norm that is code": set_state("config", "model", "norm", to="__import__('os').system('id')"),
    "a norm that is nested deep": set_state("config", "model", "norm", to="ghost:base=(" * 5000 + "l1" + ")" * 5000),
    "options of a class": set_state("config", "model", "options", to={"__class__": 1}),
    "options of a huge network": set_state("config", "model", "options", to={"width": 10**9}),
    "a config that is text": set_state("config", to="os.system"),
    "a config with a new key": set_state("config", "_target_", to="os.system"),
    "no config": lambda document: document["state"].pop("config"),
    "classes that are a number": set_state("classes", to=10**12),
    "a class that is a number": set_state("classes", to=["a", 7]),
    "one class": set_state("classes", to=["a"]),
    "a billion channels": set_state("preprocessing", "channels", to=10**9),
    "images of a million pixels a side": set_state("preprocessing", "input_size", to=10**6),
    "a mean of text": set_state("preprocessing", "mean", to=["x"]),
    "a mean that is no list": set_state("preprocessing", "mean", to=3),
    "preprocessing of another class": set_state("preprocessing", to={"__class__": "os"}),
    "an epoch that is text": set_state("epoch", to="os.system"),
    "a source that is a list": set_state("model_source", to=[1]),
    "a source without a digest": set_state("model_source", to={"path": "/etc/passwd"}),
    "a state that is a list": lambda document: document.update(state=[1]),
    "parts that are a list": lambda document: document.update(parts=[1]),
    "a part without size": lambda document: document["parts"]["model.safetensors"].pop("size"),
    "a part of a size below zero": lambda document: document["parts"]["model.safetensors"].update(size=-1),
    "a part of a huge size": lambda document: document["parts"]["model.safetensors"].update(size=10**40),
    "a part of a size that is infinite": lambda document: document["parts"]["model.safetensors"].update(size=1e999),
    "a state nested deep": set_state("deep", to=json.loads('{"a":' * 200 + "1" + "}" * 200)),
}


@pytest.mark.parametrize("change", STATES.values(), ids=STATES.keys())
def test_a_state_that_is_wrong_is_told_in_one_line(change: Callable, forge: Forge) -> None:
    run = forge(change)
    with pytest.raises(UserError) as caught:
        load_run(run)
    assert len(str(caught.value)) < 700
    assert not str(caught.value).strip().count("\n")


def test_a_model_file_in_a_checkpoint_is_not_run(forge: Forge, tmp_path: Path) -> None:
    evil, canary = tmp_path / "evil.py", tmp_path / "canary"
    evil.write_text(f"open({str(canary)!r}, 'w')\ndef model(**kwargs): pass\n")
    import hashlib

    def change(document: dict[str, Any]) -> None:
        document["state"]["config"]["model"]["name"] = str(evil)
        document["state"]["model_source"] = {
            "path": str(evil),
            "sha256": hashlib.sha256(evil.read_bytes()).hexdigest(),
        }

    with pytest.raises(UserError, match="not vouched for"):
        load_run(forge(change))
    assert not canary.exists()


TRAINING = {
    "numpy's stream of another name": set_state("training", "rng", "numpy", to=["os.system", 0, 0, 0.0]),
    "numpy's stream beyond its end": set_state("training", "rng", "numpy", to=["MT19937", 10**9, 0, 0.0]),
    "Python's stream cut short": set_state("training", "rng", "python", to=[3, [1, 2, 3], None]),
    "Python's stream of text": set_state("training", "rng", "python", to="os.system"),
    "Python's stream of huge numbers": set_state("training", "rng", "python", to=[3, [10**40] * 625, None]),
    "a step that is text": set_state("training", "step", to="many"),
    "a step without end": set_state("training", "step", to=float("inf")),
    "no step": lambda document: document["state"]["training"].pop("step"),
    "an optimizer of another name": set_state("training", "optimizer", "optimizer", to="os.system"),
    "an optimizer that is a list": set_state("training", "optimizer", to=[1]),
    "a state that is text": set_state("training", "optimizer", "state", to="x"),
    "a world that is text": set_state("training", "world", to="x"),
    "training that is null": set_state("training", to=None),
    "a best that is text": set_state("best", to="x"),
    "a best without error": set_state("best", to={"epoch": 1}),
    "data that are null": set_state("data", to=None),
    "an epoch under way that is none": set_state("training", "epoch", to={"number": "x"}),
    "a scale that nobody asked for": set_state("training", "scale", to={"scale": "x"}),
}


def resumed(run: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a resume ends with."""
    capsys.readouterr()
    assert main(["train", f"--resume={run}", "--epochs=2", "--extend"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize("change", TRAINING.values(), ids=TRAINING.keys())
def test_a_training_that_is_wrong_is_not_resumed(
    change: Callable, forge: Forge, capsys: pytest.CaptureFixture[str]
) -> None:
    assert resumed(forge(change), capsys).startswith("error: ")


@pytest.mark.parametrize(
    ("entry", "other"),
    [
        ("exp_avg", torch.zeros(1)),
        ("exp_avg", torch.tensor(0.0)),
        ("exp_avg_sq", torch.zeros(3)),
        ("exp_avg_sq", torch.zeros(2, 2, 2, 2, dtype=torch.int8)),
        ("step", torch.zeros(5)),
        ("step", torch.zeros(0)),
    ],
    ids=["short", "no dimension", "another shape", "another type", "five steps", "no step"],
)
def test_an_optimizers_state_of_another_size_is_not_read_beyond_its_end(
    entry: str, other: torch.Tensor, forge: Forge, stolen: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = load((stolen / "checkpoints" / "last" / "training.safetensors").read_bytes())
    name = next(name for name in tensors if name.endswith(f"/{entry}"))
    line = resumed(forge(training=save({**tensors, name: other})), capsys)
    assert name.removeprefix("optimizer/") in line


def test_a_stream_of_random_numbers_of_another_size(
    forge: Forge, stolen: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = load((stolen / "checkpoints" / "last" / "training.safetensors").read_bytes())
    for name in [name for name in tensors if name.startswith("rng/")]:
        assert "damaged" in resumed(forge(training=save({**tensors, name: torch.zeros(3, dtype=torch.uint8)})), capsys)
        missing = {key: value for key, value in tensors.items() if key != name}
        assert "damaged" in resumed(forge(training=save(missing)), capsys)


def test_weights_of_another_shape_are_compared_before_they_are_copied(forge: Forge, stolen: Path) -> None:
    tensors = load((stolen / "checkpoints" / "last" / "model.safetensors").read_bytes())
    name = next(iter(tensors))
    with pytest.raises(UserError, match="the weights are of another network"):
        load_run(forge(model=save({**tensors, name: torch.zeros(1)})))
    with pytest.raises(UserError, match="the weights are of another network"):
        load_run(forge(model=save({**tensors, "canary": torch.zeros(1)})))


@pytest.mark.slow
@pytest.mark.parametrize("target", ["/", "..", "../../other", "/proc/self", "step-1", "x" * 300, "step-000000001/.."])
def test_links_that_lead_out_of_the_run(target: str, stolen: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("last", "best"):
        link = stolen / "checkpoints" / name
        link.unlink()
        link.symlink_to(target)
    with pytest.raises(UserError, match="leads to"):
        load_run(stolen)
    capsys.readouterr()
    assert main(["train", f"--resume={stolen}", "--epochs=2", "--extend"]) == 0
    assert "last leads to" in capsys.readouterr().err
    assert (stolen / "checkpoints" / "last").resolve().parent == stolen / "checkpoints"


@pytest.mark.slow
def test_bombs_stay_within_a_gigabyte(forge: Forge, stolen: Path) -> None:
    """Of address space beyond what the process has: loading whole what they promise would take terabytes."""
    folder = (stolen / "checkpoints" / "last").resolve()
    names = b",".join(b'"%d": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}' % n for n in range(250_000))

    def bombs() -> None:
        with pytest.raises(UserError, match="limit"):
            load_checkpoint(forge(model=header(b"{" + names + b"}")) / "checkpoints" / "last")
        with pytest.raises(UserError, match="header"):
            load_checkpoint(
                forge(model=header({"a": tensor(shape=[10**12], offsets=[0, 4 * 10**12])})) / "checkpoints" / "last"
            )
        hole = 2**40

        def change(document: dict[str, Any]) -> None:
            document["parts"]["model.safetensors"]["size"] = hole

        forge(change)
        os.truncate(folder / "model.safetensors", hole)
        with pytest.raises(UserError, match="limit"):
            load_checkpoint(folder)
        os.truncate(folder / "state.json", hole)
        with pytest.raises(UserError, match="limit"):
            load_checkpoint(folder)
        os.remove(folder / "state.json")
        os.mkfifo(folder / "state.json")
        with pytest.raises(UserError, match="no regular file"):
            load_checkpoint(folder)

    assert in_a_child_with_little_memory(bombs, more=2**30) == 0


def in_a_child_with_little_memory(action: Callable[[], None], *, more: int) -> int:
    """The exit status of a forked child that does it with so many bytes of address space more than it has."""
    gc.collect()
    child = os.fork()
    if not child:
        status = 1
        try:
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            limit = pages * resource.getpagesize() + more
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            action()
            status = 0
        except BaseException as error:
            os.write(2, f"{type(error).__name__}: {error}\n".encode())
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_the_limit_of_memory_is_one() -> None:
    assert in_a_child_with_little_memory(lambda: bytearray(2**31) and None, more=2**30) == 1


def test_the_good_run_is_good(stolen: Path, forge: Forge) -> None:
    forge()
    assert load_checkpoint(stolen / "checkpoints" / "last").model
    assert main(["train", f"--resume={stolen}", "--epochs=2", "--extend"]) == 0


@pytest.mark.timeout(60)
def test_names_are_looked_up_at_once_however_many_there_are(forge: Forge) -> None:
    """20,000 tensors, each looked for among 200,000 names: minutes, if these were a list."""
    data = save({f"{number:06}": torch.empty(0) for number in range(20_000)})

    def name_many(document: dict[str, Any]) -> None:
        document["parts"]["model.safetensors"]["channels_last"] = [f"x{number:06}" for number in range(200_000)]

    folder = forge(name_many, model=data) / "checkpoints" / "last"
    assert len(load_checkpoint(folder.resolve()).model) == 20_000


def test_names_that_are_none(forge: Forge) -> None:
    def name(document: dict[str, Any]) -> None:
        document["parts"]["model.safetensors"]["channels_last"] = [["a"]]

    with pytest.raises(UserError, match=r"says nothing valid about model\.safetensors"):
        load_checkpoint((forge(name) / "checkpoints" / "last").resolve())
