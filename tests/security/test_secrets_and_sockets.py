"""A run records no secret of its user's, listens to no other machine, and runs no module that lies about."""

import io
import os
import subprocess
import sys
import time
from contextlib import redirect_stdout
from pathlib import Path

import pytest

from norm_matters.cli import main
from norm_matters.record.provenance import collect_provenance, without_secrets

SECRET = "hunter2-canary"
WORDS = [
    "HF_TOKEN",
    "AWS_SECRET_ACCESS_KEY",
    "WANDB_API_KEY",
    "PASSWORD",
    "DB_PASS",
    "token",
    "my_secret_x",
    "GITHUB_TOKEN",
]


def everything_in(folder: Path) -> bytes:
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    return b"".join(path.read_bytes() + str(path).encode() for path in files)


def test_no_secret_of_the_environment_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for word in WORDS:
        monkeypatch.setenv(word, SECRET)
    settings = ["--batch-size=512", "--device=cpu", f"--output={tmp_path}", "--name=run", "--epochs=1"]
    with redirect_stdout(io.StringIO()):
        assert main(["train", *settings, "model.options.width=2"]) == 0
    found = everything_in(tmp_path / "run")
    assert len(found) > 10_000
    assert SECRET.encode() not in found


@pytest.mark.parametrize(
    "command",
    [
        ["--api-key", SECRET],
        [f"--api-key={SECRET}"],
        [f"tracker.TOKEN={SECRET}"],
        ["--password", SECRET, "--epochs", "3"],
        [f"wandb_secret={SECRET}"],
        [f"DB_PASS={SECRET}"],
        ["--hf-token", SECRET],
    ],
)
def test_secrets_on_the_command_line_are_hidden(command: list[str]) -> None:
    assert SECRET not in str(without_secrets(["norm-matters", "train", *command]))
    assert SECRET not in str(
        collect_provenance(["norm-matters", *command], tracker={"api_key": SECRET, "nested": [{"token": SECRET}]})
    )


def test_other_words_stay() -> None:
    command = ["norm-matters", "train", "--norm", "l1", "model.options.width=2", "-x", "key"]
    assert without_secrets(command) == command


def listeners(pids: set[int]) -> list[str]:
    """The addresses (hexadecimal, as the kernel has them) that processes listen on by TCP."""
    inodes = set()
    for pid in pids:
        try:
            for link in Path(f"/proc/{pid}/fd").iterdir():
                inodes.add(os.readlink(link).removeprefix("socket:[").removesuffix("]"))
        except OSError:
            continue
    found = []
    for name in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[9] in inodes and fields[3] == "0A":
                found.append(fields[1].partition(":")[0])
    return found


def family(pid: int) -> set[int]:
    """A process and all that it has started."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        children.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    found, new = {pid}, [pid]
    while new:
        new = [child for parent in new for child in children.get(parent, [])]
        found |= set(new)
    return found


LOOPBACK = {"0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F"}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="needs /proc")
@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_on_one_machine_listens_to_that_machine_alone(processes: int, tmp_path: Path) -> None:
    count = [f"--processes={processes}"] if processes > 1 else []
    settings = [
        f"--output={tmp_path}",
        "--epochs=400",
        "--batch-size=256",
        "--device=cpu",
        "train.checkpoint_every=100ep",
    ]
    with (tmp_path / "log").open("wb") as log:
        command = [sys.executable, "-m", "norm_matters", "train", *count, *settings]
        process = subprocess.Popen(command, stdout=log, stderr=log)
    seen: set[str] = set()
    try:
        deadline = time.monotonic() + 100
        while time.monotonic() < deadline and process.poll() is None:
            seen |= set(listeners(family(process.pid)))
            tables = list(tmp_path.glob("*/results.csv"))
            if tables and tables[0].read_text().count("\n") > 2:
                break
            time.sleep(0.02)
        else:
            raise AssertionError((tmp_path / "log").read_text())
    finally:
        process.terminate()
        process.wait(60)
    assert seen <= LOOPBACK
    # Otherwise the search is blind: two ranks meet somewhere.
    assert bool(seen) == (processes > 1)


@pytest.mark.slow
def test_modules_in_the_folder_that_a_sweep_is_started_in_are_not_imported(tmp_path: Path) -> None:
    strangers = tmp_path / "strangers"
    strangers.mkdir()
    canary = f"open({str(tmp_path / 'canary')!r}, 'w')\nraise SystemExit(3)\n"
    for name in ("yaml", "typer", "torch", "numpy", "norm_matters", "sitecustomize"):
        (strangers / f"{name}.py").write_text(canary)
    command = [
        sys.executable,
        "-P",
        "-c",
        "import sys; from norm_matters.cli import main; sys.exit(main(sys.argv[1:]))",
    ]
    settings = ["seed=0", "epochs=1", "batch_size=512", "device=cpu", f"--output={tmp_path / 'sweep'}"]
    done = subprocess.run([*command, "sweep", *settings], cwd=strangers, capture_output=True, text=True, timeout=200)
    assert not (tmp_path / "canary").exists()
    assert done.returncode == 0, done.stdout + done.stderr
    launched = [
        "train",
        "--processes=1",
        "--epochs=1",
        "--batch-size=512",
        "--device=cpu",
        f"--output={tmp_path / 'runs'}",
    ]
    done = subprocess.run([*command, *launched], cwd=strangers, capture_output=True, text=True, timeout=200)
    assert not (tmp_path / "canary").exists()
    assert done.returncode == 0, done.stdout + done.stderr
