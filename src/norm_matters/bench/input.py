"""How many images per second reach the network: our loader beside torchvision's transforms and timm's loader.

Small images: a random crop of the padded image and a flip. The peer decodes nothing: it has the bytes in memory, as
torchvision's CIFAR10 has, makes a PIL image of each and runs torchvision's v2 transforms on it in a DataLoader.
Folders: JPEG files to random parts of 224 x 224 pixels, flipped. Everybody ends with normalised float32 batches on the
CPU. torch gets one thread, so that what is compared is the work and not the number of cores.
"""

import csv
import importlib
import io
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, fields
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Subset
from torch.utils.data import Dataset as MapDataset

from norm_matters.bench.photos import write_photos
from norm_matters.bench.timing import time_in_turns
from norm_matters.core.config import DataConfig
from norm_matters.core.errors import UserError
from norm_matters.datasets import Dataset, EncodedImages, Loader, ResidentImages, load_dataset
from norm_matters.datasets.images import Images
from norm_matters.datasets.workers import available_cores
from norm_matters.record.files import make_folder, write_file
from norm_matters.transforms import Preprocessing

OURS = "norm-matters"
ROUNDS = 9
INPUT_SIZE = 224
# Images per measurement, and JPEG files that are made up.
SMALL_IMAGES, PHOTOS = 2048, 256


class Arm(NamedTuple):
    """One way to read the images.

    Attributes:
        task: "small" or "folder".
        library: whose loader.
        workers: processes that read ahead; with 0 the main one reads.
    """

    task: str
    library: str
    workers: int


@dataclass(frozen=True)
class InputRow:
    """What was measured of one arm.

    Attributes:
        task, library, workers: see `Arm`.
        images: read in each round.
        rounds: that counted.
        images_per_second: median over the rounds.
        slowest, fastest: round, in images per second.
        per_core: images per second and core: the workers are counted, the main process only where there are none.
        ours_over_this: how many times as many images per second and core our loader reads, the median over the rounds,
            with as many workers where it has some.
    """

    task: str
    library: str
    workers: int
    images: int
    rounds: int
    images_per_second: float
    slowest: float
    fastest: float
    per_core: float
    ours_over_this: float


