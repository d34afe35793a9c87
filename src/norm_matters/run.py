"""One run from configuration to report: the file that joins the rooms, top to bottom.

With several processes every one goes through it; the first writes the record, and what goes wrong on one is raised on
all (see `core.distributed`).
"""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from norm_matters.core.config import OPTION_KEYS, RunConfig, differences, dump_config, flatten, load_config
from norm_matters.core.distributed import TIMEOUT, Group, explained, joined
from norm_matters.core.errors import NumericalError, StorageError, UserError, nearest
from norm_matters.core.ranks import digest
from norm_matters.datasets import load_dataset
from norm_matters.engine.instruments.collect import Instruments
from norm_matters.engine.loop import OnProgress, Progress, training_rows
from norm_matters.engine.step import StepOptions
from norm_matters.plan import CHECKS, Plan, complete, headline, made_of, prepare, saved_state, short_name
from norm_matters.record import (
    Checkpoint,
    RunLog,
    append_event,
    append_measurements,
    append_row,
    claim_run_folder,
    collect_provenance,
    default_name,
    find_begun,
    is_run,
    latest_checkpoint,
    load_checkpoint,
    read_table,
    remove_temporaries,
    save_checkpoint,
    trim_measurements,
    trim_table,
    write_file,
    write_layout,
    write_provenance,
)

__all__ = ["CHECKS", "FREE_TO_CHANGE", "Plan", "RunResult", "complete", "prepare", "resume", "train"]

# Settings of a recorded run that a resume may change, because no result depends on them.
FREE_TO_CHANGE = {
    "data.workers",
    "data.dir",
    "data.download",
    "device",
    "allocator",
    "train.epochs",
    "train.rank_timeout",
    "train.save_memory",
    "train.shard_optimizer",
}


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
        config: the run; or give the common options by name: `train(model="resnet20", norm="l1", epochs=3)`.
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
    elif options:
        raise UserError(f"give a config or options, not both: {', '.join(options)}")
    with joined(timeout=config.train.rank_timeout) as group:
        begun = group.alone(lambda: _begun_before(config, group))
        if begun is not None:
            return _resume(group, Path(begun), event="restarted", command=command, on_progress=on_progress)
        plan = _build(config, group)
        folder = group.alone(lambda: str(_claim(plan, group, asked=config, command=command)))
        return _execute(plan, Path(folder), group, best=None, on_progress=on_progress)


def resume(
    folder: Path,
    *,
    options: Mapping[str, Any] | None = None,
    overrides: Sequence[str] = (),
    extend: bool = False,
    command: Sequence[str] | None = None,
    on_progress: OnProgress | None = None,
) -> RunResult:
    """Continue a recorded run from its last checkpoint, or from the beginning when it has none.

    On as many processes as it ran on before, or on others: the images and the batches stay the same.

    Args:
        options, overrides: as for `load_config`; they may repeat the run's settings or change where and how far it
            runs (`FREE_TO_CHANGE`), nothing else.
        extend: allow another number of epochs although the schedule is relative to it; it is planned anew.

    Raises:
        UserError: not a run, settings that contradict it, data that changed, a damaged checkpoint.
    """
    with joined(timeout=TIMEOUT) as group:
        return _resume(
            group,
            folder,
            options=options,
            overrides=overrides,
            extend=extend,
            command=command,
            on_progress=on_progress,
        )


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
    folder = claim_run_folder(Path(plan.config.output), asked.name, default, again=ranks.continues)
    write_file(folder / "config.yaml", dump_config(plan.config))
    launch = None if ranks.launch is None else {"id": ranks.launch, "settings": _settings(asked)}
    provenance = collect_provenance(
        list(command or []),
        device=str(plan.state.device),
        **made_of(plan),
        processes={"world": group.world, "launcher": ranks.launcher},
        launch=launch,
    )
    write_provenance(folder, provenance)
    return folder


