"""Who started this process, and which of how many it is."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
from torch._C._distributed_c10d import TCPStore

from norm_matters.core.errors import LostRankError, NumericalError, StorageError, UserError
from norm_matters.core.joining import find_store
from norm_matters.core.ranks import (
    Ranks,
    check_earlier_attempts,
    find_ranks,
    first_host,
    note_failure,
    words_of_this_rank,
)

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RUN_ID": "night",
    "TORCHELASTIC_RESTART_COUNT": "0",
}
SRUN = {
    "SLURM_JOB_ID": "1234",
    "SLURM_STEP_ID": "2",
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "8",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "gpu[03-05,9]",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
}


def test_a_process_of_nobody_is_alone():
    assert find_ranks({}) == Ranks()
    assert find_ranks({"SLURM_STEP_NUM_TASKS": "1"}).world == 1


def test_torchrun_says_who_is_who():
    ranks = find_ranks(TORCHRUN)
    assert (ranks.rank, ranks.world, ranks.local_rank, ranks.local_world) == (3, 4, 1, 2)
    assert (ranks.launcher, ranks.address, ranks.port) == ("torchrun", "10.0.0.1", 29500)
    assert not ranks.first
    assert not ranks.continues
    again = find_ranks({**TORCHRUN, "TORCHELASTIC_RESTART_COUNT": "2"})
    assert (again.attempt, again.continues, again.launch) == (2, True, ranks.launch)


def test_a_launch_without_a_name_is_known_by_its_process():
    unnamed = {**TORCHRUN, "TORCHELASTIC_RUN_ID": "none"}
    assert find_ranks(unnamed).launch == find_ranks(unnamed).launch
    assert str(os.getppid()) in str(find_ranks(unnamed).launch)


def test_srun_says_who_is_who():
    ranks = find_ranks(SRUN)
    assert (ranks.rank, ranks.world, ranks.local_rank, ranks.local_world) == (5, 8, 1, 4)
    assert (ranks.launcher, ranks.address, ranks.launch) == ("srun", "gpu03", "slurm 1234.2")
    assert 20000 <= ranks.port < 60000
    assert ranks.port != find_ranks({**SRUN, "SLURM_STEP_ID": "3"}).port
    assert find_ranks({**SRUN, "MASTER_PORT": "1234", "MASTER_ADDR": "here"}).port == 1234
    assert find_ranks({**SRUN, "SLURM_RESTART_COUNT": "1"}).continues


def test_torchrun_inside_srun_counts():
    assert find_ranks({**SRUN, **TORCHRUN}).launcher == "torchrun"


def test_a_batch_script_is_no_step():
    """It has the numbers of its job, but srun did not start it: nobody else would come."""
    script = {key: value for key, value in SRUN.items() if not key.startswith("SLURM_STEP")}
    ranks = find_ranks({**script, "SLURM_RESTART_COUNT": "1"})
    assert (ranks.world, ranks.launch, ranks.continues) == (1, "slurm 1234.batch", True)


def test_a_launch_can_be_named():
    for environment in ({}, TORCHRUN, SRUN):
        ranks = find_ranks({**environment, "NORM_MATTERS_LAUNCH": "mine"})
        assert (ranks.launch, ranks.continues) == ("mine", True)


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({**TORCHRUN, "WORLD_SIZE": "many"}, "WORLD_SIZE: the environment has 'many'"),
        ({**TORCHRUN, "RANK": "4"}, "rank 4 of 4"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR and MASTER_PORT"),
        ({key: value for key, value in SRUN.items() if key != "SLURM_PROCID"}, "SLURM_PROCID"),
    ],
)
def test_numbers_that_make_no_sense_are_named(environment, words):
    with pytest.raises(UserError, match=words):
        find_ranks(environment)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("gpu[003-007,9],login", "gpu003"),
        ("gpu[9,11]", "gpu9"),
        ("rack[2-3]node[04-08]-ib,x", "rack2node04-ib"),
        ("", ""),
    ],
)
def test_the_first_machine_of_a_list(nodes, first):
    assert first_host(nodes) == first


def test_what_one_rank_meets_that_rank_tells():
    error, shared = UserError("x"), UserError("y")
    error.rank, shared.shared, shared.rank = 1, True, 1
    first, second = Ranks(0, 2), Ranks(1, 2)
    assert words_of_this_rank(error, second) == ["rank 1: x"]
    assert words_of_this_rank(shared, first) == ["rank 1: y"]
    assert words_of_this_rank(shared, second) == []
    assert words_of_this_rank(UserError("z"), second) == []  # met before the ranks: the first meets it too


@pytest.fixture
def error_files(tmp_path, monkeypatch):
    """A function that makes this process a rank of that attempt, and returns where torchrun looks for its word."""

    def attempt(number: int, rank: int = 0) -> Path:
        place = tmp_path / f"attempt_{number}" / str(rank) / "error.json"
        place.parent.mkdir(parents=True, exist_ok=True)
        monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(place))
        return place

    return attempt


@pytest.mark.parametrize("kind", [UserError, NumericalError])
def test_what_must_fail_again_is_not_tried_again(kind, error_files):
    place = error_files(0, rank=1)
    note_failure(["norm: no such norm"], kind.exit_status)
    assert json.loads(place.read_text())["message"]["message"] == "norm: no such norm"
    error_files(1)
    with pytest.raises(kind, match="no such norm"):
        check_earlier_attempts(Ranks(0, 2, attempt=1))


@pytest.mark.parametrize("status", [1, StorageError.exit_status, LostRankError.exit_status])
def test_what_may_pass_is_tried_again(status, error_files):
    error_files(0)
    note_failure(["x"], status)
    error_files(1)
    check_earlier_attempts(Ranks(0, 2, attempt=1))


def test_the_first_word_stands(error_files):
    place = error_files(0)
    note_failure(["first"], 2)
    note_failure(["second"], 2)
    assert "first" in place.read_text()


DIES = """
import sys, time
from norm_matters.core.ranks import die_with_the_launcher
die_with_the_launcher()
print("ready", flush=True)
time.sleep(60)
"""
LAUNCHER = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdout=subprocess.PIPE, text=True)
child.stdout.readline()
print(child.pid, flush=True)
time.sleep(60)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the kernel's help is Linux's")
def test_a_rank_ends_with_its_launcher():
    launcher = subprocess.Popen([sys.executable, "-c", LAUNCHER, DIES], stdout=subprocess.PIPE, text=True)
    assert launcher.stdout is not None
    child = int(launcher.stdout.readline())
    launcher.kill()
    launcher.wait()
    launcher.stdout.close()
    for _ in range(100):
        stat = Path(f"/proc/{child}/stat")
        # Dead is also who waits for a burial, which not every container's first process sees to.
        if not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.05)
    os.kill(child, 9)
    pytest.fail("the rank lived on")


def test_whoever_waits_where_nobody_comes_gives_up_in_time() -> None:
    """torch's own client would try for several times as long."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        begun = time.monotonic()
        with pytest.raises(LostRankError, match=rf"nobody answers at 127\.0\.0\.1:{port}, where the ranks meet"):
            find_store("127.0.0.1", port, 2, timedelta(seconds=0.2))
        assert time.monotonic() - begun < 10


def test_whoever_answers_and_dies_is_not_waited_for() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]

        def die() -> None:
            listener.accept()[0].close()
            listener.close()

        thread = threading.Thread(target=die)
        thread.start()
        begun = time.monotonic()
        with pytest.raises(LostRankError, match="nobody answers"):
            find_store("127.0.0.1", port, 2, timedelta(seconds=3))
        assert time.monotonic() - begun < 7
        thread.join()


def test_a_store_that_comes_up_later_is_found() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    housed: list[TCPStore] = []
    thread = threading.Timer(0.3, lambda: housed.append(TCPStore("127.0.0.1", port, 2, True, wait_for_workers=False)))
    thread.start()
    store = find_store("127.0.0.1", port, 2, timedelta(seconds=30))
    thread.join()
    housed[0].set("key", "value")
    assert store.get("key") == b"value"
    assert store.timeout == timedelta(seconds=30)
