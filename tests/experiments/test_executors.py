"""Executors: what they ask their machines for, what they make of missing ones, and how they end."""

import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from norm_matters.core.config import RunConfig
from norm_matters.core.errors import StorageError, UserError
from norm_matters.experiments.cells import Cell
from norm_matters.experiments.executors import Placement, make_executor
from norm_matters.experiments.executors.base import LOST, Task, first_line, run_task, spawn, thread_variables
from norm_matters.experiments.executors.inline import InlineExecutor
from norm_matters.experiments.executors.local import LocalExecutor
from norm_matters.experiments.executors.slurm import SlurmExecutor, submitit_options

# Stands for the launcher: a module that tells its environment and arguments, and ends on Ctrl-C with 130.
LAUNCHER = """
import os, signal, sys, time
print(os.environ["OMP_NUM_THREADS"], os.environ.get("CUDA_VISIBLE_DEVICES"), flush=True)
print(*sys.argv[1:], flush=True)
if "wait" in sys.argv:
    try:
        time.sleep(60)
    except KeyboardInterrupt:
        sys.exit(130)
sys.exit(int(sys.argv[-1]))
"""
# Holds a lock, says so, and waits for the end of its input.
HOLD = """
import sys
from pathlib import Path
from norm_matters.experiments.locks import hold
assert hold(Path(sys.argv[1])) is None
print("held", flush=True)
sys.stdin.read()
"""
# Runs the launcher as a function, for a run that is done, and tells where it is then.
PINNED = """
import os, signal, sys
from norm_matters.experiments.start import main
signal.signal(signal.SIGINT, signal.SIG_IGN)  # as background shells do
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})  # as ray does
print(main(["--parent", str(os.getppid()), *sys.argv[1:]]), sorted(os.sched_getaffinity(0)))
print(signal.getsignal(signal.SIGINT) == signal.SIG_DFL, signal.pthread_sigmask(signal.SIG_BLOCK, []))
"""
# A parent with a child that is tied to it, and that tells when it is interrupted.
TIED = """
import os, subprocess, sys, time
from pathlib import Path
from norm_matters.experiments.start import _tie_to_parent
told = Path(sys.argv[1])
if sys.argv[2] == "child":
    assert _tie_to_parent(os.getppid())
    told.write_text("ready")
    try:
        time.sleep(60)
    except KeyboardInterrupt:
        told.write_text("interrupted")
else:
    subprocess.run([sys.executable, __file__, sys.argv[1], "child"])
"""
# A stand-in for SLURM: a queue of one place, run by the shell.
SBATCH = """#!/bin/sh
[ -n "$REFUSE" ] && echo "sbatch: error: invalid partition" >&2 && exit 1
export SLURM_JOB_ID=77 SLURM_NTASKS=1 SLURM_JOB_NUM_NODES=1 SLURM_NODEID=0 SLURM_PROCID=0 SLURM_LOCALID=0
sh "$1" >/dev/null 2>&1 &
echo "Submitted batch job 77"
"""
SRUN = """#!/bin/sh
while [ "${1#--}" != "$1" ]; do [ "$1" = --unbuffered ] && shift || shift 2; done
exec "$@"
"""


