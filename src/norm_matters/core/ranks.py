"""Which of the processes that train together this one is, as its launcher says: torchrun, srun or nobody. No torch."""

import contextlib
import ctypes
import hashlib
import json
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

from norm_matters.core.errors import NumericalError, UserError

LAUNCH_VARIABLE = "NORM_MATTERS_LAUNCH"
"""A name of one's own for what is started: whatever is started again under it continues the run that it began."""

STOP_VARIABLE = "NORM_MATTERS_STOPPED"
"""Where the ranks of `norm-matters train --processes` leave word of a stop that they were asked for."""

_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of <linux/prctl.h>


@dataclass(frozen=True)
class Ranks:
    """The place of a process among those that train one network.

    Attributes:
        rank: its number, of `world`.
        local_rank: its number on this machine, of `local_world`: which of the GPUs is its own.
        launcher: who started it.
        address, port: where the ranks meet.
        attempt: how often its launcher has started it again after a failure.
        launch: what was started, by a name that stays the same in all attempts; None where there is none.
        continues: whether a run that an earlier attempt began is to be continued.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    launcher: Literal["torchrun", "srun"] | None = None
    address: str = ""
    port: int = 0
    attempt: int = 0
    launch: str | None = None
    continues: bool = False

    @property
    def first(self) -> bool:
        """Whether this is the one that writes the record."""
        return self.rank == 0


ONE_PROCESS = Ranks()
"""A process that trains by itself."""


def find_ranks(environment: Mapping[str, str] | None = None) -> Ranks:
    """Ask the environment: torchrun's variables, else those of the step that srun started, else there is one process.

    Raises:
        UserError: a variable is missing beside others, or is no number.
    """
    given = os.environ if environment is None else environment
    if "RANK" in given and "WORLD_SIZE" in given:
        return _of_torchrun(given)
    if _number(given, "SLURM_STEP_NUM_TASKS", 1) > 1:
        return _of_srun(given)
    return Ranks(**_slurm_launch(given), **_named_launch(given))


def _of_torchrun(given: Mapping[str, str]) -> Ranks:
    world = _number(given, "WORLD_SIZE")
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if world > 1 and not given.get(name)]
    if missing:
        raise UserError(
            f"WORLD_SIZE is {world}, but {' and '.join(missing)} is not set; start it with torchrun or srun"
        )
    attempt = _number(given, "TORCHELASTIC_RESTART_COUNT", 0)
    launch: dict[str, Any] = {"launch": _torchrun_launch(given), "continues": attempt > 0}
    return _checked(
        Ranks(
            rank=_number(given, "RANK"),
            world=world,
            local_rank=_number(given, "LOCAL_RANK", 0),
            local_world=_number(given, "LOCAL_WORLD_SIZE", 1),
            launcher="torchrun",
            address=given.get("MASTER_ADDR", ""),
            port=_number(given, "MASTER_PORT", 0),
            attempt=attempt,
            **launch | _named_launch(given),
        )
    )


def _of_srun(given: Mapping[str, str]) -> Ranks:
    rank, world = _number(given, "SLURM_PROCID"), _number(given, "SLURM_STEP_NUM_TASKS")
    nodes = given.get("SLURM_STEP_NODELIST") or given.get("SLURM_NODELIST", "")
    tasks = given.get("SLURM_STEP_TASKS_PER_NODE", "")
    job, step = _number(given, "SLURM_JOB_ID", 0), _number(given, "SLURM_STEP_ID", 0)
    return _checked(
        Ranks(
            rank=rank,
            world=world,
            local_rank=_number(given, "SLURM_LOCALID"),
            local_world=max(map(int, re.findall(r"(\d+)(?=\(|,|$)", tasks)), default=1),
            launcher="srun",
            address=given.get("MASTER_ADDR") or first_host(nodes),
            # Of the job and the step, so that two on one machine do not meet each other.
            port=_number(given, "MASTER_PORT", 20000 + (job * 16 + step) % 40000),
            attempt=_number(given, "SLURM_RESTART_COUNT", 0),
            **_slurm_launch(given) | _named_launch(given),
        )
    )


def _checked(ranks: Ranks) -> Ranks:
    if not 0 <= ranks.rank < ranks.world:
        raise UserError(f"rank {ranks.rank} of {ranks.world}: the launcher's numbers contradict each other")
    return ranks


def _torchrun_launch(given: Mapping[str, str]) -> str | None:
    if "TORCHELASTIC_RUN_ID" not in given:
        return None
    name = given["TORCHELASTIC_RUN_ID"]
    # Without a name of its own a launch is known by torchrun's process, which stays the same in all attempts.
    return f"torchrun {_process(os.getppid()) if name == 'none' else name}"


def _slurm_launch(given: Mapping[str, str]) -> dict[str, Any]:
    """A job that is queued again keeps its number, and its steps theirs."""
    if "SLURM_JOB_ID" not in given:
        return {}
    step = given.get("SLURM_STEP_ID", "batch")
    launch = f"slurm {given['SLURM_JOB_ID']}.{step}"
    return {"launch": launch, "continues": _number(given, "SLURM_RESTART_COUNT", 0) > 0}


def _named_launch(given: Mapping[str, str]) -> dict[str, Any]:
    name = given.get(LAUNCH_VARIABLE)
    return {"launch": name, "continues": True} if name else {}


def _process(pid: int) -> str:
    """A name for a process that no other has: machine, number, and when it started."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        started = fields[19]
    except (OSError, IndexError):
        started = ""
    return f"{socket.gethostname()}:{pid}:{started}"


