"""Fixtures that several rooms share."""

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

# Two test processes on two cores: one thread each is fastest, and results depend on the number of threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture
def command() -> Callable[..., subprocess.Popen]:
    """Start `python -m norm_matters ARGS` in a process of its own."""

    def start(*arguments: str, **options) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, "-m", "norm_matters", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            **options,
        )

    return start


@pytest.fixture
def digest() -> Callable[[Path], str]:
    """SHA-256 of a file."""
    return lambda path: hashlib.sha256(path.read_bytes()).hexdigest()
