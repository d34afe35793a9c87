import csv
import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from norm_matters.core.config import DataConfig
from norm_matters.core.errors import UserError
from norm_matters.datasets import load_dataset
from norm_matters.packing import measure_dataset, open_source, stats_lines, write_stats
from norm_matters.packing.stats import shorter_sides
from norm_matters.packing.workers import in_order


@pytest.fixture
def photos(tmp_path) -> Path:
    """Two classes, of 6 and 3 images to train on, and one each to evaluate on."""
    rng = np.random.default_rng(0)
    for part, counts in (("train", (6, 3)), ("val", (1, 1))):
        for name, count in zip("ab", counts, strict=True):
            folder = tmp_path / "photos" / part / name
            folder.mkdir(parents=True)
            for number in range(count):
                shape = (30 + 20 * number, 40 + number, 3)
                Image.fromarray(rng.integers(0, 200, shape, dtype=np.uint8)).save(folder / f"{number}.png")
    return tmp_path / "photos"


@pytest.mark.parametrize("workers", [0, 2])
def test_counts_sizes_and_moments(photos, workers):
    stats = measure_dataset(open_source(str(photos)), workers=workers)
    train = stats.parts["train"]
    assert (train.per_class, train.images, train.imbalance) == ([6, 3], 9, 2.0)
    assert train.sizes == {(40 + n, 30 + 20 * n): 2 if n < 3 else 1 for n in range(6)}
    files = sorted((photos / "train").rglob("*.png"))
    assert train.bytes == sum(file.stat().st_size for file in files)
    arrays = [np.asarray(Image.open(file)).astype(np.float64) / 255 for file in files]
    mean = np.mean([array.mean((0, 1)) for array in arrays], axis=0)
    mean_square = np.mean([(array**2).mean((0, 1)) for array in arrays], axis=0)
    np.testing.assert_allclose(train.mean, mean, atol=5.1e-5)
    np.testing.assert_allclose(train.std, np.sqrt(mean_square - mean**2), atol=5.1e-5)
    assert stats.parts["validation"].per_class == [1, 1]
    assert (train.broken, stats.duplicates, stats.shared) == ([], [], 0)


def test_mean_and_deviation_of_images_in_memory_are_those_of_training():
    stats = measure_dataset(open_source("digits"), workers=0)
    data = load_dataset(DataConfig())
    np.testing.assert_allclose(stats.parts["train"].mean, data.mean * 3, atol=1.1e-4)
    np.testing.assert_allclose(stats.parts["train"].std, data.std * 3, atol=1.1e-4)


def test_broken_images_and_duplicates_are_named(photos):
    shutil.copy(photos / "train" / "a" / "1.png", photos / "train" / "b" / "same.png")
    shutil.copy(photos / "train" / "a" / "1.png", photos / "val" / "b" / "leak.png")
    (photos / "train" / "a" / "text.jpg").write_text("no image")
    whole = (photos / "train" / "a" / "5.png").read_bytes()
    (photos / "train" / "b" / "cut.png").write_bytes(whole[:2000])
    (photos / "val" / "a" / "empty.png").write_bytes(b"")
    stats = measure_dataset(open_source(str(photos)), workers=0)
    assert [line.partition(": ")[0] for line in stats.parts["train"].broken] == [
        str(photos / "train" / "a" / "text.jpg"),
        str(photos / "train" / "b" / "cut.png"),
    ]
    assert len(stats.parts["validation"].broken) == 1
    names = [photos / "train" / "a" / "1.png", photos / "train" / "b" / "same.png", photos / "val" / "b" / "leak.png"]
    assert stats.duplicates == [[str(name) for name in names]]
    assert stats.shared == 1
    text = "\n".join(stats_lines(stats))
    assert "text.jpg: no image of a known format" in text
    assert "duplicates: 2 images have the bytes of another; 1 to evaluate on are in train too" in text
    assert json.loads(json.dumps(stats.to_json()))["shared"] == 1


def test_the_histogram_counts_every_image(photos):
    stats = measure_dataset(open_source(str(photos)), workers=0)
    histogram = dict(shorter_sides(stats.parts["train"].sizes))
    # The shorter sides are 30, 41, 42, 43, 44 and 45 pixels.
    assert histogram == {"below 32": 2, "32 to 47": 7}
    text = "\n".join(stats_lines(stats))
    assert "per class: 3 (b) to 6 (a), median 4.5, imbalance 2" in text


def test_classes_of_one_name_are_counted_apart(photos):
    stats = dataclasses.replace(measure_dataset(open_source(str(photos)), workers=0), classes=("crane", "crane"))
    found = json.loads(json.dumps(stats.to_json()))["parts"]["train"]["per_class"]
    assert [tuple(row.values()) for row in found] == [(0, "crane", 6), (1, "crane", 3)]


def test_csv_files(photos, tmp_path):
    (photos / "train" / "a" / "text.jpg").write_text("no image")
    stats = measure_dataset(open_source(str(photos)), workers=0)
    paths = write_stats(tmp_path / "out", stats)
    tables = {path.name: list(csv.DictReader(path.read_text().splitlines())) for path in paths}
    assert tables["classes.csv"][0] == {"part": "train", "label": "0", "class": "a", "images": "7"}
    assert sum(int(row["images"]) for row in tables["sizes.csv"] if row["part"] == "train") == 9
    assert tables["broken.csv"][0]["problem"].startswith(str(photos / "train" / "a" / "text.jpg"))
    assert tables["duplicates.csv"] == []


def test_a_set_of_broken_images_only(photos):
    for file in photos.rglob("*.png"):
        file.write_bytes(b"x")
    stats = measure_dataset(open_source(str(photos)), workers=0)
    assert len(stats.parts["train"].broken) == 9
    assert list(stats_lines(stats))


def exits(number: int) -> int:
    import multiprocessing
    import os

    if number == 3 and multiprocessing.parent_process() is not None:
        os._exit(1)
    return number


def squares(number: int) -> int:
    return number * number


@pytest.mark.parametrize("workers", [0, 1, 3, "auto"])
def test_work_comes_back_in_order(workers):
    assert list(in_order(squares, 50, workers)) == [n * n for n in range(50)]
    assert list(in_order(squares, 0, workers)) == []


def test_a_worker_that_dies_is_said():
    with pytest.raises(UserError, match="--workers: a worker died"):
        list(in_order(exits, 50, 2))
