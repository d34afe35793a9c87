"""The report room needs no torch, and importing it costs nothing."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

# None in sys.modules makes every import of that name an ImportError.
BLOCKED = """
import sys
for name in ("torch", "torchvision", "timm"):
    sys.modules[name] = None
from pathlib import Path
from norm_matters.report import compare, write_report
run = Path(sys.argv[1])
assert write_report(run).stat().st_size > 1_000_000
assert len(compare([run], run / "page.html").table) == 1
"""

LAZY = """
import sys
import norm_matters.report
assert callable(norm_matters.report.__getattr__)
heavy = {"bokeh", "pandas", "numpy", "torch", "pydantic", "yaml"} & set(sys.modules)
assert not heavy, heavy
try:
    norm_matters.report.nothing
except AttributeError as error:
    assert "nothing" in str(error)
else:
    raise AssertionError("no AttributeError")
assert set(norm_matters.report.__all__) == {"Comparison", "compare", "write_report"}
"""


def run_fresh(code: str, *arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *arguments], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


def test_pages_are_made_with_torch_blocked(make_run: Callable[..., Path]) -> None:
    run_fresh(BLOCKED, str(make_run("run", [{}, {}])))


def test_importing_the_room_loads_nothing_heavy() -> None:
    run_fresh(LAZY)
