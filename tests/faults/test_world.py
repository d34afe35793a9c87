"""Faults of the world around a run: who else writes there, what becomes of its data, its machine, and its numbers."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from norm_matters.record import find_checkpoint, load_checkpoint, read_table
from norm_matters.record.lock import LOCK_FILE, holder

EVERY = "train.checkpoint_every=3st"


def run_of(folder: Path) -> Path:
    return folder / "runs" / "run"


def log_of(folder: Path) -> str:
    return (run_of(folder) / "log.txt").read_text()


@pytest.fixture(scope="module")
def expected(zygote, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Digests of a run that nobody disturbs."""
    folder = tmp_path_factory.mktemp("whole")
    zygote.train(folder, EVERY)
    return zygote.ask("fingerprint", run=run_of(folder))


@pytest.fixture
def cut_off(zygote, tmp_path: Path) -> Path:
    """A folder with a run that was killed half-way."""
    zygote.train(tmp_path, EVERY, faults="step:0:14:kill", status=-9)
    return tmp_path


def check_race(zygote, folder: Path, starters: int) -> None:
    found = zygote.ask("race", folder=folder, starters=starters)
    assert sorted(starter["status"] for starter in found) == [0] + [73] * (starters - 1), found
    for starter in found:
        if starter["status"] == 73:
            assert re.search(
                r"error: '.*/runs/run' is in use by (process \d+ on \S+ since \S+Z|another process)\n", starter["text"]
            )


def test_of_many_that_resume_a_run_one_does(zygote, cut_off: Path, expected: dict[str, str]) -> None:
    check_race(zygote, cut_off, 4)
    assert zygote.ask("fingerprint", run=run_of(cut_off)) == expected
    assert holder(run_of(cut_off) / LOCK_FILE) is None


@pytest.mark.slow
@pytest.mark.parametrize("starters", [2, 3, 4])
def test_of_many_that_resume_a_run_one_does_always(starters: int, zygote, tmp_path: Path) -> None:
    for number in range(7):
        folder = tmp_path / str(number)
        folder.mkdir()
        zygote.train(folder, EVERY, faults="step:0:14:kill", status=-9)
        check_race(zygote, folder, starters)


def test_a_run_that_moved_goes_on_where_it_is(zygote, cut_off: Path, expected, tmp_path_factory) -> None:
    new = tmp_path_factory.mktemp("elsewhere")
    (new / "runs").mkdir()
    shutil.move(run_of(cut_off), run_of(new))
    shutil.rmtree(cut_off / "runs")
    zygote.train(new, resume=True)
    assert zygote.ask("fingerprint", run=run_of(new)) == expected
    assert not (cut_off / "runs").exists()


def test_a_clock_that_goes_backwards_changes_nothing(zygote, tmp_path: Path, expected: dict[str, str]) -> None:
    zygote.train(tmp_path, EVERY, faults="step:0:14:kill", status=-9, mutation="turn-the-clock-back")
    zygote.train(tmp_path, resume=True, mutation="turn-the-clock-back")
    assert zygote.ask("fingerprint", run=run_of(tmp_path)) == expected
    times = [line.split(" ")[0] for line in log_of(tmp_path).splitlines()]
    assert times != sorted(times), "the clock did not go backwards"


def test_a_disk_with_no_room_for_three_checkpoints_is_refused(zygote, tmp_path: Path) -> None:
    with mounted(tmp_path, "40k"):
        text = zygote.train(tmp_path, status=74)
        assert re.fullmatch(
            rf"error: {tmp_path}: 0\.0 MB are free, and 0\.1 MB are needed, for 3 checkpoints of 0\.0 MB each; make "
            r"room, or choose another --output\n",
            text,
        )
        assert not (tmp_path / "runs").exists()


class mounted:  # noqa: N801 (a context, named as one reads it)
    """Inside, a folder is a small file system of its own; skips the test where that is not allowed."""

    def __init__(self, folder: Path, size: str, *options: str) -> None:
        self.folder, self.options = folder, ",".join([f"size={size}", *options])

    def __enter__(self) -> None:
        command = ["mount", "-t", "tmpfs", "-o", self.options, "tmpfs", str(self.folder)]
        if os.geteuid() or not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("needs root and the right to mount")

    def __exit__(self, *error: object) -> None:
        subprocess.run(["umount", "-l", str(self.folder)], check=True)


def test_a_disk_that_fills_up_meanwhile_keeps_what_there_is(zygote, tmp_path: Path, expected: dict[str, str]) -> None:
    """For real: a file system that others fill up between two parts of the run."""
    with mounted(tmp_path, "400k"):
        zygote.train(tmp_path, EVERY, faults="step:0:8:kill", status=-9)
        before = load_checkpoint(find_checkpoint(run_of(tmp_path), prefer="last")).step
        free = shutil.disk_usage(tmp_path).free
        text = zygote.train(tmp_path, resume=True, status=74, mutation=f"fill-the-disk:{free}")
        assert "No space left on device (" in text
        assert load_checkpoint(find_checkpoint(run_of(tmp_path), prefer="last")).step >= before
        (tmp_path / "filling").unlink()
        zygote.train(tmp_path, resume=True)
        assert zygote.ask("fingerprint", run=run_of(tmp_path)) == expected


