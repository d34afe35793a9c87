"""One run from configuration to report: the file that joins the rooms, top to bottom.

With several processes every one goes through it; the first writes the record, and what goes wrong on one is raised on
all (see `core.distributed`).
"""

import contextlib
import shlex
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from norm_matters import resuming
from norm_matters.core import stopping
from norm_matters.core.config import OPTION_KEYS, RunConfig, dump_config, load_config
from norm_matters.core.distributed import Group
from norm_matters.core.errors import INTERRUPTED, NumericalError, PreemptedError, StorageError, UserError, nearest
from norm_matters.core.faults import fault_point
from norm_matters.core.joining import explained, joined
from norm_matters.core.ranks import digest, words
from norm_matters.datasets import load_dataset
from norm_matters.engine.instruments.collect import instruments_of
from norm_matters.engine.loop import OnProgress, Progress, training_rows
from norm_matters.engine.trace import Trace
from norm_matters.keeping import Keeper, preempted
from norm_matters.models.trust import trust_named_file
from norm_matters.plan import CHECKS, Plan, complete, headline, made_of, prepare, short_name, step_options
from norm_matters.record import (
    Checkpoint,
    RunLog,
    check_room,
    claim_run_folder,
    collect_provenance,
    default_name,
    find_begun,
    held,
    is_run,
    launch_entry,
    read_table,
    remove_temporaries,
    write_file,
    write_layout,
    write_provenance,
)
from norm_matters.record.folder import CHECKPOINTS
from norm_matters.record.log import printable_line
from norm_matters.record.trace import append_trace
from norm_matters.recording import Recorder
from norm_matters.resuming import FREE_TO_CHANGE

__all__ = ["CHECKS", "FREE_TO_CHANGE", "Plan", "RunResult", "complete", "prepare", "resume", "train"]


@dataclass(frozen=True)
class RunResult:
    """A finished run: its folder, the rows of results.csv, the report's path, and the last row."""

    folder: Path
    rows: list[dict[str, Any]]
    report: Path
    last: dict[str, Any]


def train(
    config: RunConfig | None = None,
    *,
    command: Sequence[str] | None = None,
    on_progress: OnProgress | None = None,
    **options: Any,
) -> RunResult:
    """Train a network from the beginning and record it in a new run folder.

    In a process that torchrun or srun has started, train together with the others that it has; a launch that was
    started again after a failure continues the run that it began.

    Args:
        config: the run; or give the common options by name: `train(model="resnet20", norm="l1", epochs=3)`. A model
            file is run where it is named so, and where it is trusted (see `models.trust`).
        command: the command line, for the record.
        on_progress: called as training goes on (see `engine.loop.Progress`); in the first process only.

    Raises:
        UserError: wrong input; what can be found before training is, and then nothing has been created.
        StorageError: the run folder cannot be written.
        NumericalError: the loss is no longer finite.
        LostRankError: another process is gone or does not answer.
    """
    if config is None:
        config = load_config(options=_dotted(options), checks=CHECKS)
        trust_named_file(_dotted(options))
    elif options:
        raise UserError(f"give a config or options, not both: {', '.join(options)}")
    started = time.monotonic()
    with stopping.listening(*stopping.PREEMPTING), joined(timeout=config.train.rank_timeout) as group:
        begun = group.alone(lambda: _begun_before(config, group))
        if begun is not None:
            with _locked(group, Path(begun)):
                return _resume(
                    group, Path(begun), event="restarted", command=command, on_progress=on_progress, started=started
                )
        plan = _build(config, group)
        _leave_if_asked(group)
        folder = group.alone(lambda: str(_claim(plan, group, asked=config, command=command)))
        with _locked(group, Path(folder)):
            return _execute(plan, Path(folder), group, _Begun(started), on_progress=on_progress)


