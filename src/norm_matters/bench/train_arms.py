"""What `bench train` times: a step, or an epoch from images, by our engine and by a plain torch loop.

A process has one setting of malloc, so each setting is measured in a process of its own, which this module is when it
is run: it reads requests, one JSON object a line, and answers each with one.
"""

import itertools
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as MapDataset

from norm_matters.core.allocator import keep_pages
from norm_matters.core.clock import Clock
from norm_matters.core.config import DataConfig, ModelConfig, RegimeConfig, RunConfig, TrainConfig
from norm_matters.core.errors import UserError
from norm_matters.core.seeding import seed_everything
from norm_matters.datasets import Dataset
from norm_matters.datasets.images import Images
from norm_matters.engine.compiled import compiled_forward
from norm_matters.engine.device import resolve_device
from norm_matters.engine.instruments.collect import Instruments
from norm_matters.engine.metrics import Meter
from norm_matters.engine.state import TrainingState
from norm_matters.engine.step import StepOptions, train_step
from norm_matters.engine.tensors import lay_out
from norm_matters.models import MODELS
from norm_matters.models.build import build_model
from norm_matters.models.entry import read_options
from norm_matters.models.libraries import build_library_model
from norm_matters.regimes import build_regime
from norm_matters.run import Plan, prepare

# torch's own settings but for these, the same on both sides. The rate is small: the same batch comes again and again.
LR, MOMENTUM = 0.01, 0.9
_PHASES = [{"optimizer": "SGD", "lr": LR, "momentum": MOMENTUM}]

Call = Callable[[], int]
"""What is timed; it returns how many images it trained on, when that is done."""


@dataclass(frozen=True)
class TrainCase:
    """What is trained.

    Attributes:
        model: a network of ours, or `timm:NAME`, `torchvision:NAME`.
        norm: spec for our side; None for `l2` in ours, and in a library's network its own.
        batch_size: images per step.
        image_size: side in pixels of the noise that stands for images where no dataset is named.
        dataset: as in a run; None for noise.
        data_dir: where it lies.
        end_to_end: from images in memory, cropped and flipped, instead of the same batch again and again.
        images: of an epoch, where it is end to end; rounded down to whole batches.
        device: where to train.
        options: of the network.
    """

    model: str = "resnet20"
    norm: str | None = "l1"
    batch_size: int = 128
    image_size: int = 32
    dataset: str | None = None
    data_dir: str | None = None
    end_to_end: bool = False
    images: int = 2048
    device: str = "cpu"
    options: dict[str, Any] | None = None


@dataclass(frozen=True)
class Arm:
    """One way to train it.

    Attributes:
        side: our engine with our norm, or a plain loop with `nn.BatchNorm2d`.
        pages: whether malloc keeps the pages of what was freed, or returns them as glibc does by itself.
        layout: memory format of images and weights.
        compiled: by torch.compile, the whole network.
        workers: processes of the plain side's DataLoader, end to end.
    """

    side: Literal["ours", "plain"]
    pages: Literal["kept", "returned"]
    layout: Literal["channels_last", "contiguous"] = "channels_last"
    compiled: bool = False
    workers: int = 0

    @property
    def name(self) -> str:
        """In words."""
        return f"{self.side}, {self.layout}, {'compiled' if self.compiled else 'eager'}, pages {self.pages}" + (
            f", workers {self.workers}" if self.workers else ""
        )


def build_arm(case: TrainCase, arm: Arm) -> Call:
    """A function that makes one step (one epoch, end to end).

    Raises:
        UserError: an unknown model, norm or dataset, or a network that cannot be compiled.
    """
    seed_everything(0)
    if case.end_to_end:
        return our_epoch(case, arm) if arm.side == "ours" else plain_epoch(case, arm)
    return our_step(case, arm) if arm.side == "ours" else plain_step(case, arm)


def our_step(case: TrainCase, arm: Arm) -> Call:
    """A step of our engine on one batch."""
    images, labels, classes = _one_batch(case, arm)
    config = ModelConfig(name=case.model, norm=case.norm, options=case.options or {})
    module = build_model(config, num_classes=classes, in_channels=images.shape[1], input_size=None).module
    regime = build_regime(RegimeConfig(phases=_PHASES), default="constant")
    device = images.device
    state = TrainingState(module, regime, Clock(0, 10**6, 1), device=device, compiled=arm.compiled)
    meter, options = Meter(device), StepOptions()

    def step() -> int:
        train_step(state, images, labels, options=options, meter=meter)
        return len(labels)

    return step


def plain_step(case: TrainCase, arm: Arm) -> Call:
    """The same step in plain torch."""
    images, labels, classes = _one_batch(case, arm)
    train = _plain_loop(case, arm, classes=classes, in_channels=images.shape[1])
    return lambda: train(images, labels)


def our_epoch(case: TrainCase, arm: Arm) -> Call:
    """An epoch of a run as `train` makes it, measuring instruments included, without evaluation and records."""
    plan = _plan(case, arm)
    instruments = Instruments(plan.state)
    epochs = itertools.count()

    def run() -> int:
        meter, images = Meter(plan.state.device), torch.empty(0)
        batches = itertools.islice(plan.train.epoch(next(epochs)), _batches(case, plan))
        for number, (images, labels, *_) in enumerate(batches, start=1):
            with instruments.step(number):
                train_step(plan.state, images, labels, options=StepOptions(), meter=meter)
        instruments.end_epoch(images)
        return meter.scores().images

    return run


