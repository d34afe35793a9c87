"""What a run has imported by its first step: the time until then is mostly imports."""

import json
import subprocess
import sys

# What costs half a second or more and the first step does not need.
SUSPECTS = ["torch._dynamo", "torch._inductor", "sympy", "sklearn", "scipy", "pandas", "bokeh", "torchvision", "timm"]

SCRIPT = """
import json, os, sys
import norm_matters.engine.loop as loop

step = loop.train_step

def first_step(*args, **options):
    step(*args, **options)
    print("MODULES", json.dumps(sorted(sys.modules)), flush=True)
    os._exit(0)

loop.train_step = first_step
from norm_matters.cli import main
main(["train", "--output", sys.argv[1]])
"""


def test_the_first_step_of_the_digits_waits_for_no_library_it_does_not_use(tmp_path) -> None:
    command = [sys.executable, "-c", SCRIPT, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    lines = [line for line in done.stdout.splitlines() if line.startswith("MODULES ")]
    assert lines, done.stderr
    modules = json.loads(lines[0].removeprefix("MODULES "))
    assert sorted(set(SUSPECTS) & set(modules)) == []
    # 1,366 when this was written, of which torch has 1,100.
    assert len(modules) < 1600