def resume(
    folder: Path,
    *,
    options: Mapping[str, Any] | None = None,
    overrides: Sequence[str] = (),
    extend: bool = False,
    restart: bool = False,
    command: Sequence[str] | None = None,
    on_progress: OnProgress | None = None,
) -> RunResult:
    """Continue a recorded run from its last checkpoint, or from the beginning when it has none.

    On as many processes as it ran on before, or on others: the images and the batches stay the same.

    Args:
        options, overrides: as for `load_config`; they may repeat the run's settings or change where and how far it
            runs (`FREE_TO_CHANGE`), nothing else.
        extend: allow another number of epochs although the schedule is relative to it; it is planned anew.
        restart: begin again where no checkpoint can be read.

    Raises:
        UserError: not a run, settings that contradict it, data that changed, a damaged checkpoint.
        RunInUseError: another process trains it.
    """
    started = time.monotonic()
    listening = stopping.listening(*stopping.PREEMPTING)
    timeout = _rank_timeout(options or {}, overrides)
    with listening, joined(timeout=timeout) as group, _locked(group, folder):
        return _resume(
            group,
            folder,
            options=options,
            overrides=overrides,
            extend=extend,
            restart=restart,
            command=command,
            on_progress=on_progress,
            started=started,
        )


def _rank_timeout(options: Mapping[str, Any], overrides: Sequence[str]) -> float:
    """How long ranks wait for each other where they meet, before they know what the run's record says."""
    key = "train.rank_timeout"
    given = {key: options[key]} if key in options else {}
    return load_config(None, given, [text for text in overrides if text.startswith(f"{key}=")]).train.rank_timeout


@dataclass(frozen=True)
class _Begun:
    """Where a run stands when a process takes it up: by default at its beginning.

    Attributes:
        started: when the process took it up (`time.monotonic`).
        epochs: that have their row.
        best: the best of them.
        measured: what the instruments have of the epoch under way.
    """

    started: float
    epochs: int = 0
    best: dict[str, Any] | None = None
    measured: Mapping[str, Tensor] = field(default_factory=dict)


@contextlib.contextmanager
def _locked(group: Group, folder: Path) -> Iterator[None]:
    """Inside, no other process writes the run's folder; the first rank holds the lock."""
    with contextlib.ExitStack() as stack:
        group.alone(lambda: _lock(folder, stack))
        yield


def _lock(folder: Path, stack: contextlib.ExitStack) -> None:
    if not is_run(folder):
        raise UserError(f"'{folder}' is no run folder: it needs config.yaml and provenance.json")
    if not stack.enter_context(held(folder)):
        RunLog(folder / "log.txt").write("warning: this file system has no locks; a second process is not kept out")
    # What those have left that were killed: nobody else writes here now.
    for place in (folder, folder / CHECKPOINTS):
        if not place.is_symlink():
            remove_temporaries(place)


def _settings(config: RunConfig) -> str:
    """What tells a launch's runs apart: the settings as they were asked for."""
    return digest(dump_config(config))


def _begun_before(config: RunConfig, group: Group) -> str | None:
    """The folder of the run that an earlier attempt of this launch began, if there is one."""
    ranks = group.ranks
    if ranks.launch is None or not ranks.continues:
        return None
    begun = find_begun(Path(config.output), ranks.launch, _settings(config))
    return None if begun is None else str(begun)


def _build(config: RunConfig, group: Group, *, restored: bool = False) -> Plan:
    """The plan of a run, its state joined with the other ranks'."""
    fault_point("start")
    if config.data.download and group.world > 1:
        # One process of each machine fetches; the others find it done.
        group.together(lambda: None if group.ranks.local_rank else load_dataset(config.data))
    plan = group.together(lambda: prepare(config, restored=restored, ranks=group.ranks))
    plan.state.join(group, seed=config.seed, shard_optimizer=config.train.shard_optimizer)
    return plan


