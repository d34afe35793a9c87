"""Old files: read without running what is in them, refused where they are not what they say, and the command."""

import argparse
import io
import os
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from norm_matters.cli import main
from norm_matters.core.errors import UserError
from norm_matters.models import create_model
from norm_matters.models.old_files import read_old_file


class Hostile:
    """Runs a command when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch '{self.canary}'",)


@pytest.fixture
def state() -> dict[str, Tensor]:
    """The state of a resnet8 whose norms are those of the paper's code: the inverse of sigma, scale and mean."""
    torch.manual_seed(0)
    found = create_model("resnet8", num_classes=10).state_dict()
    old = OrderedDict()
    for name, tensor in found.items():
        layer, _, part = name.rpartition(".")
        if f"{layer}.running_var" not in found:
            old[name] = tensor
        elif part == "running_var":
            old[name] = torch.rand_like(tensor) + 0.5
        elif part in ("weight", "bias"):
            old[f"{layer}.{'scale' if part == 'weight' else 'mean'}"] = tensor
        elif part == "running_mean":
            old[name] = tensor
    return old


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "model_best.pth.tar"


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
def test_what_a_file_says(path, state, zipped):
    document = {"epoch": 90, "model": "resnet", "config": "{'depth': 8}", "state_dict": state}
    document |= {"best_prec1": torch.tensor(66.25), "regime": [{"epoch": 0, "lr": 0.1}]}
    torch.save(document, path, _use_new_zipfile_serialization=zipped)
    found = read_old_file(path)
    assert (found.epoch, found.best_accuracy, found.model, found.config) == (90, 66.25, "resnet", "{'depth': 8}")
    assert list(found.tensors) == list(state)
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in state.items())


def test_bare_state_of_parameters(path):
    torch.save(OrderedDict(weight=nn.Parameter(torch.ones(2))), path)
    found = read_old_file(path)
    assert (found.epoch, found.best_accuracy, found.model) == (None, None, "")
    assert not found.tensors["weight"].requires_grad


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
@pytest.mark.parametrize("place", ["regime", "state_dict", "best_prec1", "whole"])
def test_nothing_in_a_file_is_run(tmp_path, path, state, zipped, place):
    canary = tmp_path / "canary"
    document = {"epoch": 1, "state_dict": state, place: [Hostile(canary)]}
    torch.save(Hostile(canary) if place == "whole" else document, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match=r"more than tensors and plain values \(posix\.system\) and is not read"):
        read_old_file(path)
    with pytest.raises(UserError, match=r"posix\.system"):
        read_old_file(path)
    assert main(["import", str(path), str(tmp_path / "out.safetensors"), "--model", "resnet8"]) == 2
    assert not canary.exists()
    assert not (tmp_path / "out.safetensors").exists()
    # the file is what it is meant to be: whoever unpickles it runs the command
    torch.load(path, weights_only=False)
    assert canary.exists()


@pytest.mark.parametrize("protocol", [2, 4])
def test_plain_pickles_are_not_run(tmp_path, path, protocol):
    path.write_bytes(pickle.dumps({"state_dict": Hostile(tmp_path / "canary")}, protocol=protocol))
    with pytest.raises(UserError):
        read_old_file(path)
    assert not (tmp_path / "canary").exists()


def test_harmless_classes_are_refused_with_a_way_out(path, state):
    torch.save({"state_dict": state, "args": argparse.Namespace(lr=0.1)}, path)
    with pytest.raises(UserError, match=r"\(argparse\.Namespace\).*save \{'state_dict': \.\.\..*\} alone"):
        read_old_file(path)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "before torch 1.6"])
@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_files_cut_short(path, state, zipped, share):
    torch.save({"state_dict": state}, path, _use_new_zipfile_serialization=zipped)
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(UserError, match=r"model_best\.pth\.tar' (is cut short|holds more)"):
        read_old_file(path)


