"""A recorded run taken up again: what may be changed, what is read, and how the record returns to the checkpoint."""

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from norm_matters.core.config import RunConfig, differences, dump_config, flatten, load_config
from norm_matters.core.errors import UserError, reading
from norm_matters.core.faults import fault_point
from norm_matters.datasets.entry import explain_change
from norm_matters.engine.memory import is_out_of_memory
from norm_matters.norms import takes_batch_statistics
from norm_matters.plan import CHECKS, Plan, complete
from norm_matters.record import (
    Checkpoint,
    append_event,
    check_room,
    has_checkpoints,
    newest_whole,
    read_table,
    set_aside,
    trim_measurements,
    trim_table,
    write_file,
)
from norm_matters.record.folder import CHECKPOINTS, check_links
from norm_matters.record.log import printable_line
from norm_matters.record.trace import trim_trace
from norm_matters.record.weight_norms import trim_weight_norms

Tensors = Mapping[str, Tensor]

# Settings of a recorded run that a resume may change, because no result depends on them; and see `same_source`.
FREE_TO_CHANGE = {
    "data.workers",
    "data.dir",
    "data.download",
    "data.bad_images",
    "data.links",
    "device",
    "allocator",
    "regime.norms",
    "train.epochs",
    "train.rank_timeout",
    "train.save_memory",
    "train.shard_optimizer",
    "train.checkpoint_every",
    "train.keep",
    "train.max_time",
}


def read_run(folder: Path, options: Mapping[str, Any], overrides: Sequence[str], *, restart: bool) -> dict[str, Any]:
    """Settings of a recorded run, as recorded and as they shall be from now on, and whether it has a checkpoint."""
    check_links(folder)
    recorded = load_config(folder / "config.yaml")
    config = load_config(folder / "config.yaml", options, overrides, CHECKS)
    if config.name == folder.resolve().name:
        config = config.model_copy(update={"name": recorded.name})
    # Both in the words of the record, which has paths in full: a setting may be repeated as it was first given.
    before, after = (
        flatten(complete(each, epochs=1)) | {"name": each.name, "train.epochs": each.train.epochs}
        for each in (recorded, config)
    )
    problems = [
        f"{key}: the run in '{folder}' has {before[key]!r}, not {after[key]!r}; a resumed run keeps its settings"
        for key in before
        if before[key] != after[key] and not _may_change(key, before[key], after[key])
    ]
    if problems:
        raise UserError(*problems)
    return {
        "config": config.model_dump(mode="json"),
        "recorded": recorded.model_dump(mode="json"),
        "saved": _has_checkpoints(folder, restart=restart),
    }


def _may_change(key: str, before: Any, after: Any) -> bool:
    return key in FREE_TO_CHANGE or (key == "data.name" and same_source(before, after))


def same_source(before: str, after: str) -> bool:
    """Whether two datasets differ in the place of their files at most: `imagefolder:A`, `imagefolder:B`.

    Whether the images there are the same is known by their fingerprint.
    """
    source, colon, _ = before.partition(":")
    return before == after or (bool(colon) and after.startswith(f"{source}:"))


def _has_checkpoints(folder: Path, *, restart: bool) -> bool:
    """Whether a run has checkpoints. One that had some, and has none any more, is not begun again unasked."""
    if has_checkpoints(folder):
        return True
    # A first row may be older than the first checkpoint: an epoch's row is written before it.
    epochs = len(read_table(folder / "results.csv"))
    if epochs > 1 and not restart:
        raise UserError(
            f"'{folder}' has no checkpoints any more, though {epochs} epochs were done; --restart begins the run again"
        )
    return False


