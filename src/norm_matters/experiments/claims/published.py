"""Verdicts and tables that were published, such as results/claims: what was run, where the run folders are gone.

Whoever publishes again adds to what lies there: an experiment can be made on several machines, arm by arm.
"""

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from norm_matters.core.errors import UserError
from norm_matters.experiments.cells import setting_text
from norm_matters.experiments.claims.evidence import (
    RUN_COLUMNS,
    RUNS_FILE,
    SETUP_FILE,
    VERDICT_FILE,
    findings_of,
    judge,
    plain,
    read_verdict,
    with_looks,
    write_verdict,
)
from norm_matters.experiments.claims.planning import ExperimentPlan
from norm_matters.experiments.claims.recipe import END_STATES, Evidence, Recipe, RunRecord, RunState, Table
from norm_matters.record.files import make_folder, write_file

_STATES: Mapping[str, RunState] = {state: state for state in (*END_STATES, "missing")}
_FREE = ("device", "data.dir", "data.download")
"""Settings that may differ between the machines of an experiment."""
_LONGEST = 60
"""Letters of a setting that is told in full."""


@dataclass(frozen=True)
class Published:
    """What lies in the folder of a published experiment.

    Attributes:
        folder: it.
        evidence: the runs; without tables.
        tables: name -> rows, as texts.
        provenance: of its verdicts.
    """

    folder: Path
    evidence: Evidence
    tables: Mapping[str, Sequence[Mapping[str, str]]]
    provenance: Mapping[str, Any]


def publish(plan: ExperimentPlan, target: Path) -> Path:
    """Copy the verdicts and tables of an experiment, without the runs, to a folder such as `results/claims`.

    Returns:
        the folder that holds them now.
    """
    folder = target / plan.name
    make_folder(folder)
    for path in sorted(plan.folder.rglob("*")):
        if path.suffix in (".csv", ".json") and path.is_file():
            make_folder((folder / path.relative_to(plan.folder)).parent)
            write_file(folder / path.relative_to(plan.folder), path.read_bytes())
    return folder


def read_published(plan: ExperimentPlan, target: Path) -> Published | None:
    """What of this experiment was published in a folder such as `results/claims`; None where no run was.

    Raises:
        UserError: it is damaged, or its runs had other settings.
    """
    folder = target / plan.name
    if not (folder / RUNS_FILE).exists():
        return None
    evidence = read_evidence(plan.recipe, plan.scale, folder)
    _check_settings(plan, evidence, folder / SETUP_FILE)
    verdicts = [read_verdict(path) for path in sorted(folder.glob(f"*/{VERDICT_FILE}"))]
    tables = {path.stem: _read_table(path) for path in sorted(folder.glob("*.csv")) if path.name != RUNS_FILE}
    provenance = verdicts[0].get("provenance") if verdicts else None
    return Published(folder, evidence, tables, provenance if isinstance(provenance, dict) else {})


def joined(evidence: Evidence, published: Published | None) -> Evidence:
    """The evidence with the runs that were published and are not here, and with its tables."""
    if published is None:
        return with_looks(evidence)
    chooses = evidence.recipe.scale(evidence.scale).choice is not None
    runs = {}
    for arm, own in evidence.runs.items():
        runs[arm] = dict(own)
        # An arm that chose again may have chosen something else: its runs are not mixed.
        if not (chooses and evidence.diverged(arm)):
            runs[arm] |= {seed: run for seed, run in _ended(published, arm).items() if not _has_ended(own.get(seed))}
    found = with_looks(replace(evidence, runs=runs))
    return replace(found, tables={name: _joined_table(table, published) for name, table in found.tables.items()})


def kept_runs(evidence: Evidence, published: Published) -> list[str]:
    """The names of the runs that were published and are not here."""
    return [
        f"{arm}-s{seed}"
        for arm, runs in evidence.runs.items()
        for seed, run in runs.items()
        if run.folder == published.folder
    ]


def joined_provenance(own: Mapping[str, Any], published: Published, kept: Sequence[str]) -> dict[str, Any]:
    """The provenance of the verdicts, with that of the runs that are kept, and the commands that made them."""
    kinds, earlier = list(own["runs"]), published.provenance
    for kind in earlier.get("runs") or []:
        names = [name for name in kind.get("names", ()) if name in kept]
        if names:
            kinds.append({**kind, "runs": len(names), "names": names})
    commands = [earlier.get("command"), *(earlier.get("earlier_commands") or [])]
    others = [command for index, command in enumerate(commands) if command and command not in commands[:index]]
    return {**own, "earlier_commands": [command for command in others if command != own.get("command")], "runs": kinds}


