"""Starts ranks as a launcher would."""

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment_of_rank(rank: int, world: int, port: int) -> dict[str, str]:
    """What torchrun tells a rank that runs on this machine."""
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "TORCH_CPP_LOG_LEVEL": "ERROR",  # as the command sets before it imports torch
        "RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


@pytest.fixture(scope="session")
def start_ranks() -> Callable[..., list[subprocess.Popen]]:
    """Start `world` processes of `python ARGUMENTS`, each with its rank in the environment."""

    def start(world: int, arguments: Sequence[str | Path]) -> list[subprocess.Popen]:
        port = free_port()
        return [
            subprocess.Popen(
                [sys.executable, *map(str, arguments)],
                env=environment_of_rank(rank, world, port),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(world)
        ]

    return start


@pytest.fixture(scope="session")
def run_ranks(start_ranks) -> Callable[..., list[tuple[int, str, str]]]:
    """Run them to their end; exit status, standard output and standard error of each."""

    def run(world: int, arguments: Sequence[str | Path], timeout: float = 240) -> list[tuple[int, str, str]]:
        processes = start_ranks(world, arguments)
        texts = [process.communicate(timeout=timeout) for process in processes]
        return [(process.returncode, *text) for process, text in zip(processes, texts, strict=True)]

    return run
