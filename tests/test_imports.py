"""What importing costs: the heavy libraries are loaded by what needs them, and by nothing else."""

import resource
import statistics
import subprocess
import sys

import pytest

HEAVY = ["torch", "torchvision", "timm", "bokeh", "pandas", "sklearn", "scipy", "submitit", "ray"]
ROOMS = [
    "bench",
    "core",
    "datasets",
    "engine",
    "experiments",
    "models",
    "norms",
    "packing",
    "record",
    "regimes",
    "report",
    "transforms",
    "weights",
]


def loaded_after(statements: str, suspects: list[str]) -> list[str]:
    """Which of the suspects a fresh process has loaded after these statements."""
    script = f"import sys\n{statements}\nprint(*sorted(set(sys.modules) & set({suspects!r})), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stderr.split()


@pytest.mark.parametrize(
    "statements",
    [
        "import norm_matters; dir(norm_matters)",
        "from norm_matters.cli import main; assert main(['--help']) == 0",
        "from norm_matters.cli import main; assert main(['train', '--help']) == 0",
        "from norm_matters.cli import main; assert main(['data', 'pack', '--help']) == 0",
        "from norm_matters.cli import main; assert main(['sweep', '--help']) == 0",
        "from norm_matters.cli import main; assert main(['verify', '--help']) == 0",
        "from norm_matters.cli import main; assert main(['list', 'datasets']) == 0",
    ],
)
def test_the_package_and_its_help_load_nothing_heavy(statements: str) -> None:
    assert loaded_after(statements, HEAVY) == []


def test_no_room_loads_more_than_itself() -> None:
    statements = "\n".join(f"import norm_matters.{room}" for room in ROOMS)
    assert loaded_after(statements, HEAVY) == []


def test_the_configuration_needs_no_torch() -> None:
    assert loaded_after("import norm_matters.core.config, norm_matters.core.yaml", ["torch", "numpy"]) == []


def test_every_public_name_is_there() -> None:
    import norm_matters as nm

    for name in nm.__all__:
        assert callable(getattr(nm, name)), name
        assert name in dir(nm)
    assert nm.record.TIMING_COLUMNS
    with pytest.raises(AttributeError, match="has no attribute 'tarin'"):
        _ = nm.tarin


@pytest.mark.slow
def test_help_answers_in_a_third_of_a_second() -> None:
    def cpu_seconds() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    seconds = []
    for _ in range(6):
        before = cpu_seconds()
        subprocess.run([sys.executable, "-m", "norm_matters", "--help"], check=True, stdout=subprocess.DEVNULL)
        seconds.append(cpu_seconds() - before)
    # Processor time, for the machine may be busy; without the first, which fills the cache.
    assert statistics.median(seconds[1:]) < 0.35
