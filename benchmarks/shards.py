"""60,000 images as a folder of files, as webdataset and as parquet shards: complete, as fast, and in flat memory?

    OMP_NUM_THREADS=1 python benchmarks/shards.py [--images 60000] [--workers 0,2] [--epochs 5] [--folder /tmp/shards]

The images are those of Fashion-MNIST (Debian's package dataset-fashion-mnist), 28 x 28, as JPEGs of 600 bytes: nothing
is as hard on a format as many tiny images. They are packed by the `norm-matters` command, then each format is read by
the loader in the order of training, each in a process of its own. Columns:

    pack_seconds              of `data pack`, start and check included
    start_seconds             to open the dataset
    reads_per_second          images whose bytes are read, in the order of an epoch, not decoded, by one process
    images_per_second         of the loader (decoded, cropped, in batches): median of the epochs
    first_images_per_second   of the first epoch, before which the system was asked to forget the files
    memory_mb                 anonymous memory of process and workers after the first epoch, shared pages divided
                              among those who share them (Pss_Anon): not what the system caches of files
    growth_percent            of that, from the end of the first to the end of the last epoch

Every epoch is checked: each image comes once; also with 2 and with 3 ranks.
"""

import argparse
import csv
import ctypes
import gc
import gzip
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from norm_matters.core.config import DataConfig
from norm_matters.datasets import Loader, load_dataset, parquet, stored
from norm_matters.datasets.images import Images
from norm_matters.transforms.preprocessing import Preprocessing

SOURCE = Path("/usr/share/datasets/fashion-mnist")
PLAN = Preprocessing(3, 28, (0.5,) * 3, (0.2,) * 3, "pad", 2, True, 28)
BATCH = 256


def write_folder(folder: Path, count: int) -> None:
    """The images as FOLDER/train/CLASS/NUMBER.jpg, and the first 1,000 again as val."""
    pixels, labels = read_idx("train-images-idx3-ubyte.gz", 16), read_idx("train-labels-idx1-ubyte.gz", 8)
    pixels = pixels.reshape(-1, 28, 28)
    for part, size in (("train", count), ("val", 1000)):
        for label in range(10):
            (folder / part / str(label)).mkdir(parents=True)
        for number in range(size):
            image = Image.fromarray(pixels[number % len(pixels)])
            image.save(folder / part / str(labels[number % len(pixels)]) / f"{number:06}.jpg", quality=90)


def read_idx(name: str, header: int) -> np.ndarray:
    """The bytes of one of its files behind the header."""
    found = next(SOURCE.rglob(name))
    return np.frombuffer(gzip.decompress(found.read_bytes()), dtype=np.uint8, offset=header)


def open_images(name: str) -> Images:
    """The training images, as they are stored."""
    # As in sets of many gigabytes: nothing is decoded at the start, nothing held in memory, blocks are kept together.
    stored.LARGE = parquet.LARGE = 0
    parquet.SMALL_FILE = 0
    return load_dataset(DataConfig(name=name)).train


def forget(folder: Path) -> None:
    """Ask the system to drop a folder's files from its cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def memory(loader: Loader) -> float:
    """Megabytes of this process and its workers, each page divided among those who have it; without files."""
    gc.collect()
    # What malloc keeps for the next batch differs by megabytes from moment to moment.
    ctypes.CDLL(None).malloc_trim(0)
    processes = loader._reading._processes() if loader._reading else []
    total = 0
    for process in ("self", *(worker.pid for worker in processes)):
        for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss_Anon:"):
                total += int(line.split()[1])
    return total / 1000


def run_epoch(loaders: list[Loader], epoch: int) -> float:
    """Seconds of an epoch of all ranks, one after the other; AssertionError unless each image comes once."""
    start = time.perf_counter()
    indices = np.concatenate([batch.indices for loader in loaders for batch in loader.epoch(epoch)])
    seconds = time.perf_counter() - start
    seen = np.bincount(indices, minlength=len(loaders[0].images))
    assert (seen == 1).all(), f"{len(loaders)} ranks: {int((seen != 1).sum())} images do not come once"
    return seconds


def measure(name: str, folder: Path, workers: int, epochs: int) -> Iterator[tuple[str, Any]]:
    """The columns of one row."""
    start = time.perf_counter()
    images = open_images(name)
    yield "start_seconds", round(time.perf_counter() - start, 2)
    # A batch that divides the number of images: none is left out at the end.
    size = next(n for n in range(BATCH, 0, -1) if len(images) % n == 0)
    options: dict[str, Any] = {"batch_size": size, "train": True, "seed": 0, "workers": workers}
    loader = Loader(images, PLAN, **options)
    order = loader.order(0).tolist()
    start = time.perf_counter()
    total = sum(len(images.content(index)) for index in order)
    yield "reads_per_second", round(len(order) / (time.perf_counter() - start))
    assert total
    forget(folder)
    seconds, used = [], []
    for epoch in range(epochs):
        seconds.append(run_epoch([loader], epoch))
        used.append(memory(loader))
    loader.close()
    yield "images_per_second", round(len(images) / statistics.median(seconds[1:]))
    yield "first_images_per_second", round(len(images) / seconds[0])
    yield "memory_mb", round(used[0])
    yield "growth_percent", round(100 * (used[-1] / used[0] - 1), 2)
    for world in (2, 3):
        loaders = [Loader(images, PLAN, rank=rank, world=world, **options) for rank in range(world)]
        run_epoch(loaders, epochs + world)
        for loader in loaders:
            loader.close()


def main() -> None:
    """Write the images, pack them, measure and print CSV."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--images", type=int, default=60_000)
    parser.add_argument("--workers", default="0,2")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/shards"))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    folder = options.folder
    if options.one:
        # A process of its own for each row: none inherits another one's memory.
        name, place, workers = options.one.split(",")
        row = dict(measure(name, Path(place), int(workers), options.epochs))
        print(",".join(map(str, row.values())))
        return
    shutil.rmtree(folder, ignore_errors=True)
    write_folder(folder / "files", options.images)
    rows = [("imagefolder", "files", 0.0)]
    for format in ("webdataset", "parquet"):
        command = [sys.executable, "-m", "norm_matters", "data", "pack", str(folder / "files"), str(folder / format)]
        start = time.perf_counter()
        subprocess.run([*command, "--format", format, "--shard-size", "4MB"], check=True, stdout=sys.stderr)
        rows.append((format, format, time.perf_counter() - start))
    # The same shards without their index: row groups, as in parquet files of others.
    shutil.copytree(folder / "parquet", folder / "rowgroups")
    (folder / "rowgroups" / "index.safetensors").unlink()
    rows.append(("parquet", "rowgroups", 0.0))
    columns = (
        "start_seconds",
        "reads_per_second",
        "images_per_second",
        "first_images_per_second",
        "memory_mb",
        "growth_percent",
    )
    out = csv.writer(sys.stdout, lineterminator="\n")
    out.writerow(["format", "files", "megabytes", "pack_seconds", "workers", *columns])
    for kind, place, packing in rows:
        files = [path for path in (folder / place).rglob("*") if path.is_file()]
        size = sum(path.stat().st_size for path in files) / 1e6
        for workers in options.workers.split(","):
            one = f"{kind}:{folder / place},{folder / place},{workers}"
            command = [sys.executable, __file__, "--one", one, "--epochs", str(options.epochs)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            title = {"files": "folder", "rowgroups": "parquet, no index"}.get(place, place)
            out.writerow(
                [title, len(files), round(size, 1), round(packing, 1), workers, *done.stdout.strip().split(",")]
            )
            sys.stdout.flush()
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