@pytest.fixture
def launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces the process of a run."""
    (tmp_path / "stand_in.py").write_text(LAUNCHER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr("norm_matters.experiments.executors.base.LAUNCHER", "stand_in")


@pytest.fixture
def task(tmp_path: Path) -> Callable[..., Task]:
    def make(*arguments: str, name: str = "a", threads: int = 1) -> Task:
        return Task(name, arguments, thread_variables(threads), str(tmp_path / "logs" / f"{name}.txt"), str(tmp_path))

    return make


def wait_for(condition: Callable[[], Any], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def text(task: Task) -> str:
    path = Path(task.log)
    return path.read_text() if path.exists() else ""


@pytest.mark.usefixtures("launcher")
def test_local_processes_have_cores_and_threads_of_their_own(task: Callable[..., Task]) -> None:
    cores = sorted(os.sched_getaffinity(0))
    executor = LocalExecutor(jobs=len(cores), threads=1, cores=cores)
    tasks = [task("0", name=str(core)) for core in cores]
    jobs = [executor.start(each) for each in tasks]
    wait_for(lambda: all(job.status() == 0 for job in jobs))
    for core, each in zip(cores, tasks, strict=True):
        environment, arguments = text(each).splitlines()
        assert environment == "1 None"
        assert f" --cores {core} 0" in arguments
    again = task("3", name="again", threads=7)
    job = executor.start(again)
    wait_for(lambda: job.status() is not None)
    assert job.status() == 3
    assert text(again).startswith("7 None")
    assert f" --cores {cores[0]} 3" in text(again)  # the first slot is free again
    executor.close()


@pytest.mark.usefixtures("launcher")
def test_more_processes_than_cores_are_not_pinned_and_gpus_are_dealt_out(task: Callable[..., Task]) -> None:
    cores = sorted(os.sched_getaffinity(0))
    executor = LocalExecutor(jobs=3, threads=len(cores), cores=cores, gpus=["0", "GPU-b"])
    tasks = [task("0", name=str(number)) for number in range(3)]
    jobs = [executor.start(each) for each in tasks]
    wait_for(lambda: all(job.status() == 0 for job in jobs))
    assert [text(each).splitlines()[0].split()[-1] for each in tasks] == ["0", "GPU-b", "0"]
    assert not any("--cores" in text(each) for each in tasks)


@pytest.mark.usefixtures("launcher")
def test_processes_that_leave_cores_to_others_are_not_pinned(task: Callable[..., Task]) -> None:
    first, _ = LocalExecutor(jobs=1, threads=1, cores=[0, 1]), LocalExecutor(jobs=1, threads=1, cores=[0, 1])
    each = task("0")
    job = first.start(each)
    wait_for(lambda: job.status() == 0)
    assert "--cores" not in text(each)


@pytest.mark.usefixtures("launcher")
def test_closing_stops_what_an_interrupt_has_made_nobodys(task: Callable[..., Task]) -> None:
    executor, waiting = LocalExecutor(jobs=1, threads=1, cores=[0]), task("wait", "0")
    job = executor.start(waiting)
    wait_for(lambda: text(waiting).count("\n") == 2)
    executor.close()
    assert job.status() == 130


@pytest.mark.usefixtures("launcher")
def test_stopping_interrupts_once_and_waits(task: Callable[..., Task]) -> None:
    executor = LocalExecutor(jobs=2, threads=1, cores=[0])
    waiting, done = task("wait", "0", name="waiting"), task("0", name="done")
    jobs = [executor.start(waiting), executor.start(done)]
    wait_for(lambda: text(waiting).count("\n") == 2 and jobs[1].status() == 0)
    executor.stop(jobs)
    assert [job.status() for job in jobs] == [130, 0]
    executor.close()


@pytest.mark.usefixtures("launcher")
def test_a_task_runs_to_its_end_and_is_interrupted_with_its_caller(task: Callable[..., Task], tmp_path: Path) -> None:
    plain = ("a", ["5"], {"OMP_NUM_THREADS": "1"}, str(tmp_path / "log.txt"), str(tmp_path))
    assert run_task(*plain) == 5
    caller = tmp_path / "caller.py"
    caller.write_text(
        "from norm_matters.experiments.executors import base\n"
        "base.LAUNCHER = 'stand_in'\n"
        f"base.run_task('a', ['wait', '0'], {{'OMP_NUM_THREADS': '1'}}, 'b.txt', {str(tmp_path)!r})\n"
    )
    process = subprocess.Popen([sys.executable, str(caller)], stderr=subprocess.PIPE, cwd=tmp_path)
    wait_for(lambda: (tmp_path / "b.txt").exists() and (tmp_path / "b.txt").read_text().count("\n") == 2)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=20)
    assert b"KeyboardInterrupt" in error


def test_the_launcher_goes_with_its_parent(task: Callable[..., Task], tmp_path: Path) -> None:
    # A parent that is not this process stands for one that has died before the launcher looked.
    arguments = ["--parent", "1", "--epochs", "1", "--lock", str(tmp_path / "lock"), str(tmp_path / "run")]
    done = subprocess.run([sys.executable, "-m", "norm_matters.experiments.start", *arguments])
    assert done.returncode == 130
    assert not (tmp_path / "lock").exists()


def test_the_launcher_leaves_runs_alone_that_are_in_use(task: Callable[..., Task], tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with holder:
        assert holder.stdout
        holder.stdout.readline()
        run = task("--epochs", "1", "--lock", str(tmp_path / "lock"), str(tmp_path / "run"))
        assert spawn(run).wait() == 73
        assert f"is in use by process {holder.pid} on " in text(run)
        holder.kill()


def test_the_launcher_takes_its_cores_and_leaves_a_finished_run_alone(
    tmp_path: Path, make_run: Callable[..., Path]
) -> None:
    folder = make_run(tmp_path, Cell("run", RunConfig(), {}), [50.0, 40.0])
    core = max(os.sched_getaffinity(0))
    arguments = ["--cores", str(core), "--epochs", "2", "--lock", str(tmp_path / "lock"), str(folder)]
    done = subprocess.run([sys.executable, "-c", PINNED, *arguments], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == (f"0 [{core}]\nTrue set()\n", "")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells children of their parent's death")
def test_a_training_is_interrupted_when_its_sweep_is_killed(tmp_path: Path) -> None:
    script, told = tmp_path / "tied.py", tmp_path / "told"
    script.write_text(TIED)
    parent = subprocess.Popen([sys.executable, str(script), str(told), "parent"])
    wait_for(lambda: told.exists() and told.read_text() == "ready")
    parent.kill()
    parent.wait()
    wait_for(lambda: told.read_text() == "interrupted")


@pytest.mark.parametrize(
    ("time_limit", "minutes"),
    [("90", 90), ("90:30", 91), ("4:00:00", 240), ("1-12", 2160), ("1-12:30", 2190), ("0-0:0:1", 1)],
)
def test_options_of_slurm_in_submitits_words(time_limit: str, minutes: int) -> None:
    found = submitit_options({"partition": "gpu", "mail_type": "END", "gpus_per_node": 1, "time": time_limit})
    assert found == {
        "gpus_per_node": 1,
        "timeout_min": minutes,
        "slurm_additional_parameters": {"partition": "gpu", "mail-type": "END"},
    }


def test_wrong_options_of_slurm(tmp_path: Path) -> None:
    pytest.importorskip("submitit")
    with pytest.raises(UserError, match="--slurm time: value 'soon'"):
        submitit_options({"time": "soon"})
    with pytest.raises(UserError, match="a run of a sweep is one process"):
        submitit_options({"ntasks-per-node": 2})
    with pytest.raises(UserError, match="it takes slurm or local"):
        make_executor(Placement("slurm", slurm={"cluster": "moon"}), [], tmp_path)
    with pytest.raises(UserError, match="gpus_per_node"):
        make_executor(Placement("slurm", slurm={"cluster": "local", "gpus_per_node": "two"}), [], tmp_path)


@pytest.mark.parametrize(("executor", "library"), [("slurm", "submitit"), ("ray", "ray")])
def test_a_library_that_is_not_installed_is_named(
    executor: str, library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(UserError, match=rf"{library} is not installed; pip install 'norm-matters\[{executor}\]'"):
        make_executor(Placement(executor), [], tmp_path)


@pytest.mark.usefixtures("launcher")
def test_jobs_of_slurm(task: Callable[..., Task], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("submitit")
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, script in {"sbatch": SBATCH, "srun": SRUN, "sacct": "#!/bin/sh\n", "scancel": "#!/bin/sh\n"}.items():
        (commands / name).write_text(script)
        (commands / name).chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{commands}:{os.environ['PATH']}")
    executor = SlurmExecutor(folder=tmp_path / "slurm", jobs=None, threads=3, options={"partition": "gpu"})
    # What a job runs is found by name in a fresh process, which has the real launcher: it finds its run done.
    job = executor.start(task("--help"))
    wait_for(lambda: job.status() is not None, seconds=60)
    assert job.status() == 0
    assert "usage: norm_matters.experiments.start" in text(task("--help"))
    submission = (tmp_path / "slurm" / "77_submission.sh").read_text()
    assert {"#SBATCH --partition=gpu", "#SBATCH --cpus-per-task=3"} <= set(submission.splitlines())
    monkeypatch.setenv("REFUSE", "1")
    with pytest.raises(UserError, match="invalid partition"):
        executor.start(task("0"))


def test_the_words_of_a_library_are_one_line(tmp_path: Path) -> None:
    assert [first_line(error) for error in (RuntimeError("a\nb"), RuntimeError(), ValueError("\n"))] == [
        "a",
        "RuntimeError",
        "ValueError",
    ]


def test_a_log_that_cannot_be_written_is_an_error_of_the_disk(task: Callable[..., Task], tmp_path: Path) -> None:
    (tmp_path / "logs").touch()
    with pytest.raises(StorageError, match="cannot write"):
        InlineExecutor(threads=1).start(task("0"))


def test_a_job_without_a_result_is_lost() -> None:
    from norm_matters.experiments.executors.slurm import SlurmJob

    class Cancelled:
        def done(self) -> bool:
            return True

        def result(self) -> int:
            raise RuntimeError("no result")

    assert SlurmJob(Cancelled()).status() == LOST