def _claim(plan: Plan, group: Group, *, asked: RunConfig, command: Sequence[str] | None) -> Path:
    """Make the folder of a new run, with the files that make it one.

    Args:
        asked: the config before it was completed.
    """
    model, ranks = plan.config.model, group.ranks
    default = default_name(
        short_name(model.name), model.norm or "default", short_name(plan.config.data.name), plan.config.seed
    )
    check_room(Path(plan.config.output), plan.state.checkpoint_bytes())
    output = Path(plan.config.output)
    launch = None if ranks.launch is None else launch_entry(output, ranks.launch, _settings(asked))
    provenance = collect_provenance(
        list(command or []),
        device=str(plan.state.device),
        **made_of(plan),
        processes={"world": group.world, "launcher": ranks.launcher},
        launch=launch,
    )
    # Only now, and at once what makes it a run: a kill in between leaves a name that is taken and cannot be resumed.
    folder = claim_run_folder(output, asked.name, default, again=ranks.continues)
    write_file(folder / "config.yaml", dump_config(plan.config))
    write_provenance(folder, provenance)
    return folder


def _resume(
    group: Group,
    folder: Path,
    *,
    options: Mapping[str, Any] | None = None,
    overrides: Sequence[str] = (),
    extend: bool = False,
    restart: bool = False,
    command: Sequence[str] | None,
    on_progress: OnProgress | None,
    event: str = "resumed",
    started: float,
) -> RunResult:
    # The first rank reads; the others need not see the folder.
    run = group.alone(lambda: resuming.read_run(folder, options or {}, overrides, restart=restart))
    config, recorded = (RunConfig.model_validate(run[key]) for key in ("config", "recorded"))
    group.wait_no_longer_than(config.train.rank_timeout)
    plan = _build(config, group, restored=run["saved"])
    found: list[Checkpoint] = []
    read: dict[str, Any] = {"state": None, "damaged": {}, "taken": None}
    if run["saved"]:
        read = group.alone(lambda: resuming.read_checkpoint(plan, folder, found, restart=restart))
        if read["state"] is None:
            # It begins again, from the weights that a new run begins from.
            plan = _build(config, group)
    begun = _Begun(started)
    if read["state"]:
        saved, numbers = read["state"], read["state"]["training"]
        group.alone(lambda: resuming.check_length(plan, recorded, saved, extend=extend))
        model, training = (
            group.tensors_of_first(getattr(found[0], part) if found else {}) for part in ("model", "training")
        )
        group.together(lambda: resuming.load_state(plan, folder, model, training, numbers))
        plan.state.notes += resuming.differences_of_ranks(numbers.get("world", 1), group.world)
        measured = {name: tensor for name, tensor in training.items() if name.startswith("instruments/")}
        begun = _Begun(started, saved["epoch"], saved["best"], measured)
    plan.state.notes += resuming.notes_on_damage(read, plan)
    _leave_if_asked(group)
    happened = {"event": event, "command": list(command or [])}
    if group.world > 1:
        happened["processes"] = group.world
    group.alone(lambda: resuming.take_up(plan, folder, recorded, read, happened))
    return _execute(plan, folder, group, begun, on_progress=on_progress)


def _leave_if_asked(group: Group) -> None:
    """End here, if a signal has asked for it while things were made ready; nothing has been written yet.

    Raises:
        PreemptedError: it has; on all ranks.
    """
    asked = group.begin_largest([stopping.requested() or 0])()[0]
    if asked:
        raise preempted(f"preempted by {signal.Signals(asked).name} before the training began")


def _execute(plan: Plan, folder: Path, group: Group, begun: "_Begun", *, on_progress: OnProgress | None) -> RunResult:
    """Train from where the state stands, recording every epoch, and a report at its end."""
    log = RunLog(folder / "log.txt")
    if not group.first:
        on_progress = None
    keeper = Keeper(plan.config.train, plan.state, folder, started=begun.started, recorded=begun.epochs)
    trained = False
    try:
        keeper.tell("starting")
        group.alone(lambda: _open_log(plan, log))
        if on_progress:
            clock = plan.state.clock
            on_progress(Progress("start", clock.epoch + 1, clock.epochs, message=f"{folder}: {headline(plan)}"))
        with stopping.listening(*stopping.INTERRUPTING):
            _train_and_record(plan, folder, group, log, keeper, begun, on_progress=on_progress)
        trained = True
        rows, report = group.alone(lambda: _finish(folder, log))
        keeper.tell("done", exit_status=0)
    except BaseException as error:
        told = explained(error, group.ranks) if isinstance(error, Exception) else error
        _tell_the_end(keeper, told)
        if group.first:
            # The first error is the one to show: a full disk also refuses this line.
            with contextlib.suppress(StorageError):
                log.write(f"stopped: {type(told).__name__}: {told}")
            if isinstance(error, KeyboardInterrupt | NumericalError) and not trained:
                _try_report(folder, log)
        raise
    finally:
        # Not left to the end of the interpreter, where a worker's end can meet anything.
        plan.train.close()
        plan.val.close()
    return RunResult(folder, rows, Path(report), rows[-1])


