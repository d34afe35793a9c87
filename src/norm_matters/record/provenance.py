"""`provenance.json`: what made a run, as far as it can be known without asking. Secrets stay out.

Recorded are chosen facts, never the environment; arguments and facts whose name sounds like a secret lose their value.
"""

import json
import os
import platform
import re
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from norm_matters.core.errors import StorageError, UserError
from norm_matters.core.json import parse_json
from norm_matters.core.reading import read_regular
from norm_matters.record.files import write_file
from norm_matters.record.folder import PROVENANCE_FILE

_PACKAGES = (
    "torch",
    "torchvision",
    "timm",
    "numpy",
    "safetensors",
    "pillow",
    "pyarrow",
    "scikit-learn",
    "pandas",
    "bokeh",
)
LARGEST = 2**26
"""Bytes of the largest `provenance.json` that is read."""

_SECRET = re.compile(r"token|key|secret|pass", re.IGNORECASE)
_HIDDEN = "(hidden)"


def collect_provenance(command: Sequence[str], *, device: str = "cpu", **facts: Any) -> dict[str, Any]:
    """Gather what a run depends on.

    Args:
        command: the arguments it was started with.
        device: the torch device it runs on, resolved (`cpu`, `cuda:0`).
        **facts: further facts in JSON types (`seed=...`, `data=...`), recorded as given.

    Returns:
        A dict in JSON types: command, start (UTC), package (version, commit, changed files), versions, machine, facts.
    """
    return {
        "command": without_secrets(command),
        "started": _now(),
        "package": {"name": "norm-matters", "version": _version("norm-matters"), **_commit(Path(__file__).parents[1])},
        "versions": {
            "python": platform.python_version(),
            **{name: version for name in _PACKAGES if (version := _version(name))},
        },
        "machine": _machine(device),
        **_hide(facts),
    }


def write_provenance(run: Path, provenance: dict[str, Any]) -> None:
    """Write `provenance.json` of a run folder.

    Raises:
        StorageError: it could not be written.
    """
    write_file(run / PROVENANCE_FILE, json.dumps(provenance, indent=1, default=str) + "\n")


def append_event(run: Path, event: dict[str, Any]) -> None:
    """Add what happened to a run later (resumed, extended) to `events` of its `provenance.json`, with the time.

    Args:
        event: JSON types, e.g. `{"event": "resumed", "epoch": 3, "command": [...]}`.

    Raises:
        UserError: the file is missing or damaged.
        StorageError: it could not be read or written.
    """
    provenance = read_provenance(run)
    events = provenance.get("events", [])
    if not isinstance(events, list):
        raise UserError(f"{run / PROVENANCE_FILE} is damaged: its events are no list")
    write_provenance(run, {**provenance, "events": [*events, {"time": _now(), **_hide(event)}]})


def read_provenance(run: Path) -> dict[str, Any]:
    """Read `provenance.json` of a run folder.

    Raises:
        UserError: the file is missing or damaged.
        StorageError: it could not be read.
    """
    path = run / PROVENANCE_FILE
    try:
        provenance = parse_json(read_regular(path, limit=LARGEST), nan=True)
        if not isinstance(provenance, dict):
            raise ValueError("it is no JSON object")
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing") from error
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}") from error
    return provenance


def note_unreadable(run: Path, found: Mapping[str, str]) -> tuple[list[str], dict[str, str]]:
    """Add training images that could not be read to `unreadable_images` of a run's `provenance.json`.

    Args:
        found: name of each image -> why; also those that were added before.

    Returns:
        Why, of each that is new; and all that the run has met so far.

    Raises:
        UserError: the file is missing or damaged.
        StorageError: it could not be read or written.
    """
    provenance = read_provenance(run)
    before = provenance.get("unreadable_images", [])
    try:
        known = {str(entry["image"]): str(entry["reason"]) for entry in before}
    except (KeyError, TypeError) as error:
        raise UserError(f"{run / PROVENANCE_FILE} is damaged: its unreadable_images are no list of images") from error
    new = {image: reason for image, reason in found.items() if image not in known}
    if new:
        every = [{"image": image, "reason": reason} for image, reason in (known | new).items()]
        write_provenance(run, {**provenance, "unreadable_images": every})
    return list(new.values()), known | new


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _machine(device: str) -> dict[str, Any]:
    import torch

    machine = {
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": device,
    }
    if device.startswith("cuda"):
        machine |= {"device_name": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    return machine


def _cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    match = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return match[1] if match else platform.processor() or platform.machine()


def _commit(package: Path) -> dict[str, Any]:
    """Commit and uncommitted changes of the checkout the package runs from; nothing for an installed package."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(package), *arguments]
        # A plain look must not take the repository's lock from a commit that is under way.
        environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=10, check=True)
        return done.stdout.strip()

    try:
        # An installed package may lie inside somebody else's repository: only files that it tracks count.
        git("ls-files", "--error-unmatch", "__init__.py")
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "--", "."))}
    except (OSError, subprocess.SubprocessError):
        return {"commit": None, "dirty": None}


def without_secrets(command: Sequence[str]) -> list[str]:
    """The arguments, with the value hidden after an option, or in a `KEY=VALUE`, that sounds like a secret."""
    shown, hide_next = [], False
    for argument in command:
        name, equals, _ = argument.partition("=")
        secret = bool(_SECRET.search(name))
        if hide_next and not argument.startswith("-"):
            shown.append(_HIDDEN)
        else:
            shown.append(f"{name}={_HIDDEN}" if secret and equals else argument)
        hide_next = secret and argument.startswith("-") and not equals
    return shown


def _hide(value: Any, name: str = "") -> Any:
    """Copy nested facts; a text under a name that sounds like a secret is hidden."""
    if isinstance(value, dict):
        return {key: _hide(entry, str(key)) for key, entry in value.items()}
    if name == "command" and isinstance(value, list | tuple):
        return without_secrets(value)
    if isinstance(value, list | tuple):
        return [_hide(entry, name) for entry in value]
    return _HIDDEN if isinstance(value, str) and _SECRET.search(name) else value
