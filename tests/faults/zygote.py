"""A process that has imported everything and forks runs: a kill costs about a second of CPU time instead of ten.

    python tests/faults/zygote.py

It answers requests, a line of JSON each, from standard input: {"id": N, "job": NAME, ...} with a name of `serve`'s
table and the arguments of that function. Answers, a line of JSON each with the same id, go to standard output. Training
happens in forked children only: whoever has run a backward pass has threads, which do not survive a fork.
"""

import json
import os
import resource
import signal
import socket
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import oracle
from mutations import mutate

from norm_matters.cli import main
from norm_matters.core.ranks import die_with_the_launcher

MODEL = """
from torch import nn


def model(num_classes, in_channels):
    return nn.Sequential(
        nn.Conv2d(in_channels, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.2),
        nn.Conv2d(8, 16, 3), nn.BatchNorm2d(16), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, num_classes),
    )
"""
PHASES = "[{epoch: 0, optimizer: SGD, lr: 0.1, momentum: 0.9, weight_decay: 1e-4}, {epoch: 2, lr: 0.03}]"
SETTINGS = (
    "model.norm=l1",
    "data.workers=0",
    "data.batch_size=128",
    f"regime.phases={PHASES}",
    "deterministic=true",
    "device=cpu",
    "name=run",
)
"""Of a run that takes half a second, in which random streams, momentum, statistics and the schedule count."""
RANK_TIMEOUT = 12.0
"""Seconds that ranks wait for each other."""
IMPORTED = (
    "sklearn.datasets",
    "torch._dynamo",
    "torch.distributed",
    "torch.nn.parallel",
    "torch.testing",
    "norm_matters.engine.instruments.collect",
    "norm_matters.report.single",
)


def settings(place: Path, output: Path, *, epochs: int) -> list[str]:
    """The arguments of `train` for a run in `output/run`; `place` has the network's file."""
    return [f"model.name={place / 'own.py'}", f"output={output}", f"train.epochs={epochs}", *SETTINGS]


class Child:
    """A forked process that runs `norm-matters ARGUMENTS`.

    Args:
        text: file that its standard output and error are appended to.
        environment: variables to set.
        mutation: what to break in it; see `mutations`.
        limits: name of a resource limit without RLIMIT_ -> its value.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        text: Path,
        *,
        environment: Mapping[str, str] | None = None,
        mutation: str | None = None,
        limits: Mapping[str, int] | None = None,
    ) -> None:
        self.status: int | None = None
        self.ended = 0.0
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid:
            return
        status = 99
        try:
            # It would read our requests, and its answers are not ours.
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            descriptor = os.open(text, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            os.close(descriptor)
            die_with_the_launcher()
            os.environ.update(environment or {})
            for name, value in (limits or {}).items():
                kind = getattr(resource, f"RLIMIT_{name}")
                resource.setrlimit(kind, (value, resource.getrlimit(kind)[1]))
            if mutation:
                mutate(mutation)
            status = main(list(arguments))
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def poll(self) -> int | None:
        """Its exit status, minus the signal that ended it; None while it runs."""
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.status, self.ended = os.waitstatus_to_exitcode(status), time.monotonic()
        return self.status

    def send(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)


def wait(children: Sequence[Child], seconds: float) -> bool:
    """Wait for all of them, so long at most; whether all have ended."""
    deadline = time.monotonic() + seconds
    while None in [child.poll() for child in children]:  # all are asked, so that each knows when it ended
        if time.monotonic() >= deadline:
            return False
        time.sleep(0.002)
    return True


def start(arguments: Sequence[str], text: Path, *, ranks: int = 1, **options: Any) -> list[Child]:
    """Start a run on so many ranks, each as torchrun would."""
    environment = {"OMP_NUM_THREADS": "1", **(options.pop("environment", None) or {})}
    if ranks == 1:
        return [Child(arguments, text, environment=environment, **options)]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    meeting = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1"}
    meeting |= {"MASTER_PORT": str(port), "TORCH_CPP_LOG_LEVEL": "ERROR", **environment}
    return [
        Child(arguments, text, environment={**meeting, "RANK": str(rank), "LOCAL_RANK": str(rank)}, **options)
        for rank in range(ranks)
    ]


def run(
    arguments: Sequence[str], text: str, *, seconds: float = 60, send: Any = None, **options: Any
) -> dict[str, Any]:
    """Run a command to its end.

    Args:
        seconds: after which its processes are killed.
        send: (seconds, rank, signal number) of a signal to send.
        options: of `start`.

    Returns:
        `statuses` of its processes (None for one that had to be killed), `seconds` it took, `text` it printed.
    """
    Path(text).unlink(missing_ok=True)
    begun = time.monotonic()
    children = start(arguments, Path(text), **options)
    if send:
        wait(children, send[0])
        children[send[1]].send(send[2])
    ended = wait(children, seconds)
    statuses = [child.poll() for child in children]
    for child in children:
        child.send(signal.SIGKILL)
    wait(children, 60)
    took = time.monotonic() - begun
    return {"statuses": statuses, "seconds": took, "ended": ended, "text": Path(text).read_text(errors="replace")}


def train(
    folder: str,
    *,
    more: Sequence[str] = (),
    epochs: int = 2,
    faults: str = "",
    resume: bool = False,
    environment: Mapping[str, str] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Train in `folder/runs/run`, or continue what is there.

    Args:
        more: further arguments.
        faults: see `norm_matters.core.faults`.
        options: of `run`.
    """
    place = Path(folder)
    if not (place / "own.py").exists():
        (place / "own.py").write_text(MODEL)
    arguments = ["--resume", str(place / "runs" / "run")] if resume else settings(place, place / "runs", epochs=epochs)
    given = {"NORM_MATTERS_FAULTS": faults, **(environment or {})}
    return run(["train", *arguments, *more], str(place / "text.txt"), environment=given, **options)


