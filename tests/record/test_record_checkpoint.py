"""Checkpoints read back exactly, and any damage is named."""

import json
import os
import pickle
import random
import re
import shutil

import pytest
import torch

from norm_matters.core.errors import StorageError, UserError
from norm_matters.record import find_checkpoint, latest_checkpoint, load_checkpoint, save_checkpoint
from norm_matters.record.state import FORMAT_VERSION, seal_state

PARTS = ("model.safetensors", "training.safetensors", "state.json")


@pytest.fixture
def run(tmp_path):
    (tmp_path / "config.yaml").write_text("")
    (tmp_path / "provenance.json").write_text("{}")
    return tmp_path


def save(run, step, *, best=False, **tensors):
    model = tensors or {"weight": torch.full((3,), float(step))}
    training = {"momentum": torch.full((2,), step / 3)}
    return save_checkpoint(run, step=step, model=model, training=training, state={"step": step}, best=best)


def names(run):
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def tensors_of_every_kind():
    weight = torch.randn(4, 3, 3, 2)
    return {
        "float64": torch.randn(3, dtype=torch.float64),
        "bfloat16": torch.randn(2, 2).bfloat16(),
        "float16": torch.randn(2).half(),
        "complex": torch.randn(2, dtype=torch.complex64),
        "random state": torch.get_rng_state(),
        "flags": torch.tensor([True, False]),
        "num_batches_tracked": torch.tensor(2**40),
        "nothing": torch.empty(0, 3),
        "not finite": torch.tensor([float("nan"), float("inf"), -0.0]),
        "channels last": weight.contiguous(memory_format=torch.channels_last),
        "channels last 3d": torch.randn(2, 3, 4, 5, 6).contiguous(memory_format=torch.channels_last_3d),
        "transposed": torch.randn(5, 7).t(),
        "every second": torch.arange(10)[::2],
        "expanded": torch.ones(1, 3).expand(4, 3),
        "part": weight[1:3],
        "tied": weight,
        "tied too": weight,
        "parameter": torch.nn.Parameter(torch.randn(3)),
        "layer1.0.größe\n": torch.randn(1),
    }


def bits(tensor):
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).tolist() if tensor.numel() else []


def test_every_tensor_reads_back_to_the_bit(run):
    saved = tensors_of_every_kind()
    folder = save_checkpoint(run, step=7, model=saved, training={}, state={}, best=False)
    checkpoint = load_checkpoint(folder)
    assert checkpoint.model.keys() == saved.keys()
    for name, tensor in saved.items():
        loaded = checkpoint.model[name]
        assert (loaded.dtype, loaded.shape) == (tensor.dtype, tensor.shape), name
        assert bits(loaded) == bits(tensor), name
    for name in ("channels last", "channels last 3d"):
        assert checkpoint.model[name].stride() == saved[name].stride()
    assert checkpoint.training == {}
    assert (checkpoint.step, checkpoint.folder) == (7, run / "checkpoints" / "step-000000007")


def test_loaded_tensors_can_be_changed(run):
    tensors = load_checkpoint(save(run, 1)).model
    tensors["weight"].mul_(2)
    assert tensors["weight"].tolist() == [2, 2, 2]


def test_state_reads_back(run):
    state = {
        "clock": {"step": 3},
        "lr": 0.1 + 0.2,
        "rng": [3, [2**63, None], "ä\u2028"],
        "best": float("nan"),
        "ok": True,
    }
    folder = save_checkpoint(run, step=3, model={}, training={}, state=state, best=False)
    assert repr(load_checkpoint(folder).state) == repr(state)
    document = json.loads((folder / "state.json").read_text())
    assert document["format_version"] == FORMAT_VERSION
    assert set(document["parts"]) == {"model.safetensors", "training.safetensors"}


def test_the_model_loads_anywhere(run):
    from safetensors.torch import load_file

    tensors = load_file(save(run, 5) / "model.safetensors")
    assert tensors["weight"].tolist() == [5, 5, 5]


def test_the_last_two_and_the_best_are_kept_and_nothing_else(run):
    save(run, 10, best=True)
    assert names(run) == ["best", "last", "step-000000010"]
    for step in (15, 20, 30):
        save(run, step)
    assert names(run) == ["best", "last", "step-000000010", "step-000000020", "step-000000030"]
    assert os.readlink(run / "checkpoints" / "last") == "step-000000030"
    assert os.readlink(run / "checkpoints" / "best") == "step-000000010"
    assert find_checkpoint(run).name == "step-000000010"
    assert find_checkpoint(run, "last").name == "step-000000030"
    assert find_checkpoint(run / "checkpoints" / "last") == (run / "checkpoints" / "step-000000030").resolve()
    save(run, 40, best=True)
    assert names(run) == ["best", "last", "step-000000030", "step-000000040"]
    (run / "checkpoints" / "step-notes").write_text("the user's own file")
    save(run, 50, best=True)
    assert "step-notes" in names(run)


def test_without_a_best_one_the_last_is_used(run):
    save(run, 10)
    save(run, 20)
    assert names(run) == ["last", "step-000000010", "step-000000020"]
    assert find_checkpoint(run).name == "step-000000020"


def test_the_same_step_twice_never_removes_the_one_in_use(run):
    first = save(run, 10, best=True)
    second = save(run, 10)
    assert first != second
    assert load_checkpoint(find_checkpoint(run, "last")).step == 10
    third = save(run, 10, best=True)
    assert latest_checkpoint(run) == latest_checkpoint(run, "best") == third
    assert names(run) == ["best", "last", "step-000000010-2", "step-000000010-3"]


