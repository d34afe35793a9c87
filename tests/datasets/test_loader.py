import multiprocessing
import os
import random
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import final

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile
from torch import Tensor

from norm_matters.bench.photos import make_photo
from norm_matters.core import stopping
from norm_matters.core.errors import UserError
from norm_matters.core.seeding import seed_everything
from norm_matters.datasets import EncodedImages, Loader, ResidentImages
from norm_matters.datasets.images import Images
from norm_matters.datasets.loader import has_room
from norm_matters.datasets.workers import count_workers
from norm_matters.transforms.batch import normalise
from norm_matters.transforms.image import to_pixels
from norm_matters.transforms.preprocessing import Preprocessing

PLAN = Preprocessing(3, 8, (0.5,) * 3, (0.2,) * 3, "pad", 2, True, 8)


def resident(count: int = 50) -> ResidentImages:
    pixels = torch.randint(256, (count, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator())
    return ResidentImages(pixels, np.arange(count) % 7, title="made up")


def encoded(folder: Path, count: int = 20) -> EncodedImages:
    names = [f"{i:03}.png" for i in range(count)]
    for i, name in enumerate(names):
        pixels = np.random.default_rng(i).integers(0, 256, (10 + i % 3, 12, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
    return EncodedImages(names, np.arange(count) % 3, root=folder)


def own_transform(image: Image.Image) -> Tensor:
    """Draws from all three global streams, as a user's may."""
    noise = random.random() + float(np.random.rand()) + torch.rand(3, 8, 8)
    return to_pixels(image.resize((8, 8))) / 255 + noise


def slow_transform(image: Image.Image) -> Tensor:
    time.sleep(0.02)
    return to_pixels(image)


def hasty_transform(image: Image.Image) -> Tensor:
    raise KeyError("nothing here")


def same(first, second) -> bool:
    return all(
        torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels) and np.array_equal(a.indices, b.indices)
        for a, b in zip(first, second, strict=True)
    )


@settings(deadline=None, max_examples=40)
@given(count=st.integers(1, 40), batch_size=st.integers(1, 50), seed=st.integers(0, 99), epoch=st.integers(0, 9))
def test_every_image_once_per_epoch(count, batch_size, seed, epoch):
    images = resident(count)
    train = Loader(images, PLAN, batch_size=batch_size, train=True, seed=seed)
    batches = list(train.epoch(epoch))
    assert len(batches) == len(train) == max(1, count // batch_size)
    seen = np.concatenate([b.indices for b in batches])
    assert len(seen) == len(set(seen)) == (count if count < batch_size else count // batch_size * batch_size)
    assert {len(b.images) for b in batches} == {min(batch_size, count)}

    val = Loader(images, PLAN, batch_size=batch_size, train=False, seed=seed)
    batches = list(val.epoch(epoch))
    assert len(batches) == len(val)
    assert np.concatenate([b.indices for b in batches]).tolist() == list(range(count))
    assert torch.equal(torch.cat([b.images for b in batches]), normalise(images.pixels, PLAN, torch.channels_last))
    for batch in batches:
        assert batch.labels.tolist() == images.labels[batch.indices].tolist()


def test_order_is_a_function_of_seed_and_epoch():
    images = resident()
    orders = {
        (seed, epoch): tuple(Loader(images, PLAN, batch_size=8, train=True, seed=seed).order(epoch))
        for seed in (0, 1)
        for epoch in (0, 1)
    }
    assert len(set(orders.values())) == 4
    loader = Loader(images, PLAN, batch_size=8, train=True, seed=0)
    list(loader.epoch(5))
    assert tuple(loader.order(1)) == orders[0, 1]


def test_what_happens_to_an_image_depends_on_seed_epoch_and_index():
    images = resident()

    def by_index(batch_size, **changes):
        options = {"seed": 0, "epoch": 0} | changes
        loader = Loader(images, PLAN, batch_size=batch_size, train=True, seed=options["seed"])
        return {int(i): x for b in loader.epoch(options["epoch"]) for i, x in zip(b.indices, b.images, strict=True)}

    first, other_size = by_index(50), by_index(10)
    assert all(torch.equal(first[i], other_size[i]) for i in range(50))
    for changed in (by_index(50, seed=1), by_index(50, epoch=1)):
        assert sum(torch.equal(first[i], changed[i]) for i in range(50)) < 10


@pytest.mark.parametrize("start", [0, 1, 5, 6])
def test_starting_in_the_middle_of_an_epoch(start):
    loader = Loader(resident(), PLAN, batch_size=8, train=True, seed=0)
    assert same(list(loader.epoch(3))[start:], list(loader.epoch(3, start=start)))


@pytest.mark.parametrize("kind", ["resident", "encoded", "inception", "own"])
def test_workers_change_nothing(tmp_path, kind):
    images = resident() if kind == "resident" else encoded(tmp_path)
    plan = Preprocessing.from_json({**PLAN.to_json(), "crop": "inception", "pad": 0}) if kind == "inception" else PLAN

    def run(workers, train):
        transform = own_transform if kind == "own" else None
        loader = Loader(images, plan, batch_size=6, train=train, seed=4, workers=workers, transform=transform)
        return [batch for epoch in range(2) for batch in loader.epoch(epoch)]

    for train in (True, False):
        expected = run(0, train)
        assert same(expected, run(1, train))
        assert same(expected, run(2, train))
    # Evaluation is the same at every epoch, also with a transform that draws.
    assert same(expected[: len(expected) // 2], expected[len(expected) // 2 :])


@pytest.mark.parametrize("workers", [0, 1])
def test_global_streams_are_left_alone(tmp_path, workers):
    images = encoded(tmp_path)
    seed_everything(3)
    expected = random.random(), np.random.rand(), torch.rand(())
    seed_everything(3)
    for transform in (None, own_transform):
        loader = Loader(images, PLAN, batch_size=6, train=True, seed=0, workers=workers, transform=transform)
        list(loader.epoch(0))
    assert (random.random(), np.random.rand(), torch.rand(())) == expected


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("transform", [None, own_transform])
def test_leaving_an_epoch_early_disturbs_no_later_one(workers, transform):
    options = {"batch_size": 5, "train": True, "seed": 0, "transform": transform}
    loader = Loader(resident(), PLAN, workers=workers, **options)
    expected = list(Loader(resident(), PLAN, **options).epoch(1))
    epoch = loader.epoch(0)
    next(epoch), next(epoch)
    epoch.close()
    assert same(loader.epoch(1), expected)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("transform", [None, own_transform])
def test_batches_have_the_layout_asked_for(memory_format, transform):
    loader = Loader(
        resident(), PLAN, batch_size=5, train=True, seed=0, memory_format=memory_format, transform=transform
    )
    batch = next(loader.epoch(0))
    assert batch.images.is_contiguous(memory_format=memory_format)
    assert (batch.images.dtype, batch.labels.dtype) == (torch.float32, torch.int64)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_is_one_line_from_any_process(tmp_path, workers):
    images = encoded(tmp_path)
    (tmp_path / "013.png").write_bytes(b"broken")
    loader = Loader(images, PLAN, batch_size=6, train=False, seed=0, workers=workers)
    batches = loader.epoch(0)
    next(batches), next(batches)
    with pytest.raises(UserError, match=r"013\.png: no image") as caught:
        next(batches)
    assert len(caught.value.problems) == 1
    assert "\n" not in caught.value.problems[0]
    # The loader can be used again.
    assert len(next(loader.epoch(0)).images) == 6
    loader.close()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_failing_transform_is_named_with_image_and_line(workers):
    loader = Loader(resident(), PLAN, batch_size=6, train=True, seed=0, workers=workers, transform=hasty_transform)
    with pytest.raises(UserError, match=r"input_transform .*made up, image \d+: KeyError: .*test_loader\.py:\d+"):
        next(loader.epoch(0))


def test_a_transform_that_gives_different_shapes_is_refused(tmp_path):
    loader = Loader(encoded(tmp_path), PLAN, batch_size=6, train=False, seed=0, transform=to_pixels)
    with pytest.raises(UserError, match="different shapes"):
        next(loader.epoch(0))


def worker_pids(loader: Loader) -> list[int]:
    assert loader._reading is not None
    return [worker.pid for worker in loader._reading._processes()]


def test_ctrl_c_and_what_asks_a_run_to_stop_leave_workers_alone(monkeypatch):
    """SLURM and launchers send signals to all processes of a run; the main one answers."""
    monkeypatch.setattr("norm_matters.datasets.reading.WORKER_TIMEOUT", 20)
    options = {"batch_size": 5, "train": True, "seed": 0, "transform": own_transform}
    with stopping.listening(*stopping.PREEMPTING):
        loader = Loader(resident(200), PLAN, workers=2, **options)
        batches = loader.epoch(0)
        got = [next(batches)]
        pids = worker_pids(loader)
        assert len(pids) == 2
        for pid in pids:
            for number in (signal.SIGINT, *stopping.PREEMPTING):
                os.kill(pid, number)
        got += batches
        assert worker_pids(loader) == pids
        assert same(got, Loader(resident(200), PLAN, **options).epoch(0))
        loader.close()
    assert all(not Path(f"/proc/{pid}").exists() for pid in pids)


@pytest.mark.parametrize("workers", [0, 2])
def test_who_is_asked_to_stop_waits_for_no_batch(workers):
    """Nobody waits for a slow disk until the scheduler kills the run; one image here takes a minute."""
    with stopping.listening(*stopping.PREEMPTING):
        loader = Loader(Trouble(5, "hang"), PLAN, batch_size=4, train=True, seed=0, workers=workers)
        begun = time.monotonic()
        batches = loader.epoch(0)
        if workers:
            threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM)).start()
        else:
            next(batches)
            os.kill(os.getpid(), signal.SIGTERM)
        try:
            with pytest.raises(stopping.StopRequestedError):
                list(batches)
            assert time.monotonic() - begun < 30
            assert worker_pids(loader) == []
        finally:
            loader.close()


def test_a_rank_that_is_asked_to_stop_gives_the_others_their_share_of_the_step():
    with stopping.listening(*stopping.PREEMPTING):
        os.kill(os.getpid(), signal.SIGTERM)
        loader = Loader(resident(40), PLAN, batch_size=10, train=True, seed=0, world=2, transform=to_pixels)
        assert len(list(loader.epoch(0))) == 4


@pytest.mark.parametrize(("kind", "words"), [("SIGKILL", "was killed by SIGKILL"), ("SIGSTOP", "timed out")])
def test_a_worker_that_dies_or_hangs_is_a_clear_error(monkeypatch, kind, words):
    monkeypatch.setattr("norm_matters.datasets.reading.WORKER_TIMEOUT", 2)
    loader = Loader(resident(400), PLAN, batch_size=5, train=True, seed=0, workers=2, transform=slow_transform)
    batches = loader.epoch(0)
    next(batches)
    pids = worker_pids(loader)
    threading.Timer(0.2, os.kill, (pids[0], getattr(signal, kind))).start()
    with pytest.raises(UserError, match=rf"data\.workers: 2: worker 0 \(process {pids[0]}\) {words}") as caught:
        list(batches)
    assert "\n" not in str(caught.value)
    # Nothing is left that could keep the process from ending.
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


@final
class Trouble(Images):
    """Images of which one never comes, or takes the process that reads it with it."""

    def __init__(self, bad: int, what: str) -> None:
        self.labels = np.zeros(24, dtype=np.int64)
        self.bad, self.what = bad, what

    def image(self, index: int) -> Image.Image:
        if index == self.bad and multiprocessing.parent_process() is not None:
            if self.what == "exit":
                os._exit(3)
            time.sleep(60)
        return Image.new("RGB", (8, 8))

    def name(self, index: int) -> str:
        return f"album, image {index}"

    def subset(self, indices: np.ndarray) -> Images:
        raise NotImplementedError

    def digest(self) -> str:
        return ""


@pytest.fixture
def no_handler_of_torchs():
    """torch leaves a handler behind once anybody in the process has used a DataLoader of its own with workers."""
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGCHLD, before)


@pytest.mark.usefixtures("no_handler_of_torchs")
@pytest.mark.parametrize("bad", [1, 5, 17])
@pytest.mark.parametrize(("what", "words"), [("exit", "exited with status 3"), ("hang", "timed out: no batch for 1 s")])
def test_the_worker_and_the_image_are_named(monkeypatch, what, words, bad):
    monkeypatch.setattr("norm_matters.datasets.reading.WORKER_TIMEOUT", 1)
    loader = Loader(Trouble(bad, what), PLAN, batch_size=4, train=False, seed=0, workers=2)
    # Batches of four are dealt out in turns.
    words = rf"data\.workers: 2: worker {bad // 4 % 2} \(process \d+\) {words}.* album, image {bad}(;|$)"
    before, handlers = signal.getsignal(signal.SIGCHLD), []

    def read_all() -> None:
        for _ in loader.epoch(0):
            # A death while nobody waits for a batch must not be thrown into the middle of somebody's step.
            handlers.append(signal.getsignal(signal.SIGCHLD))
            time.sleep(0.1)

    with pytest.raises(UserError, match=words) as caught:
        read_all()
    assert "\n" not in str(caught.value)
    assert len(handlers) <= bad // 4
    assert set(handlers) <= {before}
    # Nothing is left of the workers.
    assert worker_pids(loader) == []


@pytest.mark.usefixtures("no_handler_of_torchs")
def test_a_worker_that_dies_outside_an_image_is_named_alone(monkeypatch):
    loader = Loader(Trouble(-1, ""), PLAN, batch_size=4, train=False, seed=0, workers=1)
    batches = loader.epoch(0)
    next(batches)
    time.sleep(0.5)
    os.kill(worker_pids(loader)[0], signal.SIGKILL)
    time.sleep(0.2)
    with pytest.raises(UserError, match=r"worker 0 \(process \d+\) was killed by SIGKILL while it was busy; try"):
        list(batches)


def test_workers_live_from_epoch_to_epoch_and_end_on_demand():
    loader = Loader(resident(20), PLAN, batch_size=5, train=True, seed=0, workers=2, transform=own_transform)
    list(loader.epoch(0))
    pids = worker_pids(loader)
    list(loader.epoch(1))
    assert worker_pids(loader) == pids
    loader.close()
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def test_workers_are_chosen_from_the_cores(monkeypatch, tmp_path):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert [count_workers(cpu, cores) for cores in (1, 2, 4, 8, 200)] == [0, 1, 1, 2, 16]
    assert [count_workers(cuda, cores) for cores in (1, 2, 4, 8, 200)] == [0, 1, 3, 7, 16]
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(12)), raising=False)
    options = {"batch_size": 5, "train": True, "seed": 0, "workers": "auto"}
    assert Loader(encoded(tmp_path), PLAN, **options).workers == 3
    assert Loader(resident(), PLAN, transform=own_transform, **options).workers == 3
    # Images held in memory need none, whatever is said.
    assert Loader(resident(), PLAN, **options).workers == 0
    assert Loader(resident(), PLAN, **options | {"workers": 2}).workers == 0


def test_images_in_memory_are_not_copied_on_the_cpu():
    images = resident()
    loader = Loader(images, PLAN, batch_size=5, train=True, seed=0)
    list(loader.epoch(0))
    assert loader._pixels is not None
    assert loader._pixels.data_ptr() == images.pixels.data_ptr()


def test_images_that_do_not_fit_on_the_device_are_picked_in_memory(monkeypatch):
    expected = list(Loader(resident(), PLAN, batch_size=5, train=True, seed=0).epoch(0))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 10_000))
    cuda = torch.device("cuda")
    assert [has_room(cuda, needed) for needed in (250, 251)] == [True, False]
    assert has_room(torch.device("cpu"), 10**15)

    loader = Loader(resident(), PLAN, batch_size=5, train=True, seed=0, device="meta")
    monkeypatch.setattr(f"{Loader.__module__}.has_room", lambda device, needed: False)
    # On a device without values, only where things lie and how they look can be asked.
    for batch, other in zip(loader.epoch(0), expected, strict=True):
        assert (batch.images.device.type, batch.images.shape) == ("meta", other.images.shape)
        assert np.array_equal(batch.indices, other.indices)
    assert loader._pixels is not None
    assert loader._pixels.device.type == "cpu"