def race(folder: str, *, starters: int, **options: Any) -> list[dict[str, Any]]:
    """Start that many processes that all resume `folder/runs/run` at once; status and text of each."""
    arguments = ["train", "--resume", str(Path(folder) / "runs" / "run")]
    texts = [Path(folder) / f"starter-{number}.txt" for number in range(starters)]
    children = [start(arguments, text, **options)[0] for text in texts]
    wait(children, 120)
    return [{"status": child.poll(), "text": text.read_text()} for child, text in zip(children, texts, strict=True)]


def plain_page(run: Any) -> bytes:
    """The page of a run without its plots."""
    return f"<html>{run.name}: {run.last_epoch} epochs</html>".encode()


def warm() -> None:
    """Import whatever a run imports, and make what is made once: a run that has to do so makes no headway."""
    for name in IMPORTED:
        import_module(name)
    import torch

    from norm_matters.core import joining
    from norm_matters.core.config import load_config
    from norm_matters.models.trust import trust_file
    from norm_matters.report import single
    from norm_matters.run import CHECKS, prepare

    # To draw its page takes longer than the run: a plain one takes its place, but for `mutations.draw_pages`.
    single.drawn_page, single.run_page = single.run_page, plain_page  # type: ignore[attr-defined]
    # Nobody pulls the plug here: what a killed process has written, the system has.
    os.fsync = lambda descriptor: None
    # Nobody here ends a rank that has lost another.
    joining.PATIENCE, joining.MOMENT = 0.3, 0.1
    torch.use_deterministic_algorithms(True)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "own.py").write_text(MODEL)
        # Nobody's list of trusted files is for tests to write to.
        os.environ["XDG_STATE_HOME"] = folder
        trust_file(Path(folder) / "own.py", lasting=False)
        prepare(load_config(overrides=settings(Path(folder), Path(folder), epochs=3), checks=CHECKS))


def serve() -> None:
    """Answer requests until there are no more."""
    import campaign

    jobs = {
        "run": run,
        "train": train,
        "race": race,
        "kills": campaign.kills,
        "each_call": campaign.each_call,
        "fingerprint": oracle.fingerprint,
    }
    # Warnings and the like of torch's own must not be taken for answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        number, job = request.pop("id"), jobs[request.pop("job")]
        try:
            answer = {"id": number, "answer": job(**request)}
        except BaseException:
            answer = {"id": number, "error": traceback.format_exc()}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    # The other files import this one by its name.
    sys.modules["zygote"] = sys.modules["__main__"]
    warnings.simplefilter("ignore")
    warm()
    serve()
