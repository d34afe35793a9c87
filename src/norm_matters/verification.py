"""Whether a recorded run can be done again: its first steps are trained anew and compared with what it recorded."""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from norm_matters.core.config import RunConfig, flatten, load_config
from norm_matters.core.distributed import Group
from norm_matters.core.errors import UserError
from norm_matters.core.joining import joined
from norm_matters.engine.loop import training_rows
from norm_matters.engine.trace import EnoughStepsError, Fingerprint, Trace
from norm_matters.plan import CHECKS, Plan, made_of, prepare, step_options
from norm_matters.record import collect_provenance, is_run, read_provenance
from norm_matters.record.trace import TRACE_FILE, read_trace
from norm_matters.resuming import same_source

STEPS = 20
"""How many steps are trained anew unless somebody says."""

_FACTS: Mapping[str, Sequence[str]] = {
    "code": ("package.version", "package.commit", "model.source.sha256"),
    "data": ("data.fingerprint",),
    "initial weights": ("model.initial_weights.sha256",),
    "versions": ("versions",),
    "device": ("machine.device", "machine.device_name", "machine.cuda", "machine.cpu", "machine.platform"),
    "threads": ("machine.threads",),
    "kernels": ("kernels", "allocator"),
    "processes": ("processes.world",),
}
"""What a result depends on beside its settings, and where the provenance says it."""


@dataclass(frozen=True)
class Difference:
    """Something that is not as it was: of a kind (`code`, `data`, `versions` ...), in the provenance and now."""

    kind: str
    fact: str
    recorded: Any
    found: Any


@dataclass(frozen=True)
class StepCheck:
    """A step as it was recorded, and as it came out now."""

    recorded: Fingerprint
    found: Fingerprint

    @property
    def step(self) -> int:
        """Its number, from 1."""
        return self.recorded.step

    @property
    def equal(self) -> bool:
        """Whether loss and weights are the same to the bit."""
        return repr(self.recorded) == repr(self.found)  # as text, in which NaN is equal to itself

    @property
    def loss_difference(self) -> float:
        """Of the losses: now less then."""
        return self.found.loss - self.recorded.loss

    @property
    def weight_difference(self) -> float:
        """Of the norms of the weights, relative to that recorded; it may be 0 where single weights differ."""
        return (self.found.weight_norm - self.recorded.weight_norm) / (self.recorded.weight_norm or 1.0)


@dataclass(frozen=True)
class Verification:
    """What `verify` found.

    Attributes:
        checks: the recorded steps that were done again, in order.
        differences: what code, data, versions and machine have in common with the recording no longer.
    """

    checks: list[StepCheck]
    differences: list[Difference]

    @property
    def equal(self) -> bool:
        """Whether every step came out to the bit."""
        return all(check.equal for check in self.checks)

    @property
    def first_difference(self) -> StepCheck | None:
        """The first step that came out otherwise."""
        return next((check for check in self.checks if not check.equal), None)


def verify(
    run: Path | str,
    *,
    steps: int = STEPS,
    data_dir: str | None = None,
    dataset: str | None = None,
    device: str = "",
) -> Verification:
    """Train the first steps of a run anew, and compare losses and weights with its trace. The run is left untouched.

    Started by torchrun or srun, the ranks train together as those of the run did.

    Args:
        run: its folder, wherever it lies now.
        steps: how many to train at most; the last that is compared is the last with a fingerprint among them.
        data_dir: where a dataset with a name of its own lies now, such as `cifar10`.
        dataset: where one that is named by its place lies now: `imagefolder:NEW` for a run of `imagefolder:OLD`.
        device: another than the run's own.

    Raises:
        UserError: no run, one without a trace, or its settings, data or model file cannot be used any more.
    """
    moved = {"data.dir": data_dir, "data.name": dataset, "device": device}
    with joined() as group:
        folder = Path(run)
        read = group.alone(lambda: _read(folder, steps, {key: value for key, value in moved.items() if value}))
        config = RunConfig.model_validate(read["config"])
        plan = group.together(lambda: prepare(config, ranks=group.ranks))
        plan.state.join(group, seed=config.seed, shard_optimizer=config.train.shard_optimizer)
        recorded = [Fingerprint(*row) for row in read["trace"] if read["planned"] is None or row[0] <= read["planned"]]
        if not recorded:
            raise UserError(f"'{run}' was planned anew before the first step that could be compared")
        try:
            checks = _train(plan, recorded)
        finally:
            plan.train.close()
            plan.val.close()
        if group.first and len(checks) < len(recorded):
            raise UserError(f"'{run}' ends today after step {plan.state.clock.step}, before its last recorded one")
        return Verification(checks, _differences(plan, group, read["provenance"]))


