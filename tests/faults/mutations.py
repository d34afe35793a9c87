"""What may be broken on purpose in a run, to see that the harness notices; each is made in the forked child alone."""

import itertools
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

PRIMITIVES = ("open", "write", "fsync", "replace", "rename", "mkdir", "makedirs", "symlink", "link", "unlink", "rmdir")


def mutate(names: str) -> None:
    """Break something, for the rest of this process; `NAME` or `NAME:ARGUMENT`, several with commas between."""
    for entry in names.split(","):
        name, _, argument = entry.partition(":")
        MUTATIONS[name](*filter(None, [argument]))


def save_in_place() -> None:
    """A checkpoint is written under its own name, not renamed when it is complete."""
    from norm_matters.record import files

    def write_folder(path: Path, contents: Mapping[str, bytes]) -> None:
        path.mkdir(exist_ok=True)
        for name, data in contents.items():
            with (path / name).open("wb") as stream:
                stream.write(data[: len(data) // 2])
                stream.flush()
                time.sleep(0.003)
                stream.write(data[len(data) // 2 :])

    files.write_folder = write_folder


def write_in_place() -> None:
    """A file is replaced by writing over it."""
    from norm_matters.record import checkpoint, files, provenance, table

    def write_file(path: Path, data: bytes | str) -> None:
        content = data.encode() if isinstance(data, str) else data
        with path.open("wb") as stream:
            stream.write(content[: len(content) // 2])
            stream.flush()
            time.sleep(0.02)
            stream.write(content[len(content) // 2 :])

    for module in (files, checkpoint, provenance, table):
        if hasattr(module, "write_file"):
            module.write_file = write_file  # type: ignore[attr-defined]


def forget_random_streams() -> None:
    """A resumed run begins with new random streams."""
    from norm_matters.engine import state

    _replace(state, "restore_own_rng", lambda *arguments, **options: None)


def forget_momentum() -> None:
    """A resumed run begins with an optimizer that has no history."""
    from norm_matters.regimes import RegimeOptimizer

    _replace(RegimeOptimizer, "load", lambda *arguments: None)


def draw_pages() -> None:
    """Nothing is broken: the report is drawn in full."""
    from norm_matters.report import single

    single.run_page = single.drawn_page  # type: ignore[attr-defined]


def turn_the_clock_back() -> None:
    """Nothing is broken but the clock on the wall, which goes backwards, an hour at each look."""
    import datetime

    real, looks = datetime.datetime, itertools.count(1)

    class Backwards(real):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return real.now(tz) - datetime.timedelta(hours=next(looks))

    wall = time.time
    time.time = lambda: wall() - 3600 * next(looks)
    for name, module in list(sys.modules.items()):
        if name.startswith("norm_matters.") and getattr(module, "datetime", None) is real:
            module.datetime = Backwards  # type: ignore[attr-defined]


def fill_the_disk(free: str) -> None:
    """After the first step of this process, somebody takes all of the disk but a few kilobytes."""
    from norm_matters import run

    begin = run.Recorder.pause

    def pause(recorder: Any) -> None:
        place = recorder._folder.parents[1] / "filling"
        if not place.exists():
            with place.open("wb") as stream:
                stream.write(bytes(int(free) - 8192))
        begin(recorder)

    run.Recorder.pause = pause


def spoil(what: str) -> None:
    """Before the fifth step of a run, something is not a number any more."""
    import torch

    from norm_matters.engine import loop

    step, nan = loop.train_step, float("nan")

    def train_step(state: Any, *arguments: Any, **options: Any) -> Any:
        if state.clock.step == 4:
            layer, norm = state.module[0], state.module[1]
            with torch.no_grad():
                if what == "weight":
                    layer.weight[0, 0, 0, 0] = nan
                elif what == "statistic":
                    norm.running_var[0] = nan
                elif what == "momentum":
                    state.optimizer.tensors()["0.weight/momentum_buffer"].view(-1)[0] = nan
            if what == "gradient":
                layer.weight.register_hook(lambda gradient: gradient * nan)
            if what == "activation":
                norm.register_forward_hook(lambda module, inputs, output: output * nan)
        return step(state, *arguments, **options)

    loop.train_step = train_step


def remove_folder(path: str) -> None:
    """After the first step of this process, a folder is gone."""
    import shutil

    from norm_matters.engine import loop

    step = loop.train_step

    def train_step(*arguments: Any, **options: Any) -> Any:
        result = step(*arguments, **options)
        shutil.rmtree(path, ignore_errors=True)
        return result

    loop.train_step = train_step


def keep_later_rows() -> None:
    """A resumed run does not bring its table back to the checkpoint."""
    from norm_matters import resuming

    _replace(resuming, "trim_table", lambda *arguments: None)


def remove_before_saving() -> None:
    """The old checkpoints are removed before the new one is there."""
    import shutil

    from norm_matters import recording

    save = recording.save_checkpoint

    def save_checkpoint(folder: Path, **options: Any) -> Any:
        for old in (folder / "checkpoints").glob("step-*"):
            shutil.rmtree(old)
        return save(folder, **options)

    recording.save_checkpoint = save_checkpoint


def die_at(n: str) -> None:
    """The process is killed before its n-th call that touches the disk, of those in `record.files`."""
    from norm_matters.record import files

    files.os = _Counting(int(n))  # type: ignore[assignment]


class _Counting:
    """Stands in for `os` in record.files."""

    def __init__(self, n: int) -> None:
        self.n, self.calls = n, 0

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        if name not in PRIMITIVES:
            return real

        def primitive(*arguments: Any, **options: Any) -> Any:
            self.calls += 1
            if self.calls == self.n:
                if name == "write":
                    os.write(arguments[0], bytes(arguments[1][: len(arguments[1]) // 2]))
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **options)

        return primitive


def _replace(owner: Any, name: str, value: Any) -> None:
    assert hasattr(owner, name), f"{owner} has no '{name}' any more: this mutation breaks nothing"
    setattr(owner, name, value)


MUTATIONS: dict[str, Callable[..., None]] = {
    function.__name__.replace("_", "-"): function
    for function in (
        save_in_place,
        write_in_place,
        forget_random_streams,
        forget_momentum,
        draw_pages,
        fill_the_disk,
        keep_later_rows,
        remove_before_saving,
        remove_folder,
        turn_the_clock_back,
        spoil,
        die_at,
    )
}
