"""`train --processes N`: the same command as N ranks on this machine, by torchrun's own engine, in plain words.

torchrun does the same; what is added here: wrong settings are told before anything is started, what a rank says last
is said last, the exit status is the culprit's, and the ranks end when this process does.
"""

import logging
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from norm_matters.core.errors import INTERRUPTED, UserError
from norm_matters.core.numbers import is_whole
from norm_matters.core.ranks import STOP_VARIABLE, noted_stop

FORWARDED = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
"""Signals that the ranks get too."""

PATIENCE = 86_400
"""Seconds that ranks have to save and end after a signal."""


def launch(arguments: Sequence[str], *, processes: int, restarts: int = 0) -> int:
    """Run `norm-matters ARGUMENTS` as ranks; returns the exit status.

    Settings of torchrun (PET_NNODES, PET_RDZV_ENDPOINT, PET_RDZV_ID, ...) in the environment let several machines
    take part, each with this command.

    Args:
        arguments: of the command, without `--processes` and `--max-restarts`.
        processes: ranks on this machine.
        restarts: how often they are started again after one of them failed.

    Raises:
        UserError: the ranks cannot be started.
    """
    # Started again, they would find the first start's addresses: https://github.com/pytorch/pytorch/issues/135712.
    os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    # The folder that the ranks are started in may be full of a stranger's files, modules among them.
    os.environ.setdefault("PYTHONSAFEPATH", "1")
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, _cores() // processes)))
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch

    # It says at length what the ranks say themselves.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    for name in list(logging.root.manager.loggerDict):
        if name.startswith("torch.distributed"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    options = [f"--nproc-per-node={processes}", f"--max-restarts={restarts}", f"--signals-to-handle={FORWARDED}"]
    # However long a step and a save take; a second signal ends this process, and the ranks with it.
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(PATIENCE))
    if not any(name in os.environ for name in ("PET_NNODES", "PET_RDZV_ENDPOINT", "PET_MASTER_ADDR")):
        options += ["--standalone", "--local-addr=localhost"]
    settings = torchrun.parse_args([*options, "--module", "norm_matters", *arguments])
    with tempfile.TemporaryDirectory(prefix="norm-matters-") as folder:
        if settings.standalone:
            # By a file: a store of torch's listens to the whole network, and asks nobody who he is.
            settings.rdzv_backend, settings.rdzv_conf = "c10d", "store_type=file"
            settings.rdzv_endpoint, settings.rdzv_id = str(Path(folder) / "rendezvous"), _own_name()
        # Where ranks leave word of a failure; torchrun's own folder for that would stay for ever.
        settings.log_dir = settings.log_dir or str(Path(folder) / "words")
        stop = Path(folder) / "stopped"
        os.environ[STOP_VARIABLE] = str(stop)
        config, entrypoint, command = torchrun.config_from_args(settings)
        try:
            elastic_launch(config, entrypoint)(*command)
        except ChildFailedError as error:
            return _status_of(error)
        except SignalException as error:
            by_signal = INTERRUPTED if error.sigval == signal.SIGINT else 128 + int(error.sigval)
            return noted_stop(stop) or by_signal
        # Ranks that were asked to stop end as if all were done, so that they are not started again.
        return noted_stop(stop) or 0


def _status_of(error: Any) -> int:
    """The exit status of the rank that failed first; it is named here where it could not say anything itself."""
    rank, failure = error.get_first_failure()
    if failure.exitcode >= 0:
        return failure.exitcode or 1
    number = -failure.exitcode
    name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
    print(f"error: rank {rank} (process {failure.pid}) was ended by {name}", file=sys.stderr, flush=True)
    return 128 + number


def check_numbers(processes: str | None, restarts: str | None) -> tuple[int, int]:
    """The numbers that were given as text.

    Raises:
        UserError: one is none, or there are restarts without processes.
    """
    problems = []
    if processes is not None and not is_whole(processes, 1):
        problems.append(f"--processes: value '{processes}' is not valid; it takes a whole number from 1")
    if restarts is not None and not is_whole(restarts):
        problems.append(f"--max-restarts: value '{restarts}' is not valid; it takes a whole number from 0")
    if restarts is not None and processes is None:
        problems.append("--max-restarts: it needs --processes N; torchrun has an option of the same name")
    if problems:
        raise UserError(*problems)
    return int(processes or 1), int(restarts or 0)


def without_options(arguments: Sequence[str], *names: str) -> list[str]:
    """The arguments without these options and their values, given as `--name VALUE` or `--name=VALUE`."""
    kept: list[str] = []
    skip = False
    for argument in arguments:
        if skip:
            skip = False
        elif argument in names:
            skip = True
        elif argument.partition("=")[0] not in names:
            kept.append(argument)
    return kept


def _own_name() -> str:
    """A name for this launch that no other has."""
    import uuid

    return f"norm-matters-{uuid.uuid4()}"


def _cores() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not everywhere
        return os.cpu_count() or 1