def test_a_folder_that_is_read_only_is_told(zygote, cut_off: Path, expected: dict[str, str]) -> None:
    with mounted_read_only(run_of(cut_off)):
        text = zygote.train(cut_off, resume=True, status=74)
        assert re.search(r"error: cannot write .*/run/.*: Read-only file system\n", text)
    zygote.train(cut_off, resume=True)
    assert zygote.ask("fingerprint", run=run_of(cut_off)) == expected


class mounted_read_only(mounted):  # noqa: N801
    """Inside, a folder cannot be written to."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __enter__(self) -> None:
        bind = ["mount", "--bind", str(self.folder), str(self.folder)]
        if os.geteuid() or not shutil.which("mount") or subprocess.run(bind, capture_output=True).returncode:
            pytest.skip("needs root and the right to mount")
        subprocess.run(["mount", "-o", "remount,ro,bind", str(self.folder)], check=True)


def test_numbers_that_are_not_finite_end_the_run_and_the_weights_are_kept(zygote, tmp_path: Path, expected) -> None:
    text = zygote.train(tmp_path, EVERY, faults="step:0:14:nan", status=76)
    assert "error: the training loss is not finite in epoch 2, step 14: the images are not finite" in text
    checkpoint = load_checkpoint(find_checkpoint(run_of(tmp_path), prefer="last"))
    assert checkpoint.step == 12
    assert all(tensor.isfinite().all() for tensor in checkpoint.model.values() if tensor.is_floating_point())
    zygote.train(tmp_path, resume=True)
    assert zygote.ask("fingerprint", run=run_of(tmp_path)) == expected


@pytest.mark.parametrize(
    ("site", "words"),
    [
        ("weight", "step 5: the parameter '0.weight' is not finite"),
        ("activation", "step 5: the first output that is not finite is that of layer '1'"),
        (
            "gradient",
            "a gradient is not finite in epoch 1, step 5: the forward pass is finite; the gradient of '0.weight'",
        ),
        ("momentum", "step 6: the parameter '0.weight' is not finite"),
        (
            "statistic",
            "the network is not finite after step 6, and not saved: '1.running_var': 1 of 8 values not finite",
        ),
    ],
)
def test_wherever_it_begins_it_is_found_and_named(site: str, words: str, zygote, tmp_path: Path) -> None:
    text = zygote.train(tmp_path, EVERY, mutation=f"spoil:{site}", status=76, epochs=1)
    assert words in text
    (kept,) = (run_of(tmp_path) / "checkpoints").glob("step-*")
    checkpoint = load_checkpoint(kept)
    assert checkpoint.step == 3
    assert all(tensor.isfinite().all() for tensor in checkpoint.model.values() if tensor.is_floating_point())
    zygote.train(tmp_path, resume=True)


def test_one_ranks_numbers_end_all(zygote, tmp_path: Path) -> None:
    text = zygote.train(tmp_path, EVERY, faults="step:1:5:nan", status=76, ranks=2)
    assert text.count("error: ") == 1
    assert "the training loss is not finite in epoch 1, step 5: on rank 1, the images are not finite" in text


def test_a_batch_without_memory_is_taken_in_pieces_and_the_log_says_so(zygote, tmp_path: Path) -> None:
    whole, small = tmp_path / "whole", tmp_path / "small"
    for folder, faults in ((whole, ""), (small, "step:0:3:oom,eval:0:2:oom")):
        folder.mkdir()
        zygote.train(folder, "model.norm=group:groups=4", faults=faults)
    assert "step 3: no memory for 128 images at once; they are taken in 2 pieces from here on" in log_of(small)
    for one, other in zip(*(read_table(run_of(folder) / "results.csv") for folder in (whole, small)), strict=True):
        # Dropout draws otherwise in pieces, and so the runs part.
        assert one["val_loss"] == pytest.approx(other["val_loss"], rel=0.2)


def test_norms_over_the_batch_are_told_what_fits(zygote, tmp_path: Path) -> None:
    text = zygote.train(tmp_path, faults="step:0:3:oom", status=2)
    assert "error: data.batch_size: there is no memory on cpu for a step with 128 images at once" in text
    assert "64 images fit (tried): data.batch_size=64, or train.accumulate=2 for the same batch" in text
    zygote.train(tmp_path, resume=True)


def test_a_rank_without_memory_takes_its_part_in_pieces_and_nobody_hangs(zygote, tmp_path: Path) -> None:
    zygote.train(tmp_path, "model.norm=group:groups=4", faults="step:1:3:oom", ranks=2)
    assert "a rank has less memory than this one: all take chunks in 2 pieces from here on" in log_of(tmp_path)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory, image_folder: Path) -> Path:
    """A copy of the images, to be changed."""
    folder = tmp_path_factory.mktemp("photos") / "images"
    shutil.copytree(image_folder, folder)
    return folder


def settings_of(images: Path, workers: int = 2) -> list[str]:
    return [f"data.name=imagefolder:{images}", "data.input_size=16", "data.batch_size=50", f"data.workers={workers}"]


def test_a_worker_that_is_killed_is_named_and_the_run_goes_on(zygote, tmp_path: Path, photos: Path) -> None:
    more, whole = settings_of(photos), tmp_path / "whole"
    whole.mkdir()
    zygote.train(whole, EVERY, *settings_of(photos, workers=0))
    text = zygote.train(tmp_path, EVERY, *more, faults="data:0:37:kill", status=75)
    assert re.search(
        r"error: data\.workers: 2: worker \d \(process \d+\) was killed by SIGKILL while it was busy with "
        rf"{photos}/train/\S+; try fewer workers, which need less memory\n",
        text,
    )
    zygote.train(tmp_path, resume=True)
    digests = [zygote.ask("fingerprint", run=run_of(folder)) for folder in (whole, tmp_path)]
    assert digests[0] == digests[1]


def test_images_that_cannot_be_read_are_skipped_as_asked_and_listed(zygote, tmp_path: Path, photos: Path) -> None:
    bad = sorted((photos / "train").rglob("*.png"))[3::150]
    for path in bad:
        path.write_bytes(b"<html>404</html>")
    digests = []
    for workers in (0, 2):
        folder = tmp_path / str(workers)
        folder.mkdir()
        more = settings_of(photos, workers)
        if not workers:
            text = zygote.train(folder, *more, status=2)
            assert re.search(r"error: \S+\.png: no image of a known format", text)
            shutil.rmtree(folder / "runs")
        zygote.train(folder, "--bad-images", f"skip:{len(bad)}", *more, faults="step:0:12:kill", status=-9)
        zygote.train(folder, resume=True)
        digests.append(zygote.ask("fingerprint", run=run_of(folder)))
        listed = json.loads((run_of(folder) / "provenance.json").read_text())["unreadable_images"]
        assert sorted(entry["image"] for entry in listed) == sorted(map(str, bad))
        for path in bad:
            assert log_of(folder).count(f"warning: {path}: no image of a known format") == 1
    assert digests[0] == digests[1]
    folder = tmp_path / "few"
    folder.mkdir()
    text = zygote.train(folder, "--bad-images", "skip:1", *settings_of(photos, 0), status=2)
    assert re.search(r"error: data\.bad_images: skip:1 allows 1, and [23] cannot be read: ", text)


def test_data_that_changed_since_is_named(zygote, tmp_path: Path, image_folder: Path) -> None:
    images = tmp_path / "images"
    shutil.copytree(image_folder, images)
    zygote.train(tmp_path, EVERY, *settings_of(images, 0), faults="step:0:7:kill", status=-9)
    gone = images / "train" / "class3" / "7.png"
    content = gone.read_bytes()
    gone.unlink()
    text = zygote.train(tmp_path, resume=True, status=2)
    assert "its train part has 399 images instead of 400" in text
    gone.write_bytes(content + b"x")
    text = zygote.train(tmp_path, resume=True, status=2)
    assert "its train part has as many images, of other names, sizes, labels or contents" in text
    shutil.move(images, tmp_path / "moved")
    text = zygote.train(tmp_path, resume=True, status=2)
    assert f"{images} is no folder" in text


def test_data_that_goes_away_meanwhile_is_named(zygote, tmp_path: Path, image_folder: Path) -> None:
    images = tmp_path / "images"
    shutil.copytree(image_folder, images)
    text = zygote.train(tmp_path, EVERY, *settings_of(images, 0), mutation=f"remove-folder:{images}", status=2)
    assert re.search(rf"error: {images}/train/class\d/\d+\.png: the image cannot be read: No such file", text)


@pytest.mark.slow
@pytest.mark.parametrize(("size", "status"), [("16k", 2), ("1m", 0)])
def test_a_small_shared_memory_is_enough_or_is_told(size: str, status: int, tmp_path: Path, photos: Path) -> None:
    """Batches come through pipes; only the locks of workers lie there."""
    more = [*settings_of(photos), f"output={tmp_path / 'runs'}", "train.epochs=1", "--model", "resnet8"]
    run = f"exec {sys.executable} -m norm_matters train {' '.join(more)}"
    command = ["unshare", "-m", "sh", "-c", f"mount -t tmpfs -o size={size} tmpfs /dev/shm && {run}"]
    if os.geteuid() or subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("needs root and the right to mount")
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == status, done.stderr
    told = "error: data.workers: 2: there is no room in /dev/shm for the locks of workers; give it a megabyte "
    assert done.stderr.startswith(told if status else "")
    assert done.stderr.count("\n") == bool(status)
    assert (tmp_path / "runs").exists() == (not status)
