"""The process that forks runs (see `zygote.py`), one for a whole test session."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ZYGOTE = Path(__file__).with_name("zygote.py")


class Zygote:
    """Asks the process, and waits for its answers."""

    def __init__(self) -> None:
        self._asked = 0
        self._words = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed at the end)
        self._process = subprocess.Popen(
            [sys.executable, str(ZYGOTE)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._words,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"},
        )

    def ask(self, job: str, **arguments: Any) -> Any:
        """What a job (see `zygote.serve`) answers; paths are given as text."""
        assert self._process.stdin
        assert self._process.stdout
        self._asked += 1
        print(
            json.dumps({"id": self._asked, "job": job, **arguments}, default=str), file=self._process.stdin, flush=True
        )
        answer = {"id": 0}
        # Where a test gave up waiting, its answer comes first.
        while answer["id"] != self._asked:
            line = self._process.stdout.readline()
            if not line:
                self._words.seek(0)
                pytest.fail(f"the zygote is gone: {self._words.read()[-3000:]}")
            answer = json.loads(line)
        assert "error" not in answer, answer["error"]
        return answer["answer"]

    def train(self, folder: Path, *more: str, status: int | None = 0, **arguments: Any) -> str:
        """Train in `folder/runs/run` (see `zygote.train`), expect that status, and return what was printed."""
        done = self.ask("train", folder=folder, more=more, **arguments)
        assert done["ended"], f"it hung: {done['text']}"
        assert set(done["statuses"]) == {status}, (done["statuses"], done["text"])
        return done["text"]

    def close(self) -> None:
        """End it."""
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait(timeout=60)
        assert self._process.stdout
        self._process.stdout.close()
        self._words.close()


@pytest.fixture(scope="session")
def zygote() -> Iterator[Zygote]:
    """The process; where pytest has several of its own, each has one."""
    process = Zygote()
    yield process
    process.close()