def test_a_folder_left_by_a_kill_is_written_anew(run):
    save(run, 10)
    left = run / "checkpoints" / "step-000000020"
    left.mkdir()
    (left / "model.safetensors").write_text("half")
    (run / "checkpoints" / ".tmp-step-000000020-1234").mkdir()
    assert save(run, 20) == left
    assert load_checkpoint(left).step == 20
    assert names(run) == ["last", "step-000000010", "step-000000020"]


def test_a_run_copied_with_its_links_followed_goes_on(run, tmp_path_factory):
    save(run, 10, best=True)
    save(run, 20)
    copy = tmp_path_factory.mktemp("copy") / "run"
    shutil.copytree(run, copy, symlinks=False)
    assert load_checkpoint(find_checkpoint(copy)).step == 10
    assert load_checkpoint(find_checkpoint(copy, "last")).step == 20
    save(copy, 30)
    assert load_checkpoint(find_checkpoint(copy)).step == 10
    save(copy, 40, best=True)
    assert names(copy) == ["best", "last", "step-000000030", "step-000000040"]


@pytest.mark.parametrize("part", PARTS)
def test_a_flipped_bit_is_found_at_every_byte(run, part):
    folder = save(run, 10)
    whole = (folder / part).read_bytes()
    draw = random.Random(0)
    for position in range(len(whole)):
        changed = bytearray(whole)
        changed[position] ^= 1 << draw.randrange(8)
        (folder / part).write_bytes(changed)
        with pytest.raises(UserError, match=f"{re.escape(part)} is damaged") as caught:
            load_checkpoint(folder)
        assert (caught.value.exit_status, len(caught.value.problems[0].splitlines())) == (2, 1)
    (folder / part).write_bytes(whole)
    load_checkpoint(folder)


@pytest.mark.parametrize("part", PARTS)
def test_a_cut_is_found_at_every_length(run, part):
    folder = save(run, 10)
    whole = (folder / part).read_bytes()
    for length in range(len(whole)):
        (folder / part).write_bytes(whole[:length])
        with pytest.raises(UserError, match=rf"{re.escape(part)} is (cut short|damaged)"):
            load_checkpoint(folder)
    (folder / part).write_bytes(whole + b"\n")
    with pytest.raises(UserError, match=f"{re.escape(part)} is damaged"):
        load_checkpoint(folder)


@pytest.mark.parametrize("part", PARTS)
def test_a_missing_part_and_a_folder_in_its_place_are_named(run, part):
    folder = save(run, 10)
    (folder / part).unlink()
    with pytest.raises(UserError, match=f"{re.escape(part)} is missing"):
        load_checkpoint(find_checkpoint(folder))
    (folder / part).mkdir()
    with pytest.raises(UserError, match=f"{re.escape(part)} is a folder") as caught:
        load_checkpoint(find_checkpoint(folder))
    assert not isinstance(caught.value, StorageError)


def test_a_pickle_is_never_loaded(run, tmp_path):
    class Canary:
        def __reduce__(self):
            return (open, (str(tmp_path / "canary"), "w"))

    folder = save(run, 10)
    for part in PARTS:
        whole = (folder / part).read_bytes()
        (folder / part).write_bytes(pickle.dumps(Canary()))
        with pytest.raises(UserError):
            load_checkpoint(folder)
        (folder / part).write_bytes(whole)
    assert not (tmp_path / "canary").exists()


def forge(**changes):
    entry = {"sha256": "0" * 64, "size": 3, "channels_last": []}
    document = {"step": 1, "best": False, "parts": {"model.safetensors": entry}, "state": {}}
    return seal_state({**document, **changes})


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (forge(format_version=3), r"state\.json has format version 3; this norm-matters reads 1 to 2: a newer one"),
        (forge(format_version=None), "format version None"),
        (forge(step="1"), "is no state"),
        (forge(state=[]), "is no state"),
        (forge(parts={}), r"says nothing valid about model\.safetensors"),
        (forge(parts={"model.safetensors": 3}), "says nothing valid"),
        (forge(parts={"model.safetensors": {"sha256": "", "size": "x", "channels_last": []}}), "says nothing valid"),
        (forge(), r"model\.safetensors is damaged"),
    ],
)
def test_a_forged_state_is_refused(run, data, text):
    folder = save(run, 10)
    (folder / "state.json").write_bytes(data)
    with pytest.raises(UserError, match=text):
        load_checkpoint(folder)


def test_a_state_nested_too_deep_is_refused(run):
    import hashlib

    folder = save(run, 10)
    head, zeros = b'{\n "sha256": "', b"0" * 64
    data = head + zeros + b'",\n "state": ' + b"[" * 100_000
    data = data.replace(zeros, hashlib.sha256(data).hexdigest().encode())
    (folder / "state.json").write_bytes(data)
    with pytest.raises(UserError, match=r"state\.json is damaged"):
        load_checkpoint(folder)


def test_a_state_that_is_no_json_is_our_mistake_and_writes_nothing(run):
    with pytest.raises(TypeError):
        save_checkpoint(run, step=1, model={}, training={}, state={"path": run}, best=False)
    assert not (run / "checkpoints").exists() or names(run) == []
