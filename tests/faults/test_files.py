"""Files that were damaged, are of another version, or of another network: found, named, and never taken for whole."""

import json
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from norm_matters.core.errors import UserError
from norm_matters.record import find_checkpoint, load_checkpoint, newest_whole, save_checkpoint
from norm_matters.record import state as state_module

PARTS = ("model.safetensors", "training.safetensors", "state.json")
# A run of version 1 of the format, killed after two of its three epochs: of resnet8, two channels wide, on the digits.
OLD = Path(__file__).with_name("version-1")
OLD_SETTINGS = (
    *("model.name=resnet8", "model.norm=l1", "model.options.width=2", "data.workers=0", "data.batch_size=128"),
    *("train.instruments=none", "deterministic=true", "device=cpu", "train.epochs=3"),
)


@pytest.fixture(scope="module")
def run(zygote, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed, with several checkpoints."""
    folder = tmp_path_factory.mktemp("killed")
    zygote.train(folder, "train.checkpoint_every=3st", "train.keep=3", faults="step:0:17:kill", status=-9)
    return folder / "runs" / "run"


def flip(data: bytes, draw: random.Random) -> bytes:
    place, bit = draw.randrange(len(data)), draw.randrange(8)
    return data[:place] + bytes([data[place] ^ 1 << bit]) + data[place + 1 :]


def cut(data: bytes, draw: random.Random) -> bytes:
    return data[: draw.choice([0, draw.randrange(len(data)), len(data) - 1])]


def check_damages(run: Path, folder: Path, damage: Callable[[bytes, random.Random], bytes], count: int) -> None:
    """Damage a file of the newest checkpoint at random, that often: each time the one before it is taken."""
    shutil.copytree(run, folder, symlinks=True)
    last, draw = find_checkpoint(folder, prefer="last").resolve(), random.Random(0)
    before = newest_whole(folder).checkpoint
    assert before
    assert before.step == 15
    for number in range(count):
        path = last / PARTS[number % len(PARTS)]
        whole = path.read_bytes()
        path.write_bytes(damage(whole, draw))
        found = newest_whole(folder)
        assert found.checkpoint, number
        assert found.checkpoint.step == 12, number
        assert list(found.damaged) == [last.name], number
        assert path.name in found.damaged[last.name], number
        path.write_bytes(whole)


@pytest.mark.parametrize("damage", [flip, cut])
def test_a_hundred_damages_are_found(damage, run: Path, tmp_path: Path) -> None:
    check_damages(run, tmp_path / "run", damage, 100)


@pytest.mark.slow
@pytest.mark.parametrize("damage", [flip, cut])
def test_a_thousand_damages_are_found(damage, run: Path, tmp_path: Path) -> None:
    check_damages(run, tmp_path / "run", damage, 1000)


def test_a_run_with_a_damaged_checkpoint_goes_on_from_the_one_before(zygote, run: Path, tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    copy = tmp_path / "runs" / "run"
    shutil.copytree(run, copy, symlinks=True)
    path = find_checkpoint(copy, prefer="last").resolve() / "training.safetensors"
    path.write_bytes(flip(path.read_bytes(), random.Random(1)))
    text = zygote.train(tmp_path, resume=True)
    assert "step-000000015" in text
    assert "is damaged" in text
    assert "step-000000015" in (copy / "log.txt").read_text()
    whole = tmp_path / "whole"
    whole.mkdir()
    zygote.train(whole, "train.checkpoint_every=3st", "train.keep=3")
    digests = [zygote.ask("fingerprint", run=folder) for folder in (copy, whole / "runs" / "run")]
    assert digests[0] == digests[1]


def test_a_link_that_a_kill_left_half_made_is_swept_away(zygote, run: Path, tmp_path: Path) -> None:
    """And not taken for a stranger's, which would end the run."""
    (tmp_path / "runs").mkdir()
    copy = tmp_path / "runs" / "run"
    shutil.copytree(run, copy, symlinks=True)
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "file").touch()
    (copy / "checkpoints" / ".tmp-last-01234567").symlink_to("step-000000015")
    (copy / ".tmp-elsewhere").symlink_to(kept)
    zygote.train(tmp_path, resume=True)
    assert not [path for path in copy.rglob("*") if path.name.startswith(".tmp-")]
    assert (kept / "file").exists()


def test_when_all_are_damaged_nothing_is_begun_again_unasked(zygote, run: Path, tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    copy = tmp_path / "runs" / "run"
    shutil.copytree(run, copy, symlinks=True)
    for path in copy.glob("checkpoints/step-*/model.safetensors"):
        path.write_bytes(path.read_bytes()[:-1])
    text = zygote.train(tmp_path, resume=True, status=2)
    assert "no checkpoint of" in text
    assert "--restart begins the run again" in text
    assert text.count("is cut short") == len(list(copy.glob("checkpoints/step-*")))
    zygote.train(tmp_path, "--restart", resume=True)


def test_a_run_of_version_1_goes_on_as_if_it_were_of_this(zygote, tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    copy = tmp_path / "runs" / "run"
    shutil.copytree(OLD, copy, symlinks=True)
    assert json.loads((copy / "checkpoints" / "last" / "state.json").read_text())["format_version"] == 1
    zygote.train(tmp_path, resume=True)
    fresh = tmp_path / "fresh"
    arguments = ["train", *OLD_SETTINGS, f"output={fresh}", "name=run"]
    done = zygote.ask("run", arguments=arguments, text=tmp_path / "text")
    assert done["statuses"] == [0], done["text"]
    old, new = (load_checkpoint(find_checkpoint(folder, prefer="last")) for folder in (copy, fresh / "run"))
    assert old.model.keys() == new.model.keys()
    for name, tensor in new.model.items():
        torch.testing.assert_close(old.model[name], tensor, rtol=1e-4, atol=1e-5)


def test_a_checkpoint_of_a_newer_version_is_not_passed_over(
    zygote, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runs").mkdir()
    copy = tmp_path / "runs" / "run"
    shutil.copytree(run, copy, symlinks=True)
    path = find_checkpoint(copy, prefer="last").resolve() / "state.json"
    document = json.loads(path.read_text())
    del document["sha256"], document["format_version"]
    monkeypatch.setattr(state_module, "FORMAT_VERSION", state_module.FORMAT_VERSION + 1)
    path.write_bytes(state_module.seal_state(document))
    text = zygote.train(tmp_path, resume=True, status=2)
    assert re.search(r"error: .*state\.json has format version 3; this norm-matters reads 1 to 2: a newer one", text)


def test_a_checkpoint_of_another_network_is_refused_by_name(run: Path, zygote, tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    copy = tmp_path / "runs" / "run"
    shutil.copytree(run, copy, symlinks=True)
    checkpoint = load_checkpoint(find_checkpoint(copy, prefer="last"))
    renamed = {name.replace("0.", "first."): tensor for name, tensor in checkpoint.model.items()}
    save_checkpoint(
        copy, step=checkpoint.step, model=renamed, training=checkpoint.training, state=checkpoint.state, best=False
    )
    text = zygote.train(tmp_path, resume=True, status=2)
    assert "the weights are of another network: 0.weight is missing, 0.bias is missing, first" in text
    with pytest.raises(UserError):
        load_checkpoint(tmp_path)