def read_checkpoint(plan: Plan, folder: Path, found: list[Checkpoint], *, restart: bool) -> dict[str, Any]:
    """The newest checkpoint of a run that is whole; it goes to `found`.

    Args:
        restart: begin again where there is none.

    Returns:
        `state`: its state, or None; `damaged`: names of newer ones -> what is wrong; `taken`: its name, or None.

    Raises:
        UserError: none is whole; each is named. Or the data are not those of the run.
    """
    recovered = newest_whole(folder)
    if recovered.checkpoint is None:
        if not restart:
            raise UserError(
                f"no checkpoint of '{folder}' can be read; --restart begins the run again", *recovered.damaged.values()
            )
        return {"state": None, "damaged": recovered.damaged, "taken": None}
    state = recovered.checkpoint.state
    with reading(str(recovered.checkpoint.folder)):
        fingerprint = state["data"]["fingerprint"]
        # The name is that of a place, and the files may have moved.
        same = {**fingerprint, "name": None} == {**plan.dataset.fingerprint, "name": None}
        _check_saved(state)
    if not same:
        raise UserError(
            f"the data of '{plan.config.data.name}' is not what '{folder}' was trained on: "
            f"{explain_change(fingerprint, plan.dataset.fingerprint)}"
        )
    with reading(str(recovered.checkpoint.folder)):
        _check_position(plan, state)
    found.append(recovered.checkpoint)
    if recovered.best_lost:
        # Otherwise none that comes might be called the best, though the best is not there.
        state = {**state, "best": None}
    return {"state": state, "damaged": recovered.damaged, "taken": recovered.checkpoint.folder.name}


def _check_saved(state: Mapping[str, Any]) -> None:
    """Raise where what is read of a checkpoint's state by its name is not what it must be: it may be a stranger's."""
    best, numbers = state["best"], state["training"]
    counts = [state["epoch"], numbers["step"], numbers.get("world", 1)]
    if not all(type(count) is int and count >= 0 for count in counts):
        raise ValueError("epoch, step or world is no number")
    if best is not None and not (type(best["epoch"]) is int and isinstance(best["val_error1"], int | float)):
        raise ValueError("best is no epoch with its error")
    under_way, pieces = numbers.get("epoch"), numbers.get("pieces", [1])
    if under_way is not None and under_way["number"] != state["epoch"]:
        raise ValueError("the epoch under way does not follow those done")
    if not all(type(count) is int and count >= 1 for count in pieces):
        raise ValueError("pieces is no list of numbers")


def _check_position(plan: Plan, state: Mapping[str, Any]) -> None:
    """Raise where a checkpoint of a plan's data stands at no place that its training comes to.

    A stranger's would be trained on for ever, or in pieces of a batch that nothing can be done with.
    """
    numbers, steps = state["training"], plan.state.clock.steps_per_epoch
    first = state["epoch"] * steps
    last = first if numbers.get("epoch") is None else first + steps
    if not first <= numbers["step"] <= last:
        raise ValueError(f"step {numbers['step']} is none of {first} to {last}, with {state['epoch']} epochs done")
    pieces = max(numbers.get("pieces", [1]))
    if pieces > (1 if takes_batch_statistics(plan.built.module) else plan.config.data.batch_size):
        raise ValueError(f"a batch is never taken in {pieces} pieces")


def check_length(plan: Plan, recorded: RunConfig, saved: Mapping[str, Any], *, extend: bool) -> None:
    """Raise UserError where a run cannot go on to as many epochs as it is asked for.

    Args:
        recorded: its settings as recorded.
        saved: the state of its checkpoint.
    """
    epochs, planned = plan.config.train.epochs, recorded.train.epochs
    assert epochs is not None
    done, under_way = saved["epoch"], saved["training"].get("epoch") is not None
    if epochs < done + under_way:
        how = f"is in epoch {done + 1}" if under_way else f"has done {done}"
        raise UserError(f"train.epochs: {epochs} epochs asked for, but the run {how} already")
    if epochs != planned and plan.regime.relative and not extend:
        raise UserError(
            f"train.epochs: the run was planned for {planned} epochs and its schedule is relative to that; "
            f"--extend plans it anew for {epochs}"
        )