def measure_input(
    dataset: str | None = None,
    *,
    batch_size: int = 128,
    workers: Sequence[int] | None = None,
    rounds: int = ROUNDS,
    quick: bool = False,
) -> list[InputRow]:
    """Measure small images, a folder, or both.

    Args:
        dataset: a set of small images, or one of image files such as `imagefolder:DIR`; noise and made-up photographs
            where not given.
        batch_size: images per batch, fewer where there are too few images.
        workers: to try; 0, 1 and as many as there are cores where not given.
        rounds: that count.
        quick: an eighth of the images.

    Raises:
        UserError: for a dataset that cannot be read, or whose files the peers cannot read.
    """
    workers = sorted(set(workers or (0, 1, available_cores())))
    scale = 8 if quick else 1
    rows: list[InputRow] = []
    with ExitStack() as stack:
        stack.enter_context(_one_thread())
        names = [dataset]
        if dataset is None:
            folder = Path(stack.enter_context(TemporaryDirectory()))
            write_photos(folder / "train", PHOTOS // scale)
            write_photos(folder / "val", 2)
            names = ["random", f"imagefolder:{folder}"]
        for name in names:
            data = load_dataset(DataConfig(name=name or ""))
            images = min(len(data.train), (SMALL_IMAGES if data.size else PHOTOS) // scale)
            arms = small_arms if data.size else folder_arms
            chosen = arms(data, images, batch_size=min(batch_size, images), workers=workers, stack=stack)
            rows += measure_arms(chosen, images, rounds=rounds)
    return rows


def measure_arms(arms: Mapping[Arm, Callable[[], object]], images: int, *, rounds: int = ROUNDS) -> list[InputRow]:
    """Time arms of one task in turns; each call reads so many images."""
    seconds = time_in_turns({str(arm): call for arm, call in arms.items()}, repeats=rounds, warm_up=1)
    ours = {arm.workers: seconds[str(arm)] for arm in arms if arm.library == OURS}
    rows = []
    for arm in arms:
        times = seconds[str(arm)]
        cores = max(1, arm.workers)
        reference = arm.workers if arm.workers in ours else 0
        ratios = [
            cores * time / (max(1, reference) * our_time) for time, our_time in zip(times, ours[reference], strict=True)
        ]
        speeds = [images / time for time in times]
        median = statistics.median(speeds)
        figures = median, min(speeds), max(speeds), median / cores, statistics.median(ratios)
        rows.append(InputRow(arm.task, arm.library, arm.workers, images, len(times), *figures))
    return rows


def small_arms(
    data: Dataset, images: int, *, batch_size: int, workers: Sequence[int], stack: ExitStack
) -> dict[Arm, Callable[[], object]]:
    """Our loader, which needs no workers for these, and torchvision's transforms with each number of workers.

    Args:
        images: that a call reads, in whole batches.
        stack: closes the loaders.
    """
    part = data.train.subset(np.arange(images))
    assert isinstance(part, ResidentImages)
    preprocessing = data.preprocessing(crop="pad")
    arms: dict[Arm, Callable[[], object]] = {
        Arm("small", OURS, 0): _ours(part, preprocessing, batch_size=batch_size, workers=0, stack=stack)
    }
    v2 = _v2()
    steps = [v2.RandomCrop(preprocessing.input_size, padding=preprocessing.pad)] if preprocessing.pad else []
    steps += [v2.RandomHorizontalFlip()] if preprocessing.flip else []
    transform = v2.Compose([*steps, *_to_normal(preprocessing)])
    for number in workers:
        arms[Arm("small", "torchvision", number)] = _epochs(
            _data_loader(_PilImages(part, transform), batch_size=batch_size, workers=number), stack
        )
    return arms


def folder_arms(
    data: Dataset, images: int, *, batch_size: int, workers: Sequence[int], stack: ExitStack
) -> dict[Arm, Callable[[], object]]:
    """Our loader, torchvision's image folder and, where it is installed, timm's loader, each with so many workers."""
    if not isinstance(data.train, EncodedImages) or data.train.contents:
        raise UserError(f"--dataset: '{data.name}' is no folder of image files, which the others could read too")
    part = data.train.subset(np.arange(images))
    preprocessing = data.preprocessing(crop="inception", input_size=INPUT_SIZE)
    v2 = _v2()
    transform = v2.Compose([v2.RandomResizedCrop(INPUT_SIZE), v2.RandomHorizontalFlip(), *_to_normal(preprocessing)])
    arms: dict[Arm, Callable[[], object]] = {}
    for number in workers:
        arms[Arm("folder", OURS, number)] = _ours(
            part, preprocessing, batch_size=batch_size, workers=number, stack=stack
        )
        files = Subset(_torchvision().datasets.ImageFolder(str(part.root), transform), range(images))
        arms[Arm("folder", "torchvision", number)] = _epochs(
            _data_loader(files, batch_size=batch_size, workers=number), stack
        )
        if find_spec("timm"):
            loader = _timm_loader(part, preprocessing, images, batch_size=batch_size, workers=number)
            arms[Arm("folder", "timm", number)] = _epochs(loader, stack)
    return arms


def write_input(folder: Path, rows: Sequence[InputRow]) -> Path:
    """Write `input.csv` into a folder, a line per row, columns as in `InputRow`; return its path."""
    make_folder(folder)
    text = io.StringIO()
    table = csv.DictWriter(text, [field.name for field in fields(InputRow)], lineterminator="\n")
    table.writeheader()
    table.writerows(asdict(row) for row in rows)
    path = folder / "input.csv"
    write_file(path, text.getvalue())
    return path


def _ours(
    images: Images, preprocessing: Preprocessing, *, batch_size: int, workers: int, stack: ExitStack
) -> Callable[[], object]:
    loader = Loader(images, preprocessing, batch_size=batch_size, train=True, seed=0, workers=workers)
    stack.enter_context(closing(loader))
    epochs = count()
    return lambda: _exhaust(loader.epoch(next(epochs)))


def _epochs(loader: Iterable[Any], stack: ExitStack) -> Callable[[], object]:
    # timm's loader wraps torch's.
    inner: Any = getattr(loader, "loader", loader)

    def end() -> None:
        if inner._iterator is not None:
            inner._iterator._shutdown_workers()

    stack.callback(end)
    return lambda: _exhaust(loader)


def _exhaust(batches: Iterable[Any]) -> None:
    for _ in batches:
        pass


def _data_loader(images: MapDataset[Any], *, batch_size: int, workers: int) -> DataLoader[Any]:
    return DataLoader(
        images,
        batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        persistent_workers=workers > 0,
        generator=torch.Generator(),
    )


def _to_normal(preprocessing: Preprocessing) -> list[Any]:
    v2 = _v2()
    return [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(preprocessing.mean, preprocessing.std)]


def _timm_loader(
    images: EncodedImages, preprocessing: Preprocessing, count: int, *, batch_size: int, workers: int
) -> Iterable[Any]:
    """timm's loader as its training script makes it, without colour jitter."""
    _torchvision()
    from timm.data.dataset import ImageDataset
    from timm.data.loader import create_loader

    dataset: Any = ImageDataset(str(images.root))
    dataset.reader.samples = dataset.reader.samples[:count]
    return create_loader(
        dataset,
        INPUT_SIZE,
        batch_size,
        is_training=True,
        color_jitter=0.0,
        interpolation="bilinear",
        mean=preprocessing.mean,
        std=preprocessing.std,
        num_workers=workers,
        persistent_workers=workers > 0,
        device=torch.device("cpu"),
    )


def _torchvision() -> Any:
    from norm_matters.core.torchvision import torchvision

    return torchvision


def _v2() -> Any:
    _torchvision()
    return importlib.import_module("torchvision.transforms.v2")


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _PilImages(MapDataset[Any]):
    """Images held in memory as torchvision's CIFAR10 serves them: each is made a PIL image, then transformed."""

    def __init__(self, images: ResidentImages, transform: Callable[[Any], Any]) -> None:
        self.pixels = images.pixels.permute(0, 2, 3, 1).squeeze(-1).numpy()
        self.labels = images.labels.tolist()
        self.transform = transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        return self.transform(Image.fromarray(self.pixels[index])), self.labels[index]