def _number(given: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = given.get(name, "" if default is None else str(default))
    try:
        return int(text)
    except ValueError:
        raise UserError(f"{name}: the environment has {text!r}, which is no whole number") from None


def first_host(nodes: str) -> str:
    """The first machine of a list as SLURM writes it: `gpu[003-007,9],login` -> `gpu003`."""
    first, depth = "", 0
    for letter in nodes:
        depth += {"[": 1, "]": -1}.get(letter, 0)
        if letter == "," and not depth:
            break
        first += letter
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first)


def die_with_the_launcher() -> None:
    """Have the kernel end this process as soon as its launcher is gone, so that no rank lives on and writes.

    Linux only; elsewhere nothing is done.
    """
    if not sys.platform.startswith("linux"):
        return
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        # It went just before it was to be watched.
        os._exit(128 + signal.SIGKILL)


def words(error: Exception) -> list[str]:
    """What to tell the user of an error, each a line; it names the rank that is to blame, where there is one."""
    problems = error.problems if isinstance(error, UserError) else [f"{type(error).__name__}: {error}"]
    rank = getattr(error, "rank", None)
    return list(problems) if rank is None else [f"rank {rank}: {problem}" for problem in problems]


def words_of_this_rank(error: Exception, ranks: Ranks) -> list[str]:
    """What this process tells the user of an error that ends it: nothing, where another one does.

    What all ranks meet the first tells; what one meets, that one.
    """
    if isinstance(error, UserError) and error.told:
        return []
    own = getattr(error, "rank", None) is not None and not getattr(error, "shared", False)
    return words(error) if own or ranks.first else []


def leave(status: int) -> NoReturn:
    """End this process at once: after an error, leaving in good order could wait for ranks that do not."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)


def note_failure(problems: Iterable[str], status: int) -> None:
    """Leave word for torchrun of why this process fails, so that its last words are ours; once."""
    place = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not place or Path(place).exists():
        return
    extra = {"timestamp": str(int(time.time())), "status": status, "problems": list(problems)}
    document = {"message": {"message": "\n".join(extra["problems"]), "extraInfo": extra}}
    temporary = Path(f"{place}.{os.getpid()}")
    try:
        temporary.write_text(json.dumps(document))
        temporary.replace(place)
    except OSError:
        pass  # torchrun does without


def note_stop(status: int) -> None:
    """Leave word for `norm-matters train --processes` that all ranks end because they were asked to: no failure.

    Args:
        status: what it is to exit with.
    """
    place = os.environ.get(STOP_VARIABLE)
    if place:
        with contextlib.suppress(OSError):
            Path(place).write_text(str(status))


def status_of_rank(status: int) -> int:
    """What this process exits with: 0 after `note_stop`, so that its launcher starts nothing again."""
    place = os.environ.get(STOP_VARIABLE)
    return 0 if place and noted_stop(Path(place)) == status else status


def noted_stop(place: Path) -> int | None:
    """The status that the ranks have left word of; None where they have not."""
    try:
        return int(place.read_text())
    except (OSError, ValueError):
        return None


def check_earlier_attempts(ranks: Ranks) -> None:
    """Raise what ended the attempt before this one, where another attempt must end the same way.

    Wrong input stays wrong, and numbers that overflow overflow again; a full disk, or a machine that was lost, is
    another matter.
    """
    place = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not place or not ranks.attempt:
        return
    # torchrun's place for the word of each attempt's ranks: attempt_N/RANK/error.json
    attempts = Path(place).parents[1]
    for path in sorted(attempts.with_name(f"attempt_{ranks.attempt - 1}").glob("*/error.json")):
        try:
            extra = json.loads(path.read_bytes())["message"]["extraInfo"]
            status, problems = int(extra["status"]), [str(problem) for problem in extra["problems"]]
        except (OSError, ValueError, KeyError, TypeError):
            continue
        for kind in (UserError, NumericalError):
            if status == kind.exit_status:
                error = kind(*problems)
                error.shared, error.told = True, True
                raise error


def digest(text: str) -> str:
    """A name for a text: the first 16 digits of its SHA-256."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]
