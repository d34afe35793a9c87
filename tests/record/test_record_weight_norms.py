"""The files of recorded norms: written, read, cut back, and refused where they are damaged."""

import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from norm_matters.core.errors import UserError
from norm_matters.record.weight_norms import NORMS_FOLDER, read_weight_norms, trim_weight_norms, write_weight_norms


def layers(value: float, dtype: type = np.float32) -> dict[str, np.ndarray]:
    return {"features.0": np.full((3, 4), value, dtype), "fc": np.arange(6, dtype=dtype).reshape(3, 2) + value}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_norms_come_back_as_they_were_written(tmp_path: Path, dtype: type) -> None:
    for epoch in (1, 2, 11):
        write_weight_norms(tmp_path, epoch, layers(epoch, dtype))
    found = read_weight_norms(tmp_path)
    assert list(found) == [1, 2, 11]
    for epoch, (read, _) in found.items():
        for name, rows in layers(epoch, dtype).items():
            assert read[name].dtype == dtype
            assert np.array_equal(read[name], rows)
    assert len({digest for _, digest in found.values()}) == 3


def test_other_libraries_read_them_without_pickle(tmp_path: Path) -> None:
    # A slice of a larger array, as recorders give them: its memory has gaps.
    write_weight_norms(tmp_path, 1, {"conv": np.arange(12.0).reshape(3, 4)[:, 1:3]})
    found = load_file(tmp_path / NORMS_FOLDER / "epoch-0001.safetensors")
    assert found["conv"].tolist() == [[1, 2], [5, 6], [9, 10]]


def test_epochs_that_do_not_count_are_removed(tmp_path: Path) -> None:
    for epoch in (1, 2, 3):
        write_weight_norms(tmp_path, epoch, layers(epoch))
    (tmp_path / NORMS_FOLDER / ".tmp-epoch-0004.safetensors-ab").write_bytes(b"half")
    trim_weight_norms(tmp_path, 2)
    assert sorted(path.name for path in (tmp_path / NORMS_FOLDER).iterdir()) == [
        "epoch-0001.safetensors",
        "epoch-0002.safetensors",
    ]
    trim_weight_norms(tmp_path / "elsewhere", 1)


def test_a_run_without_norms_is_told_how_to_record_them(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has no recorded norms: .* train it with train.record_norms=epoch"):
        read_weight_norms(tmp_path)
    with pytest.raises(UserError, match="has no recorded norms"):
        read_weight_norms(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "rows",
    [
        {"a": np.full((1, 2), np.nan)},
        {"a": -np.ones((1, 2))},
        {"a": np.ones(2)},
        {"a": np.ones((1, 2), int)},
        {"a": np.ones((0, 2))},
        {"a": np.ones((1, 2)), "b": np.ones((2, 2))},
    ],
)
def test_what_is_no_norm_is_refused(tmp_path: Path, rows: dict[str, np.ndarray]) -> None:
    write_weight_norms(tmp_path, 1, layers(1))
    save_file(rows, tmp_path / NORMS_FOLDER / "epoch-0001.safetensors")
    with pytest.raises(
        UserError, match=r"epoch-0001.safetensors is damaged: what it has for layer '[ab]' are no norms"
    ):
        read_weight_norms(tmp_path)


@pytest.mark.parametrize("keep", [0, 5, 40])
def test_a_file_cut_short_is_refused(tmp_path: Path, keep: int) -> None:
    write_weight_norms(tmp_path, 1, layers(1))
    path = tmp_path / NORMS_FOLDER / "epoch-0001.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"epoch-0001\.safetensors is damaged"):
        read_weight_norms(tmp_path)


@pytest.mark.timeout(30)
@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "bf16", "huge"])
def test_a_stranger_s_file_is_neither_waited_for_nor_believed(tmp_path: Path, kind: str) -> None:
    path = tmp_path / NORMS_FOLDER / "epoch-0001.safetensors"
    path.parent.mkdir()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    else:
        dtype, shape = ("BF16", "[1, 2]") if kind == "bf16" else ("F64", "[1099511627776, 1099511627776]")
        header = f'{{"a": {{"dtype": "{dtype}", "shape": {shape}, "data_offsets": [0, 4]}}}}'.encode()
        path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(UserError, match=r"epoch-0001\.safetensors is (damaged|a folder)"):
        read_weight_norms(tmp_path)
