"""Faults on ranks under the launcher: one restart, and the bits of a run that nobody disturbed."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

SETTINGS = (
    *("model.norm=l1", "data.workers=0", "data.batch_size=128", "train.epochs=3", "train.checkpoint_every=3st"),
    *("model.name=resnet8", "model.options.width=2", "device=cpu", "train.rank_timeout=20", "name=run"),
)


@pytest.fixture(scope="module")
def expected(zygote, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Digests of a run on two ranks that nobody disturbs."""
    folder = tmp_path_factory.mktemp("whole")
    arguments = ["train", *SETTINGS, f"output={folder}"]
    done = zygote.ask("run", arguments=arguments, text=folder / "text", ranks=2)
    assert done["statuses"] == [0, 0], done["text"]
    return zygote.ask("fingerprint", run=folder / "run")


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("fault", ["step:1:17:kill", "save.part:0:8:kill", "step:1:17:exit0", "step:0:17:raise"])
def test_one_restart_and_the_same_bits(fault: str, zygote, tmp_path: Path, expected: dict[str, str]) -> None:
    launch = ["train", "--processes=2", "--max-restarts=3", *SETTINGS, f"output={tmp_path}"]
    done = subprocess.run(
        [sys.executable, "-m", "norm_matters", *launch],
        env={**os.environ, "NORM_MATTERS_FAULTS": fault, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        start_new_session=True,
    )
    assert done.returncode == 0, done.stderr
    if fault.endswith("raise"):
        assert "Traceback" in done.stderr
        assert "a fault at step, by NORM_MATTERS_FAULTS" in done.stderr
    events = json.loads((tmp_path / "run" / "provenance.json").read_text())["events"]
    assert [event["event"] for event in events] == ["restarted"]
    assert zygote.ask("fingerprint", run=tmp_path / "run") == expected


@pytest.mark.slow
def test_a_rank_that_hangs_is_given_up_in_time(zygote, tmp_path: Path) -> None:
    """Nobody ends the stopped rank here, as a launcher would; the other ends by itself."""
    begun = time.monotonic()
    arguments = ["train", *SETTINGS[:-2], "train.rank_timeout=6", "name=run", f"output={tmp_path}"]
    done = zygote.ask(
        "run",
        arguments=arguments,
        text=tmp_path / "text",
        ranks=2,
        seconds=40,
        environment={"NORM_MATTERS_FAULTS": "step:1:17:stop"},
    )
    assert done["statuses"] == [75, None], done["text"]
    assert "error: rank 0: waited in vain for another rank; train.rank_timeout says how long" in done["text"]
    assert time.monotonic() - begun < 60