def load_state(plan: Plan, folder: Path, model: Tensors, training: Tensors, numbers: Mapping[str, Any]) -> None:
    """Bring a plan to where a checkpoint stands.

    Raises:
        UserError: the checkpoint is of another network, or lacks something; or there is no memory for it.
    """
    no_memory = None
    with reading(f"the checkpoint of '{folder}'"):
        try:
            plan.state.load(model, training, numbers, seed=plan.config.seed)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            no_memory = error
    if no_memory:
        # Not in there, where it would be told as damage.
        reason = " ".join(str(no_memory).split())[:200]
        raise UserError(f"device: there is no memory on {plan.state.device} for the state of '{folder}': {reason}")


def differences_of_ranks(before: int, now: int) -> list[str]:
    """What a log says of a run that goes on with another number of processes."""
    if before == now:
        return []
    return [
        f"continued on {now} processes, saved by {before}: images, batches and learning rates stay the same; sums are "
        "rounded in another order, dropout draws otherwise on other processes, and norms that are not synchronised "
        "see other parts of a batch"
    ]


def notes_on_damage(read: Mapping[str, Any], plan: Plan) -> list[str]:
    """What a log says of damaged checkpoints.

    Args:
        read: what `read_checkpoint` returned.
        plan: its state is that of the checkpoint.
    """
    return [f"warning: {problem}; going on {_from_where(plan)}" for problem in read["damaged"].values()]


def _from_where(plan: Plan) -> str:
    step = plan.state.clock.step
    return f"from the checkpoint of step {step}" if step else "from the beginning"


def take_up(plan: Plan, folder: Path, recorded: RunConfig, read: Mapping[str, Any], event: dict[str, Any]) -> None:
    """Bring the record back to where the checkpoint stands, and note what happens.

    Args:
        plan: its state is that of the checkpoint.
        recorded: the settings as recorded.
        read: what `read_checkpoint` returned.
        event: for `provenance.json`.

    Raises:
        UserError: a file of the record is damaged; or the table is lost, and nothing is left to train.
    """
    config = plan.config
    done = read["state"]["epoch"] if read["state"] else 0
    _note_missing_rows(plan, folder / "results.csv", done)
    event |= {"epoch": done, "step": plan.state.clock.step, "epochs": config.train.epochs}
    fault_point("restore")
    if read["damaged"]:
        event |= {"damaged": read["damaged"]}
        for note in notes_on_damage(read, plan):
            print(printable_line(note), file=sys.stderr)
        set_aside(folder, read["damaged"], folder / CHECKPOINTS / read["taken"] if read["taken"] else None)
    check_room(folder, plan.state.checkpoint_bytes())
    trim_table(folder / "results.csv", done)
    trim_measurements(folder, done)
    trim_weight_norms(folder, done)
    trim_trace(folder, plan.state.clock.step)
    changed = differences(recorded, config)
    if changed:
        before, after = flatten(recorded), flatten(config)
        event = {**event, "changed": {key: [before[key], after[key]] for key in changed}}
    # First the event: killed between the two, a run has a change told twice, and never one of which nothing is known.
    append_event(folder, event)
    if changed:
        write_file(folder / "config.yaml", dump_config(config))


def _note_missing_rows(plan: Plan, table: Path, done: int) -> None:
    """Tell of a table that lacks epochs which the checkpoint has behind it: nobody can make their rows again.

    Raises:
        UserError: it lacks all of them, and no further row will come.
    """
    rows = [row.get("epoch") for row in read_table(table)]
    kept = [epoch for epoch in rows if (epoch or math.inf) <= done]
    if kept == list(range(1, done + 1)):
        return
    lacks = f"{table} has {len(kept)} rows of the {done} epochs that were done"
    if not kept and done >= plan.state.clock.epochs:
        raise UserError(f"{lacks}, and nothing is left to train; put it back, or train on with more --epochs")
    note = f"warning: {lacks}; the others are lost, the training goes on as it would have"
    print(printable_line(note), file=sys.stderr)
    plan.state.notes.append(note)