def _tell_the_end(keeper: Keeper, error: BaseException) -> None:
    """Say in status.json how this process ends: by this error."""
    interrupted = isinstance(error, KeyboardInterrupt)
    status = INTERRUPTED if interrupted else error.exit_status if isinstance(error, UserError) else 1
    last = "interrupted" if interrupted else words(error)[-1] if isinstance(error, Exception) else type(error).__name__
    resumable = interrupted or isinstance(error, PreemptedError)
    keeper.tell("preempted" if resumable else "failed", exit_status=status, error=last)


def _open_log(plan: Plan, log: RunLog) -> None:
    for warning in plan.regime.unreached(plan.state.clock):
        log.write(f"warning: {warning}")
    log.write(headline(plan))
    for note in plan.state.notes:
        log.write(note)


def _finish(folder: Path, log: RunLog) -> tuple[list[dict[str, Any]], str]:
    """Write the report; the rows of the table, and the report's path."""
    log.write("done")
    return read_table(folder / "results.csv"), str(_try_report(folder, log))


def _try_report(folder: Path, log: RunLog) -> Path:
    """Write the report; its path.

    What was trained is saved, and how the process ends is known: whatever is wrong with a page is no more than a
    warning.
    """
    try:
        return _write_report(folder)
    except Exception as error:
        reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        warning = f"warning: no report: {reason}; 'norm-matters report {shlex.quote(str(folder))}' tries again"
        print(printable_line(warning), file=sys.stderr)
        with contextlib.suppress(StorageError):
            log.write(warning)
    return folder / "report.html"


def _write_report(folder: Path) -> Path:
    fault_point("report")
    # It needs bokeh and pandas, whose import the first step must not wait for.
    from norm_matters.report import write_report

    return write_report(folder)


def _train_and_record(
    plan: Plan,
    folder: Path,
    group: Group,
    log: RunLog,
    keeper: Keeper,
    begun: _Begun,
    *,
    on_progress: OnProgress | None,
) -> None:
    config, state = plan.config.train, plan.state
    instruments = instruments_of(config, state)
    if instruments:
        instruments.load(begun.measured)
        if instruments.columns:
            group.alone(lambda: write_layout(folder, instruments.columns))
    recorder = Recorder(plan, folder, group, log, keeper, instruments, best=begun.best, recorded=begun.epochs)
    state.notes.clear()
    rows = training_rows(
        state,
        train=plan.train,
        val=plan.val,
        options=step_options(config),
        instruments=instruments,
        trace=Trace(lambda row: append_trace(folder, row)),
        on_progress=on_progress,
        attendant=keeper,
    )
    for row in rows:
        if row is None:
            recorder.pause()
        else:
            recorder.epoch(row)
            if on_progress:
                on_progress(Progress("epoch", row["epoch"], state.clock.epochs, row=row))
        if row is None or row["epoch"] < state.clock.epochs:
            keeper.leave_if_asked()


def _dotted(options: Mapping[str, Any]) -> dict[str, Any]:
    for name in options:
        if name not in OPTION_KEYS:
            raise UserError(f"unknown option '{name}'{nearest(name, OPTION_KEYS)}")
    return {OPTION_KEYS[name]: value for name, value in options.items()}