def plain_epoch(case: TrainCase, arm: Arm) -> Call:
    """The same epoch in plain torch: PIL images through torchvision's transforms in a DataLoader."""
    plan = _plan(case, arm)
    count = _batches(case, plan) * case.batch_size
    loader = DataLoader(
        _PlainImages(plan.dataset.train, count, _plain_transform(plan.dataset)),
        batch_size=case.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=arm.workers,
        persistent_workers=arm.workers > 0,
    )
    train = _plain_loop(case, arm, classes=len(plan.dataset.classes), in_channels=plan.dataset.channels)

    def run() -> int:
        return sum(train(images, labels) for images, labels in loader)

    return run


def _plain_loop(case: TrainCase, arm: Arm, *, classes: int, in_channels: int) -> Callable[[Tensor, Tensor], int]:
    """The loop that everybody writes, in the arm's layout."""
    device = resolve_device(case.device)
    if ":" in case.model:
        options = {"options": case.options or {}, "num_classes": classes, "in_channels": in_channels}
        module = build_library_model(case.model, **options)
    else:
        build = MODELS.get(case.model).build
        # Our own layers of convolutions, with torch's norm and its in-place ReLU.
        norm: Any = nn.BatchNorm2d
        options = read_options(build, case.options or {})
        module = build(num_classes=classes, in_channels=in_channels, norm=norm, **options)
    layout = _layout(arm)
    module = lay_out(module.to(device), layout)
    optimizer = torch.optim.SGD(module.parameters(), lr=LR, momentum=MOMENTUM)
    forward = compiled_forward(module) if arm.compiled else module

    def train(images: Tensor, labels: Tensor) -> int:
        images, labels = images.to(device, memory_format=layout), labels.to(device)
        optimizer.zero_grad()
        functional.cross_entropy(forward(images), labels).backward()
        optimizer.step()
        return len(labels)

    return train


def _layout(arm: Arm) -> torch.memory_format:
    return torch.channels_last if arm.layout == "channels_last" else torch.contiguous_format


def _one_batch(case: TrainCase, arm: Arm) -> tuple[Tensor, Tensor, int]:
    """Images in the arm's layout and labels, on the device, and the number of classes."""
    device = resolve_device(case.device)
    if case.dataset:
        plan = _plan(case, arm)
        batch = next(iter(plan.train.epoch(0)))
        images, labels, classes = batch.images, batch.labels, len(plan.dataset.classes)
    else:
        images, labels = (
            torch.randn(case.batch_size, 3, case.image_size, case.image_size),
            torch.arange(case.batch_size),
        )
        classes = 10
        labels = labels % classes
    return images.to(device, memory_format=_layout(arm)), labels.to(device), classes


def _plan(case: TrainCase, arm: Arm) -> Plan:
    """Our run on the dataset."""
    return prepare(
        RunConfig(
            model=ModelConfig(name=case.model, norm=case.norm, options=case.options or {}),
            data=DataConfig(name=case.dataset or "random", dir=case.data_dir, batch_size=case.batch_size),
            regime=RegimeConfig(phases=_PHASES),
            train=TrainConfig(compile=arm.compiled and arm.side == "ours"),
            device=case.device,
            allocator="default",  # set for the whole process
        )
    )


def _batches(case: TrainCase, plan: Plan) -> int:
    """Steps of an epoch."""
    return max(1, min(case.images // case.batch_size, len(plan.train)))


def _plain_transform(dataset: Dataset) -> Callable[[Image.Image], Tensor]:
    """Pad and crop, flip, and normalise, as everybody does for small images."""
    from norm_matters.core.torchvision import torchvision

    transforms = torchvision.transforms
    return transforms.Compose(
        [
            transforms.RandomCrop(dataset.train.image(0).size[::-1], padding=dataset.pad),
            *([transforms.RandomHorizontalFlip()] if dataset.flip else []),
            transforms.ToTensor(),
            transforms.Normalize(dataset.mean, dataset.std),
        ]
    )


class _PlainImages(MapDataset[tuple[Tensor, int]]):
    """Pixels in memory that become PIL images one by one, as torchvision's CIFAR10 has them."""

    def __init__(self, images: Images, count: int, transform: Callable[[Image.Image], Tensor]) -> None:
        self.pixels = [np.asarray(images.image(index)) for index in range(count)]
        self.labels = images.labels[:count].tolist()
        self.transform = transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.pixels[index])), self.labels[index]


def serve(requests: IO[str], answers: IO[str]) -> None:
    """Answer requests until there are none.

    The first is `{"case": ..., "pages": "kept" | "returned"}`, and has no answer. Each other is
    `{"arm": ..., "times": N}`: the arm is built when it first comes, and called so often; the answer is
    `{"images": N}`, how many it trained on, or `{"error": [...]}` with lines for the user.
    """
    first = json.loads(next(requests))
    case = TrainCase(**first["case"])
    if first["pages"] == "kept":
        keep_pages()
    arms: dict[Arm, Call] = {}

    def answer(request: dict[str, Any]) -> dict[str, Any]:
        arm = Arm(**request["arm"])
        try:
            if arm not in arms:
                arms[arm] = build_arm(case, arm)
            images = sum(arms[arm]() for _ in range(request["times"]))
            if case.device.startswith("cuda"):
                torch.cuda.synchronize()
        except UserError as error:
            return {"error": list(error.problems)}
        except Exception as error:
            if not arm.compiled:
                raise
            return {"error": [f"{arm.name}: {(str(error) or type(error).__name__).splitlines()[0]}"]}
        return {"images": images}

    for line in requests:
        print(json.dumps(answer(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    # What libraries print must not come between the answers.
    stdout, sys.stdout = sys.stdout, sys.stderr
    serve(sys.stdin, stdout)
