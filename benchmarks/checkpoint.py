"""What saving costs: a checkpoint per epoch of resnet20 on CIFAR-10, and the bookkeeping of every step.

    python benchmarks/checkpoint.py [--data parquet:DIR] [--folder DIR]

A checkpoint's share of an epoch is the median time of a save over the time of the epoch's training, which is worked
out from the median step; the evaluation is left out of it, so that the share is an upper bound. A save is all that a
pause of the training does: gathering, writing, syncing, reading back, removing. The bookkeeping's share is the time
spent in asking whether to pause (signals, clocks, status.json, and with two ranks the exchange) over the time of all
steps, for resnet8 on the digits. Both parts of each share come from one run. Prints CSV.
"""

import argparse
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

STEPS = 48
SAVE_EVERY = 6
SMALL_STEPS = 400


def prepared(settings: list[str]):
    """A plan with these settings, joined with the other ranks."""
    from norm_matters.core.config import load_config
    from norm_matters.core.ranks import find_ranks
    from norm_matters.run import CHECKS, prepare

    return prepare(load_config(overrides=settings, checks=CHECKS), ranks=find_ranks())


def measure_saves(data: str, folder: Path) -> None:
    """The share of an epoch that a checkpoint takes."""
    from norm_matters.core.distributed import ALONE
    from norm_matters.engine.instruments.collect import Instruments
    from norm_matters.engine.loop import training_rows
    from norm_matters.keeping import Keeper
    from norm_matters.plan import step_options
    from norm_matters.record import RunLog
    from norm_matters.recording import Recorder

    plan = prepared(["model.name=resnet20", f"data.name={data}", f"train.checkpoint_every={SAVE_EVERY}st"])
    config, state = plan.config.train, plan.state
    keeper = Keeper(config, state, folder, started=time.monotonic(), recorded=0)
    instruments = Instruments(state)
    recorder = Recorder(plan, folder, ALONE, RunLog(folder / "log.txt"), keeper, instruments, best=None, recorded=0)
    rows = training_rows(
        state,
        train=plan.train,
        val=plan.val,
        options=step_options(config),
        instruments=instruments,
        attendant=keeper,
    )
    steps, saves = [], []
    before = 0.0
    for row in rows:
        assert row is None
        assert state.so_far is not None
        steps.append((state.so_far.seconds - before) / SAVE_EVERY)
        before, start = state.so_far.seconds, time.perf_counter()
        recorder.pause()
        saves.append(time.perf_counter() - start)
        if state.clock.step >= STEPS:
            break
    plan.train.close()
    # The first step, and the first save, meet cold caches.
    step, save = statistics.median(steps[1:]), statistics.median(saves[1:])
    epoch = step * len(plan.train)
    size = sum(path.stat().st_size for path in (folder / "checkpoints" / "last").iterdir())
    print(f"resnet20 step,ms,{1000 * step:.1f}")
    print(f"resnet20 epoch (training; {len(plan.train)} steps from {STEPS}),s,{epoch:.1f}")
    print(f"checkpoint,bytes,{size}")
    print(f"save (median of {len(saves) - 1}),ms,{1000 * save:.2f}")
    print(f"save (longest),ms,{1000 * max(saves[1:]):.2f}")
    print(f"a checkpoint per epoch,% of the epoch,{100 * save / epoch:.3f}", flush=True)


def measure_steps(folder: Path) -> None:
    """The share of a step that the bookkeeping takes; in a rank, with the exchange."""
    from norm_matters.core.joining import joined
    from norm_matters.engine.loop import Attendant, training_rows
    from norm_matters.keeping import Keeper
    from norm_matters.plan import step_options

    class Timed(Attendant):
        """Takes the time that another attendant takes."""

        def __init__(self, keeper: Keeper) -> None:
            self._keeper, self.seconds = keeper, list[float]()

        def after_step(self) -> bool:
            start = time.perf_counter()
            answer = self._keeper.after_step()
            self.seconds.append(time.perf_counter() - start)
            return answer

        def before_evaluation(self) -> None:
            self._keeper.before_evaluation()

        def leaves_evaluation(self) -> bool:
            return self._keeper.leaves_evaluation()

    with joined() as group:
        epochs = f"train.epochs={SMALL_STEPS // 22 + 1}"
        plan = prepared(["model.name=resnet8", "data.batch_size=64", "train.max_time=1h", epochs])
        plan.state.join(group, seed=0)
        timed = Timed(Keeper(plan.config.train, plan.state, folder, started=time.monotonic(), recorded=0))
        spent = 0.0
        for row in training_rows(
            plan.state,
            train=plan.train,
            val=plan.val,
            options=step_options(plan.config.train),
            attendant=timed,
        ):
            assert row is not None
            spent += row["seconds"] - row["val_seconds"]
            timed._keeper.due_after_epoch()
        if group.first:
            name = f"{group.world} process{'es' if group.world > 1 else ''}"
            each = sum(timed.seconds) / len(timed.seconds)
            print(f"resnet8 step ({name}),ms,{1000 * spent / len(timed.seconds):.2f}")
            print(f"bookkeeping of a step ({name}),us,{1e6 * each:.1f}")
            print(f"bookkeeping of a step (median; {name}),us,{1e6 * statistics.median(timed.seconds):.1f}")
            print(f"bookkeeping ({name}),% of the step,{100 * sum(timed.seconds) / spent:.3f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="parquet:../shared/data/cifar10-jpeg", help="images of 32 x 32")
    parser.add_argument("--folder", help="where to write; the disk counts")
    parser.add_argument("--steps", action="store_true", help="only the bookkeeping, as a rank or alone")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        if arguments.steps:
            measure_steps(Path(folder))
            return
        print("quantity,unit,value", flush=True)
        measure_saves(arguments.data, Path(folder))
    for world in (1, 2):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        places = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(world)] if world > 1 else [{}]
        shared = {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1"}
        shared |= {"MASTER_PORT": port, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"}
        command = [sys.executable, __file__, "--steps"]
        started = [subprocess.Popen(command, env=os.environ | (shared | place if place else {})) for place in places]
        # All of them, whatever the first says.
        if max(process.wait() for process in started):
            raise SystemExit("a rank failed")


if __name__ == "__main__":
    main()