def _resume(
    group: Group,
    folder: Path,
    *,
    options: Mapping[str, Any] | None = None,
    overrides: Sequence[str] = (),
    extend: bool = False,
    command: Sequence[str] | None,
    on_progress: OnProgress | None,
    event: str = "resumed",
) -> RunResult:
    # The first rank reads; the others need not see the folder.
    read = group.alone(lambda: _read_run(folder, options or {}, overrides))
    config, recorded = (RunConfig.model_validate(read[key]) for key in ("config", "recorded"))
    group.wait_no_longer_than(config.train.rank_timeout)
    last = read["last"]
    plan = _build(config, group, restored=last is not None)
    best, done = None, 0
    if last is not None:
        checkpoints: list[Checkpoint] = []
        saved = group.alone(lambda: _read_checkpoint(plan, Path(last), folder, checkpoints))
        done, best, numbers = saved["epoch"], saved["best"], saved["training"]
        group.alone(lambda: _check_length(plan, recorded, done, extend))
        model, training = (
            group.tensors_of_first(getattr(checkpoints[0], part) if checkpoints else {})
            for part in ("model", "training")
        )
        group.together(lambda: plan.state.load(model, training, numbers, seed=config.seed))
        plan.state.notes += _differences_of_ranks(numbers.get("world", 1), group.world)
    happened = {"event": event, "epoch": done, "epochs": plan.config.train.epochs, "command": list(command or [])}
    if group.world > 1:
        happened["processes"] = group.world
    group.alone(lambda: _take_up(plan, folder, recorded, done, happened))
    return _execute(plan, folder, group, best=best, on_progress=on_progress)


