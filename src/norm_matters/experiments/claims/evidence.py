"""From run folders to evidence, and from evidence to the files that are kept: verdicts, setup, runs and tables."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from norm_matters.core.errors import UserError
from norm_matters.experiments.claims.planning import ExperimentPlan, Member, has_diverged
from norm_matters.experiments.claims.recipe import (
    LAST_QUARTER,
    Evidence,
    RunRecord,
    Table,
    Verdict,
    window_accuracy,
)
from norm_matters.experiments.standing import is_done, read_rows
from norm_matters.experiments.summary import table_csv
from norm_matters.record.files import make_folder, write_file

VERDICT_FILE = "verdict.json"
RUNS_FILE = "runs.csv"
SETUP_FILE = "setup.json"
"""The settings of every arm that has runs."""
RUN_COLUMNS = ("epoch", "train_loss", "val_loss", "train_error1", "val_error1", "lr", "seconds")
"""What runs.csv tells of an epoch."""
_FORMAT = 1
_ENTRIES = {
    "experiment": str,
    "claim": str,
    "verdict": str,
    "holds": bool | None,
    "sentence": str,
    "scale": str,
    "statistics": list,
    "seeds": list,
}
"""Of a verdict, with their types: what is read again."""


def gather(plan: ExperimentPlan, tables: Iterable[Table] = (), products: Sequence[float] = ()) -> Evidence:
    """What the runs of a plan have left.

    Args:
        tables: that were computed.
        products: see `Evidence`.
    """
    runs: dict[str, dict[int, RunRecord]] = {arm.name: {} for arm in plan.arms}
    for member in plan.comparing(plan.chosen()):
        runs[member.arm][member.seed] = _record_of(plan, member)
    found = {table.name: table for table in tables}
    if choices := _choices(plan):
        found[choices.name] = choices
    return Evidence(plan.recipe, plan.scale, runs, found, tuple(products))


def with_looks(evidence: Evidence) -> Evidence:
    """The evidence with the tables that the recipe makes from it, as far as there are runs."""
    look = evidence.recipe.look
    if look is None or not any(run.rows for runs in evidence.runs.values() for run in runs.values()):
        return evidence
    further = {table.name: table for table in look(evidence) if table.rows}
    return replace(evidence, tables={**evidence.tables, **further})


def judge(evidence: Evidence) -> list[Verdict]:
    """The verdict of each claim."""
    return [claim.judge(evidence) for claim in evidence.recipe.claims]


def write_verdicts(
    plan: ExperimentPlan,
    evidence: Evidence,
    verdicts: Sequence[Verdict],
    provenance: Mapping[str, Any],
    power: str = "",
) -> None:
    """Write `CLAIM/verdict.json` for each claim, runs.csv, setup.json and the tables into the plan's folder.

    Args:
        power: how many seeds there are, and how many a pilot asks for; a sentence.

    Raises:
        StorageError: it cannot be written.
    """
    make_folder(plan.folder)
    for claim, verdict in zip(plan.recipe.claims, verdicts, strict=True):
        seeds = [set(evidence.diverged(arm)) for arm in claim.arms]  # all that came to an end
        document = {
            "format": _FORMAT,
            "experiment": plan.recipe.id,
            "question": plan.recipe.question,
            "claim": claim.id,
            "statement": claim.statement,
            "paper": claim.paper,
            "rule": claim.rule,
            **findings_of(verdict),
            "seeds": sorted(set.intersection(*seeds)) if seeds else [],
            "power": power,
            "scale": plan.scale,
            "provenance": provenance,
        }
        make_folder(plan.folder / claim.id)
        write_verdict(plan.folder / claim.id / VERDICT_FILE, document)
    if rows := run_rows(evidence):
        write_file(plan.folder / RUNS_FILE, table_csv(rows))
        arms = {arm.name: plan.settings_of(arm) for arm in plan.arms if evidence.diverged(arm.name)}
        write_file(plan.folder / SETUP_FILE, json.dumps({"format": _FORMAT, "arms": plain(arms)}, indent=1) + "\n")
    for table in evidence.tables.values():
        write_file(plan.folder / f"{table.name}.csv", table_csv(table.rows))


def run_rows(evidence: Evidence) -> list[dict[str, Any]]:
    """The rows of runs.csv: every epoch of every run; one without numbers for a run that stopped in its first."""
    return [
        {"arm": arm, "seed": seed, "state": run.state, **{column: row.get(column) for column in RUN_COLUMNS}}
        for arm, runs in evidence.runs.items()
        for seed, run in runs.items()
        for row in run.rows or ([{}] if run.state == "diverged" else [])
    ]


def findings_of(verdict: Verdict) -> dict[str, Any]:
    """The entries of a verdict.json that the runs decide."""
    return {
        "verdict": verdict.word,
        "holds": verdict.holds,
        "sentence": verdict.sentence,
        "statistics": [asdict(finding) for finding in verdict.findings],
    }


def write_verdict(path: Path, document: Mapping[str, Any]) -> None:
    """Write a verdict.json."""
    write_file(path, json.dumps(plain(document), indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def provenance_of(plan: ExperimentPlan, command: Sequence[str]) -> dict[str, Any]:
    """What the verdicts depend on: this package and machine, and those of the runs, each kind once with their names."""
    from norm_matters.record.provenance import collect_provenance

    facts = collect_provenance(command)
    kinds: dict[str, dict[str, Any]] = {}
    for member in plan.comparing(plan.chosen()):
        kind = _kind_of(plan.runs / member.cell.name)
        if kind is not None:
            counted = kinds.setdefault(json.dumps(kind, sort_keys=True), {"runs": 0, "names": [], **kind})
            counted["runs"] += 1
            counted["names"].append(member.cell.name)
    keys = ("command", "started", "package", "versions", "machine")
    return {**{key: facts.get(key) for key in keys}, "runs": list(kinds.values())}


def read_verdicts(output: Path) -> list[dict[str, Any]]:
    """All the verdicts below a folder of experiments, in the order of their paths.

    Raises:
        UserError: a file is no verdict.
    """
    return [read_verdict(path) for path in sorted(output.glob(f"*/*/{VERDICT_FILE}"))]


def read_verdict(path: Path) -> dict[str, Any]:
    """A verdict.json.

    Raises:
        UserError: it is none.
    """
    try:
        document = json.loads(path.read_bytes())
        if document["format"] != _FORMAT:
            raise UserError(f"{path} is of format {document['format']!r}; this norm-matters reads {_FORMAT}")
        wrong = [name for name, kind in _ENTRIES.items() if not isinstance(document.get(name), kind)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: no verdict: {error}") from None
    if wrong:
        raise UserError(f"{path}: no verdict: it has no valid {', '.join(wrong)}")
    return document


def _record_of(plan: ExperimentPlan, member: Member) -> RunRecord:
    folder = plan.runs / member.cell.name
    rows = read_rows(folder)
    if is_done(folder, member.cell.epochs):
        accuracy = window_accuracy(rows, LAST_QUARTER)
        state = "done" if accuracy >= plan.recipe.diverged else "diverged"  # NaN is below everything
    elif has_diverged(folder):
        state = "diverged"
    else:
        state = "missing"
    return RunRecord(member.arm, member.seed, folder, state, rows)


def _choices(plan: ExperimentPlan) -> Table | None:
    """The runs by which arms have chosen a setting."""
    choice = plan.size.choice
    if choice is None:
        return None
    chosen = plan.chosen()
    rows = [
        {
            "arm": member.arm,
            choice.key: member.candidate,
            "seed": member.seed,
            "accuracy": accuracy,
            "chosen": int(chosen.get(member.arm) == member.candidate),
        }
        for member in plan.choosing()
        if (accuracy := plan.candidate_accuracy(member)) is not None
    ]
    note = (
        f"Accuracy (%) over the last quarter on {100 * choice.holdout:g}% of the training images, held back; 0: "
        "diverged. The best is what the arm is compared with."
    )
    return Table("choices", f"The choice of {choice.key}", rows, note) if rows else None


def _kind_of(folder: Path) -> dict[str, Any] | None:
    """Package, versions and machine of a run; None where there is none."""
    try:
        facts = json.loads((folder / "provenance.json").read_bytes())
    except (OSError, ValueError):
        return None
    if not isinstance(facts, dict):
        return None
    return {key: facts.get(key) for key in ("package", "versions", "machine")}


def plain(value: Any) -> Any:
    """The value without numbers that JSON has not: NaN is null, infinity a text."""
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value
