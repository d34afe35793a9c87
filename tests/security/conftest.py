"""A small run, and checkpoints forged from its own as a stranger could: with all their checksums right."""

import hashlib
import io
import json
import shutil
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest

from norm_matters.cli import main
from norm_matters.record.state import seal_state

Change = Callable[[dict[str, Any]], Any]


@pytest.fixture(scope="session")
def good_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One epoch on the digits, with Adam, whose state has tensors and counters."""
    output = tmp_path_factory.mktemp("strangers")
    phases = "regime.phases=[{epoch: 0, optimizer: Adam, lr: 0.001}]"
    settings = ["--epochs=1", "--batch-size=512", "--device=cpu", f"--output={output}", "--name=good", phases]
    with redirect_stdout(io.StringIO()):
        assert main(["train", *settings, "train.instruments=none", "model.options.width=2"]) == 0
    return output / "good"


@pytest.fixture
def stolen(good_run: Path, tmp_path: Path) -> Path:
    """A copy of the run, to be changed."""
    return shutil.copytree(good_run, tmp_path / "runs" / "stolen", symlinks=True)


@pytest.fixture
def forge(stolen: Path) -> Callable[..., Path]:
    """A function that changes the last checkpoint of the run and seals it anew; returns the run's folder."""

    def forge(change: Change | None = None, **parts: bytes) -> Path:
        folder = (stolen / "checkpoints" / "last").resolve()
        document = json.loads((folder / "state.json").read_text())
        for entry in ("sha256", "format_version"):
            del document[entry]
        for name, data in parts.items():
            (folder / f"{name}.safetensors").write_bytes(data)
            facts = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "channels_last": []}
            document["parts"][f"{name}.safetensors"] = facts
        if change is not None:
            change(document)
        (folder / "state.json").write_bytes(seal_state(document))
        return stolen

    return forge