@pytest.mark.parametrize("room", [True, False])
def test_everything_ends_on_the_device(monkeypatch, tmp_path, room):
    monkeypatch.setattr(f"{Loader.__module__}.has_room", lambda device, needed: room)
    plan = replace(PLAN, cutout=3)
    for images in (resident(), encoded(tmp_path)):
        loader = Loader(images, plan, batch_size=5, train=True, seed=0, device="meta")
        batch = next(loader.epoch(0))
        assert (batch.images.device.type, batch.labels.device.type) == ("meta", "meta")
        assert batch.images.is_contiguous(memory_format=torch.channels_last)


def test_large_jpegs_are_drafted_in_training_only(tmp_path, monkeypatch):
    make_photo(640, 480, seed=0).save(tmp_path / "a.jpg", quality=90)
    images = EncodedImages(["a.jpg"], np.array([0]), root=tmp_path)
    sizes = []
    monkeypatch.setattr(JpegImageFile, "load_end", lambda self: sizes.append(self.size), raising=False)
    plan = Preprocessing(3, 32, (0.5,) * 3, (0.2,) * 3, "inception", 0, True, 37, draft=True)
    for train, draft in ((True, True), (True, False), (False, True)):
        loader = Loader(images, replace(plan, draft=draft), batch_size=1, train=train, seed=0)
        (first,), (again,) = list(loader.epoch(0)), list(loader.epoch(0))
        assert torch.equal(first.images, again.images)
    full = (640, 480)
    assert sizes[0] == sizes[1] != full
    assert sizes[2:] == [full] * 4


def test_more_workers_than_cores_is_no_warning(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0}, raising=False)
    Loader(resident(), PLAN, batch_size=5, train=True, seed=0, workers=3)


def test_cifar_sized_batches_are_fast_enough():
    pixels = torch.zeros(2000, 3, 32, 32, dtype=torch.uint8)
    plan = Preprocessing(3, 32, (0.5,) * 3, (0.2,) * 3, "pad", 4, True, 32)
    images = ResidentImages(pixels, np.zeros(2000), title="blank")
    loader = Loader(images, plan, batch_size=128, train=True, seed=0)
    times, start = [], time.thread_time()
    for _ in loader.epoch(0):
        times.append(time.thread_time() - start)
        start = time.thread_time()
    # 3 ms of processor time; the bound is for a loaded machine.
    assert min(times) < 0.01