def recompressed(data: bytes) -> bytes:
    """The archive with its entries compressed."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))
    return out.getvalue()


def test_compressed_archives(path):
    """200 MB of zeros in 200 KB."""
    torch.save({"state_dict": {"a": torch.zeros(1000)}}, path)
    path.write_bytes(recompressed(path.read_bytes()))
    with pytest.raises(UserError, match="has compressed entries"):
        read_old_file(path)


def test_archives_that_claim_more_than_they_hold(path):
    torch.save({"state_dict": {"a": torch.zeros(1000)}}, path)
    data = bytearray(path.read_bytes())
    # its entry in the central directory has both sizes from byte 20 on
    entry = data.rindex(b"PK\x01\x02", 0, data.rindex(b"/data/0"))
    data[entry + 20 : entry + 28] = (2**31).to_bytes(4, "little") * 2
    path.write_bytes(data)
    with pytest.raises(UserError, match="has entries larger than the file itself"):
        read_old_file(path)


def test_tensors_larger_than_the_file(path):
    """A view that repeats one number 10^12 times is small until it is copied."""
    torch.save({"state_dict": {"fc.weight": torch.zeros(1).expand(10**6, 10**6)}}, path)
    with pytest.raises(UserError, match="names tensors larger than the file itself"):
        read_old_file(path)


def test_files_above_the_limit(path, state):
    torch.save({"state_dict": state}, path)
    size = path.stat().st_size
    read_old_file(path, limit=size)
    with pytest.raises(UserError, match=f"has {size} bytes, more than the limit of {size - 1}"):
        read_old_file(path, limit=size - 1)


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ([torch.zeros(2)], "holds a list, no checkpoint"),
        ({"epoch": 3, "net": {}}, "has no state_dict and is none; its keys are: epoch, net"),
        ({"state_dict": {}}, "has no state_dict and is none"),
        ({"state_dict": {"a": torch.zeros(2), "b": 3}}, "entry 'b' of the state_dict is a int, no tensor"),
        ({"state_dict": {"a": torch.zeros(2), 7: torch.zeros(2)}}, "entry '7' of the state_dict"),
        ({"state_dict": {"a": torch.zeros(2).to_sparse()}}, "entry 'a' of the state_dict is no plain tensor"),
        ({"state_dict": {"a": torch.zeros(2, device="meta")}}, "entry 'a' of the state_dict is no plain tensor"),
    ],
)
def test_files_without_a_state(path, document, message):
    torch.save(document, path)
    with pytest.raises(UserError, match=message):
        read_old_file(path)


def test_missing_file_and_folder(tmp_path):
    for path in (tmp_path / "none.pth", tmp_path):
        with pytest.raises(UserError, match="there is no file"):
            read_old_file(path)


@pytest.fixture
def imported(path, state, tmp_path, capsys):
    """Run the command on a checkpoint of the paper's code; return its status, output file and what it printed."""
    torch.save({"epoch": 90, "state_dict": state, "best_prec1": 66.25, "model": "resnet"}, path)
    output = tmp_path / "out.safetensors"

    def run(*arguments: str, to: Path = output):
        status = main(["import", str(path), str(to), *arguments])
        return status, to, capsys.readouterr()

    return run


def test_command_writes_weights_for_pretrained(imported, state):
    status, output, printed = imported("--model", "resnet8", "--norm", "l1")
    assert (status, printed.err) == (0, "")
    assert printed.out.splitlines()[0] == "file: epoch 90, best accuracy 66.25%, resnet"
    assert "renamed: 18 (bn1.scale to bn1.weight, " in printed.out
    assert "norms: 9 kept the inverse of sigma" in printed.out
    assert f"written: use it with --model resnet8 --norm l1 --pretrained {output}" in printed.out
    network = create_model("resnet8", num_classes=10, norm="l1", pretrained=str(output))
    expected = 1 / state["bn1.running_var"] ** 2 - 1e-5
    torch.testing.assert_close(network.state_dict()["bn1.running_var"], expected)


def test_dry_run_writes_nothing(imported):
    status, output, printed = imported("--model", "resnet8", "--dry-run")
    assert status == 0
    assert "norms: 9 kept the inverse of sigma" in printed.out
    assert "written" not in printed.out
    assert list(output.parent.glob("*.safetensors")) == []


def test_existing_output_is_replaced_only_when_asked(imported, tmp_path):
    output = tmp_path / "out.safetensors"
    output.write_text("mine")
    status, _, printed = imported("--model", "resnet8")
    assert (status, output.read_text()) == (2, "mine")
    assert "exists; choose another name, or replace it with --force" in printed.err
    status, _, _ = imported("--model", "resnet8", "--force")
    assert status == 0
    assert "conv1.weight" in load_file(output)


def test_output_that_cannot_be_written(imported, tmp_path):
    status, _, printed = imported("--model", "resnet8", to=tmp_path / "none/out.safetensors")
    assert status == 74
    assert "cannot write" in printed.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--model: missing"),
        (["--model", "resnet8", "--num-classes", "0"], "--num-classes: value '0' is not valid"),
        (["--model", "resnet8", "--running-var", "sigma"], "--running-var: value 'sigma' is not valid"),
        (["--model", "resnet8", "--weight-p", "3"], "--weight-p: value '3' is not valid"),
        (["--model", "resnet8", "seed=3"], "'seed=3': only options of the network"),
        (["--model", "resnet8", "model.options.width=8"], "conv1.weight is (16, 3, 3, 3) in the file, (8, 3, 3, 3)"),
        (["--model", "resnet8", "--norm", "l7"], "unknown norm 'l7'"),
    ],
)
def test_wrong_arguments(imported, arguments, message):
    status, output, printed = imported(*arguments)
    assert status == 2
    assert message in printed.err
    assert not output.exists()


def test_every_option_counts(path, imported, monkeypatch):
    given = {}

    def record(path, **settings):
        given.update(settings, path=path)
        raise UserError("seen")

    monkeypatch.setattr("norm_matters.models.old_checkpoints.import_checkpoint", record)
    options = ["--model", "resnet20", "--norm", "mean", "--num-classes", "7", "--running-var", "variance"]
    imported(*options, "--weight-p", "inf", "model.options.width=8")
    assert given == {
        "path": path,
        "model": "resnet20",
        "norm": "mean",
        "num_classes": 7,
        "running_var": "variance",
        "weight_p": float("inf"),
        "options": {"width": 8},
    }


def test_output_of_another_kind(imported, tmp_path):
    status, _, printed = imported("--model", "resnet8", to=tmp_path / "out.pth")
    assert status == 2
    assert "must end in .safetensors" in printed.err