def read_evidence(recipe: Recipe, scale: str, folder: Path) -> Evidence:
    """The evidence that a published runs.csv holds: what was trained, without the run folders.

    Raises:
        UserError: the table is none of these.
    """
    path = folder / RUNS_FILE
    runs: dict[str, dict[int, RunRecord]] = {arm.name: {} for arm in recipe.arms_at(scale)}
    try:
        for row in _read_table(path):
            arm, seed = row["arm"], int(row["seed"])
            run = runs[arm].setdefault(seed, RunRecord(arm, seed, folder, _STATES[row["state"]], []))
            if row["epoch"]:
                numbers = {name: float(row[name]) for name in RUN_COLUMNS if row.get(name)}
                runs[arm][seed] = replace(run, rows=[*run.rows, {**numbers, "epoch": int(row["epoch"])}])
    except (ValueError, KeyError) as error:
        raise UserError(f"{path}: no table of the runs of {recipe.id}, {scale} scale: {error!r}") from None
    return Evidence(recipe, scale, runs)


def judge_again(recipe: Recipe, scale: str, folder: Path) -> None:
    """Put published verdicts into today's words, from their runs.csv; claims that had another rule stay as they are.

    Raises:
        UserError: a file is damaged.
        StorageError: it cannot be written.
    """
    verdicts = {verdict.claim: verdict for verdict in judge(read_evidence(recipe, scale, folder))}
    for claim in recipe.claims:
        path = folder / claim.id / VERDICT_FILE
        document = read_verdict(path)
        if document.get("rule") == claim.rule:
            write_verdict(path, {**document, **findings_of(verdicts[claim.id])})


def _ended(published: Published, arm: str) -> dict[int, RunRecord]:
    """Seed -> run, of the published runs of an arm that have come to an end."""
    return {seed: run for seed, run in published.evidence.runs.get(arm, {}).items() if _has_ended(run)}


def _has_ended(run: RunRecord | None) -> bool:
    return run is not None and run.state in END_STATES


def _joined_table(table: Table, published: Published) -> Table:
    """The table with the published rows of the arms that have none here."""
    here = {row.get("arm") for row in table.rows}
    kept = [row for row in published.tables.get(table.name, ()) if row.get("arm") not in here]
    if not kept or None in here:
        return table
    order = [arm.name for arm in published.evidence.recipe.arms]
    rows = [*table.rows, *({column: _value(cell) for column, cell in row.items()} for row in kept)]
    return replace(table, rows=sorted(rows, key=lambda row: order.index(row["arm"])))


def _value(cell: str) -> Any:
    """What a cell held: a number, a word or nothing."""
    for kind in (int, float):
        try:
            return kind(cell)
        except ValueError:
            pass
    return cell or None


def _read_table(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file.

    Raises:
        UserError: it cannot be read.
    """
    try:
        with path.open(newline="") as stream:
            return list(csv.DictReader(stream))
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None


def _check_settings(plan: ExperimentPlan, evidence: Evidence, path: Path) -> None:
    """Raise UserError where published runs had other settings than those of the plan."""
    try:
        arms = json.loads(path.read_bytes())["arms"]
        there = {arm: dict(arms[arm]) for arm in evidence.runs if evidence.diverged(arm)}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: no settings of the runs that were published there: {error!r}") from None
    problems = []
    for arm, settings in there.items():
        own = plain(plan.settings_of(plan.recipe.arm(arm)))
        others = [key for key in {**settings, **own} if settings.get(key) != own.get(key) and key not in _FREE]
        problems += [
            f"{path}: {arm} was run with {_told(key, settings)}, and is now run with {_told(key, own)}; publish to "
            "another folder, or remove this one"
            for key in others
        ]
    if problems:
        raise UserError(*problems)


def _told(key: str, settings: Mapping[str, Any]) -> str:
    """A setting in words."""
    text = setting_text(key, settings[key]) if key in settings else f"no {key}"
    return text if len(text) <= _LONGEST else f"{key}={text.partition('=')[2][:_LONGEST]}..."
