import csv
import io
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from norm_matters.bench.input import Arm, InputRow, measure_arms, measure_input, write_input
from norm_matters.bench.photos import make_photo, write_photos
from norm_matters.core.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


@pytest.fixture
def few_images(monkeypatch):
    monkeypatch.setattr("norm_matters.bench.input.SMALL_IMAGES", 64)
    monkeypatch.setattr("norm_matters.bench.input.PHOTOS", 16)


# timm leaves its files open.
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
def test_every_arm_is_measured_and_threads_are_as_before(few_images):
    if find_spec("timm") is None:
        pytest.skip("timm is not installed")
    threads = torch.get_num_threads()
    rows = measure_input(batch_size=8, workers=[0, 1], rounds=1)
    assert torch.get_num_threads() == threads
    assert [(row.task, row.library, row.workers) for row in rows] == [
        ("small", "norm-matters", 0),
        ("small", "torchvision", 0),
        ("small", "torchvision", 1),
        *(("folder", library, workers) for workers in (0, 1) for library in ("norm-matters", "torchvision", "timm")),
    ]
    assert {row.images for row in rows} == {64, 16}
    assert all(row.images_per_second > 0 for row in rows)


def test_timm_is_optional(few_images, monkeypatch, tmp_path):
    write_photos(tmp_path / "train", 4, width=40, height=30)
    write_photos(tmp_path / "val", 2, width=40, height=30)
    monkeypatch.setitem(sys.modules, "timm", None)
    monkeypatch.setattr("norm_matters.bench.input.find_spec", lambda name: None)
    rows = measure_input(f"imagefolder:{tmp_path}", batch_size=64, workers=[0], rounds=1)
    assert [row.library for row in rows] == ["norm-matters", "torchvision"]
    # No more images than there are.
    assert {row.images for row in rows} == {4}


def test_figures_follow_from_the_times(monkeypatch):
    arms = {
        Arm("t", "norm-matters", 0): lambda: None,
        Arm("t", "peer", 0): lambda: None,
        Arm("t", "peer", 2): lambda: None,
    }
    times = dict(zip(map(str, arms), ([1.0, 2.0, 4.0], [8.0, 8.0, 8.0], [2.0, 8.0, 4.0]), strict=True))
    monkeypatch.setattr("norm_matters.bench.input.time_in_turns", lambda *_, **__: times)
    ours, peer, peer_of_two = measure_arms(arms, 16)
    assert (ours.images_per_second, ours.slowest, ours.fastest, ours.per_core) == (8, 4, 16, 8)
    assert (ours.rounds, ours.ours_over_this) == (3, 1)
    assert peer.ours_over_this == 4
    # On two cores: 2 * 2 / 1, 2 * 8 / 2, 2 * 4 / 4.
    assert (peer_of_two.images_per_second, peer_of_two.per_core, peer_of_two.ours_over_this) == (4, 2, 4)


def test_ours_with_as_many_workers_is_compared_with(monkeypatch):
    arms = {Arm("t", library, workers): lambda: None for workers in (0, 2) for library in ("norm-matters", "peer")}
    times = dict(zip(map(str, arms), ([4.0], [8.0], [1.0], [3.0]), strict=True))
    monkeypatch.setattr("norm_matters.bench.input.time_in_turns", lambda *_, **__: times)
    assert [row.ours_over_this for row in measure_arms(arms, 16)] == [1, 2, 1, 3]


def test_csv_has_a_line_per_row(tmp_path):
    row = InputRow("small", "peer", 1, 64, 9, 10.0, 9.0, 11.0, 10.0, 2.5)
    path = write_input(tmp_path / "new", [row, row])
    lines = list(csv.DictReader(io.StringIO(path.read_text())))
    assert path.name == "input.csv"
    assert len(lines) == 2
    assert lines[0]["library"] == "peer"
    assert float(lines[0]["ours_over_this"]) == 2.5
    assert list(lines[0]) == list(InputRow.__dataclass_fields__)


def test_what_the_peers_cannot_read_is_refused(tmp_path):
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    write_photos(tmp_path, 4, width=100, height=80)
    cells = [{"bytes": path.read_bytes(), "path": None} for path in sorted(tmp_path.rglob("*.jpg"))]
    pq.write_table(pa.table({"image": cells, "label": [0, 1, 0, 1]}), tmp_path / "x.parquet")
    with pytest.raises(UserError, match="no folder of image files"):
        measure_input(f"parquet:{tmp_path / 'x.parquet'}", workers=[0], rounds=1)


def test_photos_are_the_same_each_time_and_cost_what_photos_cost(tmp_path: Path):
    first, second, other = (np.asarray(make_photo(64, 48, seed=seed)) for seed in (1, 1, 2))
    assert first.shape == (48, 64, 3)
    assert np.array_equal(first, second)
    assert not np.array_equal(first, other)
    # Neighbours are alike, as in a photograph, and not as in noise.
    values = first.astype(float)
    assert np.abs(np.diff(values, axis=1)).mean() < 0.7 * values.std()
    write_photos(tmp_path, 3)
    files = sorted(tmp_path.rglob("*.jpg"))
    assert [str(file.relative_to(tmp_path)) for file in files] == [
        "class0/00000.jpg",
        "class0/00002.jpg",
        "class1/00001.jpg",
    ]
    assert all(50_000 < file.stat().st_size < 120_000 for file in files)
    with Image.open(files[0]) as image:
        assert image.size == (500, 375)
