"""Kill one of two ranks at random moments: the run goes on to the same bits, or ends soon, saying why.

    python benchmarks/kill_ranks.py [N] [--torchrun]

N times (30) a run on the digits under `train --processes 2 --max-restarts 3` (or plain torchrun) loses a rank to
SIGKILL at a moment drawn uniformly from the life of its ranks. It has to end with the weights and the table (but for
its times) of a run that nobody disturbs. A third as often it is killed without restarts: it has to end within 60 s,
with a status other than 0, and its last line has to name the rank that was killed. Prints a line per kill, then CSV.
"""

import argparse
import csv
import hashlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from norm_matters.record import TIMING_COLUMNS

SETTINGS = ["--model", "resnet8", "--norm", "l1", "--epochs", "6", "data.workers=0"]
LIMIT = 60.0


def command(output: Path, *, restarts: int, torchrun: bool) -> list[str]:
    """The command line of a run on two ranks."""
    settings = [*SETTINGS, "--output", str(output)]
    if torchrun:
        options = ["--nproc-per-node=2", f"--max-restarts={restarts}", "-m", "norm_matters", "train"]
        return [sys.executable, "-m", "torch.distributed.run", *options, *settings]
    return [sys.executable, "-m", "norm_matters", "train", "--processes=2", f"--max-restarts={restarts}", *settings]


def ranks_of(launcher: int) -> dict[int, int]:
    """Rank -> process, of the ranks that a launcher has running now."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            environment = (folder / "environ").read_bytes().split(b"\0") if parent == launcher else []
        except (OSError, ValueError, IndexError):
            continue
        found |= {int(entry[5:]): int(folder.name) for entry in environment if entry.startswith(b"RANK=")}
    return found


def outcome(output: Path) -> tuple[str, str]:
    """Digests of the last checkpoint's weights, and of the table without its times."""
    (run,) = output.iterdir()
    weights = hashlib.sha256((run / "checkpoints" / "last" / "model.safetensors").read_bytes()).hexdigest()
    with (run / "results.csv").open(newline="") as stream:
        rows = [[row[key] for key in row if key not in TIMING_COLUMNS] for row in csv.DictReader(stream)]
    return weights[:16], hashlib.sha256(repr(rows).encode()).hexdigest()[:16]


class Trial:
    """A run that has been started; its output goes to a file, for nobody reads it meanwhile."""

    def __init__(self, folder: Path, *, restarts: int, torchrun: bool) -> None:
        self.output = folder / "runs"
        self._text = (folder / "output.txt").open("w+")
        self.process = subprocess.Popen(
            command(self.output, restarts=restarts, torchrun=torchrun),
            stdin=subprocess.DEVNULL,
            stdout=self._text,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def wait_for_ranks(self) -> None:
        """Until both are running."""
        while len(ranks_of(self.process.pid)) < 2:
            if self.process.poll() is not None:
                raise SystemExit(f"the run did not start:\n{self.text()}")
            time.sleep(0.01)

    def close(self) -> None:
        """Forget its output."""
        self._text.close()

    def text(self) -> str:
        """All that was printed."""
        self._text.seek(0)
        return self._text.read()


def disturbed(folder: Path, *, life: float, restarts: int, torchrun: bool, draw: random.Random) -> dict[str, object]:
    """Run it, kill a rank at a random moment of its life, and see how it ends."""
    trial = Trial(folder, restarts=restarts, torchrun=torchrun)
    trial.wait_for_ranks()
    moment, rank = draw.uniform(0, life), draw.randrange(2)
    time.sleep(moment)
    pid = ranks_of(trial.process.pid).get(rank)
    if pid is not None:
        os.kill(pid, signal.SIGKILL)
    killed = time.monotonic()
    status = trial.process.wait(timeout=600)
    lines = [line for line in trial.text().splitlines() if line.strip(" =-")]
    trial.close()
    return {
        "rank": rank,
        "moment": round(moment, 2),
        "killed": pid is not None,
        "status": status,
        "seconds": round(time.monotonic() - killed, 2),
        "last": lines[-1] if lines else "",
        "pid": pid,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kills", nargs="?", type=int, default=30)
    parser.add_argument("--torchrun", action="store_true")
    arguments = parser.parse_args()
    draw, rows, bad = random.Random(0), list[dict[str, object]](), 0
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "undisturbed"
        folder.mkdir()
        whole = Trial(folder, restarts=0, torchrun=arguments.torchrun)
        whole.wait_for_ranks()
        start = time.monotonic()
        if whole.process.wait(timeout=600):
            raise SystemExit(whole.text())
        whole.close()
        life, expected = time.monotonic() - start, outcome(whole.output)
        print(f"undisturbed: {life:.1f} s, weights {expected[0]}, table {expected[1]}", flush=True)
        plan = [3] * arguments.kills + [0] * -(-arguments.kills // 3)
        while plan:
            restarts = plan[0]
            folder = Path(tempfile.mkdtemp(dir=place))
            # Not its last moments: it may have ended before the kill, and then it is drawn again.
            row = disturbed(folder, life=0.95 * life, restarts=restarts, torchrun=arguments.torchrun, draw=draw)
            if not row["killed"]:
                continue
            plan.pop(0)
            if restarts:
                found = outcome(folder / "runs") if row["status"] == 0 else None
                right = row["status"] == 0 and found == expected
            else:
                last = str(row["last"])
                right = row["status"] != 0 and float(str(row["seconds"])) <= LIMIT and "SIGKILL" in last
                right = right and (f"rank {row['rank']}" in last or f"PID {row['pid']}" in last)
            bad += not right
            rows.append({"restarts": restarts, **row, "right": right})
            print(" ".join(f"{key}={value}" for key, value in rows[-1].items() if key != "last"), flush=True)
            if not right:
                print(f"  last line: {row['last']}", flush=True)
    print("restarts,kills,right,longest_seconds")
    for restarts in (3, 0):
        own = [row for row in rows if row["restarts"] == restarts]
        longest = max(float(str(row["seconds"])) for row in own)
        print(f"{restarts},{len(own)},{sum(bool(row['right']) for row in own)},{longest}")
    sys.exit(bad > 0)


if __name__ == "__main__":
    main()
