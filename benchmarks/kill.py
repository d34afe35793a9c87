"""Kill training runs at random moments, resume them until they are done, and compare to the bit.

    python benchmarks/kill.py N [--ranks 2] [--seed S] [--calls] [KEY=VALUE ...]

N kills by SIGKILL, at moments drawn from a whole run's life, of runs of four epochs that save every third step; a
reader goes through all their files meanwhile. With `--ranks` one of so many processes is killed, and the others have to
end by themselves. With `--calls` one run after the other is killed before its first call that touches the disk, its
second, and so on. What is looked at is in `tests/faults`, whose process with everything imported forks the runs.

Prints what was found as JSON; the exit status is 1 where anything was wrong. See `kill_ranks.py` for kills under
torchrun.
"""

import argparse
import json
import os
import sys
import tempfile
import warnings
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "faults"))
import campaign
import zygote


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kills", type=int)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--calls", action="store_true")
    parser.add_argument("settings", nargs="*")
    arguments = parser.parse_intermixed_args()
    more = arguments.settings or ["train.checkpoint_every=3st"]
    warnings.simplefilter("ignore")
    zygote.warm()
    with tempfile.TemporaryDirectory() as folder:
        if arguments.calls:
            found = campaign.each_call(folder, more=more)
        else:
            found = campaign.kills(folder, count=arguments.kills, seed=arguments.seed, ranks=arguments.ranks, more=more)
    survivors = sorted(found.pop("survivors", []))
    if survivors:
        found["survivors"] = {"median": survivors[len(survivors) // 2], "longest": survivors[-1]}
    print(json.dumps(found, indent=1))
    sys.exit(bool(found["problems"]))


if __name__ == "__main__":
    main()