def _read_run(folder: Path, options: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Settings of a recorded run, as they are recorded and as they shall be from now on, and its last checkpoint."""
    if not is_run(folder):
        raise UserError(f"'{folder}' is no run folder: it needs config.yaml and provenance.json")
    recorded = load_config(folder / "config.yaml")
    config = load_config(folder / "config.yaml", options, overrides, CHECKS)
    before, after = flatten(recorded), flatten(config)
    problems = [
        f"{key}: the run in '{folder}' has {before[key]!r}, not {after[key]!r}; a resumed run keeps its settings"
        for key in differences(recorded, config)
        if key not in FREE_TO_CHANGE
    ]
    if problems:
        raise UserError(*problems)
    last = latest_checkpoint(folder)
    return {
        "config": config.model_dump(mode="json"),
        "recorded": recorded.model_dump(mode="json"),
        "last": None if last is None else str(last),
    }


def _read_checkpoint(plan: Plan, last: Path, folder: Path, found: list[Checkpoint]) -> dict[str, Any]:
    """The state of a checkpoint; the checkpoint itself goes to `found`."""
    checkpoint = load_checkpoint(last)
    if checkpoint.state["data"]["fingerprint"] != plan.dataset.fingerprint:
        raise UserError(
            f"the data of '{plan.config.data.name}' is not what '{folder}' was trained on; see provenance.json"
        )
    found.append(checkpoint)
    return checkpoint.state


def _check_length(plan: Plan, recorded: RunConfig, done: int, extend: bool) -> None:
    epochs, planned = plan.config.train.epochs, recorded.train.epochs
    assert epochs is not None
    if epochs < done:
        raise UserError(f"train.epochs: {epochs} epochs asked for, but the run has done {done} already")
    if epochs != planned and plan.regime.relative and not extend:
        raise UserError(
            f"train.epochs: the run was planned for {planned} epochs and its schedule is relative to that; "
            f"--extend plans it anew for {epochs}"
        )


def _differences_of_ranks(before: int, now: int) -> list[str]:
    """What a log says of a run that goes on with another number of processes."""
    if before == now:
        return []
    return [
        f"continued on {now} processes, saved by {before}: images, batches and learning rates stay the same; sums are "
        "rounded in another order, dropout draws otherwise on other processes, and norms that are not synchronised "
        "see other parts of a batch"
    ]


def _take_up(plan: Plan, folder: Path, recorded: RunConfig, done: int, event: dict[str, Any]) -> None:
    """Bring the record back to where the checkpoint stands, and note what happens."""
    config = plan.config
    remove_temporaries(folder)
    trim_table(folder / "results.csv", done)
    trim_measurements(folder, done)
    changed = differences(recorded, config)
    if changed:
        write_file(folder / "config.yaml", dump_config(config))
        before, after = flatten(recorded), flatten(config)
        event = {**event, "changed": {key: [before[key], after[key]] for key in changed}}
    append_event(folder, event)


def _execute(
    plan: Plan, folder: Path, group: Group, *, best: dict[str, Any] | None, on_progress: OnProgress | None
) -> RunResult:
    """Train from where the state stands, recording every epoch; the report is written however it ends."""
    log = RunLog(folder / "log.txt")
    if not group.first:
        on_progress = None
    group.alone(lambda: _open_log(plan, log))
    if on_progress:
        clock = plan.state.clock
        on_progress(Progress("start", clock.epoch + 1, clock.epochs, message=f"{folder}: {headline(plan)}"))
    try:
        _train_and_record(plan, folder, group, log, best=best, on_progress=on_progress)
    except BaseException as error:
        if group.first:
            # The first error is the one to show: a full disk also refuses this line.
            with contextlib.suppress(StorageError):
                told = explained(error, group.ranks) if isinstance(error, Exception) else error
                log.write(f"stopped: {type(told).__name__}: {told}")
                if isinstance(error, KeyboardInterrupt | NumericalError):
                    _write_report(folder)
        raise
    finally:
        # Not left to the end of the interpreter, where a worker's end can meet anything.
        plan.train.close()
        plan.val.close()
    rows, report = group.alone(lambda: _finish(folder, log))
    return RunResult(folder, rows, Path(report), rows[-1])


def _open_log(plan: Plan, log: RunLog) -> None:
    for warning in plan.regime.unreached(plan.state.clock):
        log.write(f"warning: {warning}")
    log.write(headline(plan))
    for note in plan.state.notes:
        log.write(note)


def _finish(folder: Path, log: RunLog) -> tuple[list[dict[str, Any]], str]:
    """Write the report; the rows of the table, and the report's path."""
    log.write("done")
    return read_table(folder / "results.csv"), str(_write_report(folder))


def _write_report(folder: Path) -> Path:
    # It needs bokeh and pandas, whose import the first step must not wait for.
    from norm_matters.report import write_report

    return write_report(folder)


def _train_and_record(
    plan: Plan,
    folder: Path,
    group: Group,
    log: RunLog,
    *,
    best: dict[str, Any] | None,
    on_progress: OnProgress | None,
) -> None:
    train_config, state = plan.config.train, plan.state
    options = StepOptions(
        train_config.accumulate,
        train_config.clip_norm,
        train_config.label_smoothing,
        train_config.nonfinite,
        train_config.save_memory,
    )
    level = train_config.instruments
    instruments = None if level == "none" else Instruments(state, level=level)
    if instruments:
        group.alone(lambda: write_layout(folder, instruments.columns))

    def record(row: dict[str, Any], training: Mapping[str, Any], numbers: dict[str, Any]) -> dict[str, Any]:
        """Write what an epoch gave, and a checkpoint; the best epoch so far."""
        append_row(folder / "results.csv", row)
        if instruments:
            append_measurements(folder, row["epoch"], instruments.row)
        log.write(" ".join(f"{key}={value:g}" for key, value in row.items() if value is not None))
        for note in state.notes:
            log.write(note)
        for incident in state.incidents:
            log.write(f"warning: {incident}")
        improved = best is None or row["val_error1"] < best["val_error1"]
        standing = {"epoch": row["epoch"], "val_error1": row["val_error1"]} if improved else best
        assert standing is not None
        save_checkpoint(
            folder,
            step=state.clock.step,
            model=state.model_tensors(),
            training=training,
            state=saved_state(plan, numbers, epoch=row["epoch"], best=standing),
            best=improved,
        )
        return standing

    state.notes.clear()
    rows = training_rows(
        state, train=plan.train, val=plan.val, options=options, instruments=instruments, on_progress=on_progress
    )
    for row in rows:
        # Gathered from all ranks; written by the first.
        training, numbers = state.training_tensors(), state.numbers()
        best = group.alone(lambda: record(row, training, numbers))  # noqa: B023 (called at once)
        state.notes.clear()
        state.incidents.clear()
        if on_progress:
            on_progress(Progress("epoch", row["epoch"], state.clock.epochs, row=row))


def _dotted(options: Mapping[str, Any]) -> dict[str, Any]:
    for name in options:
        if name not in OPTION_KEYS:
            raise UserError(f"unknown option '{name}'{nearest(name, OPTION_KEYS)}")
    return {OPTION_KEYS[name]: value for name, value in options.items()}