def _read(folder: Path, steps: int, moved: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that a run began with, its provenance, and the fingerprints to compare with; in JSON types.

    `planned` is up to which step these settings hold; None where they hold to the end.
    """
    if not is_run(folder):
        raise UserError(f"'{folder}' is no run folder: it needs config.yaml and provenance.json")
    provenance = read_provenance(folder)
    settings = flatten(load_config(folder / "config.yaml"))
    name = settings["data.name"]
    if not same_source(name, moved.get("data.name", name)):
        source, colon, _ = name.partition(":")
        hint = f"write {source}:PATH" if colon else "--data-dir says where it lies"
        raise UserError(f"--dataset: '{moved['data.name']}' is no other place of '{name}'; {hint}")
    events = [_mapping(event) for event in _listed(provenance.get("events"))]
    settings["train.epochs"], planned = _first_plan(events, settings["train.epochs"])
    config = load_config(options={**settings, **moved}, checks=CHECKS)
    trace = read_trace(folder)
    if not trace:
        raise UserError(f"'{folder}' has no {TRACE_FILE} with which its steps could be compared")
    rows = [row for row in trace if row[0] <= steps]
    if not rows:
        raise UserError(f"--steps: value {steps} is not valid; the first recorded step is {trace[0][0]}")
    return {
        "config": config.model_dump(mode="json"),
        "provenance": provenance,
        "trace": rows,
        "planned": planned,
    }


def _first_plan(events: Sequence[Mapping[str, Any]], epochs: Any) -> tuple[Any, int | None]:
    """For how many epochs the first steps of the record were planned, and up to which step; None for all of them.

    Args:
        events: of the run, in order; each went back to a step, and what had been trained after it was lost.
        epochs: as the settings have them now.
    """
    changes = [_mapping(event.get("changed")).get("train.epochs") for event in events]
    first = next((change for change in changes if isinstance(change, list) and len(change) == 2), [epochs])[0]
    plans: list[tuple[int, Any]] = [(0, first)]
    for event in events:
        step, planned = event.get("step"), event.get("epochs")
        if type(step) is not int or type(planned) is not int:
            continue
        plans = [plan for plan in plans if plan[0] < step]
        if not plans or plans[-1][1] != planned:
            plans.append((step, planned))
    return plans[0][1], plans[1][0] if len(plans) > 1 else None


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _train(plan: Plan, recorded: Sequence[Fingerprint]) -> list[StepCheck]:
    """Train up to the last recorded step; what came out, on the first rank."""
    before = {each.step: each for each in recorded}
    checks: list[StepCheck] = []

    def compare(found: Fingerprint) -> None:
        if found.step in before:
            checks.append(StepCheck(before[found.step], found))

    rows = training_rows(
        plan.state,
        train=plan.train,
        val=plan.val,
        options=step_options(plan.config.train),
        trace=Trace(compare, until=max(before)),
    )
    with suppress(EnoughStepsError):
        for _ in rows:
            pass
    return checks


def _differences(plan: Plan, group: Group, recorded: Mapping[str, Any]) -> list[Difference]:
    """What the provenance of the run would say otherwise today."""
    found = collect_provenance([], device=str(plan.state.device), **made_of(plan), processes={"world": group.world})
    now = json.loads(json.dumps(found, default=str))
    differences = []
    for kind, keys in _FACTS.items():
        for key in keys:
            then, today = _leaves(_at(recorded, key), key), _leaves(_at(now, key), key)
            differences += [
                Difference(kind, leaf, then.get(leaf), today.get(leaf))
                for leaf in dict.fromkeys([*then, *today])
                if then.get(leaf) != today.get(leaf)
            ]
    # Of these it is known only that there were some: the code may be another although the commit is the same.
    dirty = bool(_at(recorded, "package.dirty")), bool(_at(now, "package.dirty"))
    if any(dirty):
        differences.append(Difference("code", "uncommitted changes", *dirty))
    return differences


def _at(facts: Mapping[str, Any], key: str) -> Any:
    value: Any = facts
    for part in key.split("."):
        value = _mapping(value).get(part)
    return value


def _leaves(value: Any, key: str) -> dict[str, Any]:
    """Dotted key -> value of what is nested in mappings."""
    if not isinstance(value, dict):
        return {key: value}
    return {leaf: item for name, inner in value.items() for leaf, item in _leaves(inner, f"{key}.{name}").items()}
