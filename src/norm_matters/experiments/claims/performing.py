"""An experiment from plan to page: runs, evidence, verdicts, files. The file that joins this package."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

from norm_matters.core.config import DataConfig
from norm_matters.core.errors import UserError
from norm_matters.experiments.claims import RECIPES
from norm_matters.experiments.claims.evidence import (
    gather,
    judge,
    provenance_of,
    write_verdicts,
)
from norm_matters.experiments.claims.phases import PhaseProduct, phase_products
from norm_matters.experiments.claims.planning import ExperimentPlan, Member, plan_experiment
from norm_matters.experiments.claims.published import (
    joined,
    joined_provenance,
    kept_runs,
    publish,
    read_published,
)
from norm_matters.experiments.claims.recipe import Evidence, Verdict
from norm_matters.experiments.equivalence import MOST_ASKED, seeds_for_power
from norm_matters.experiments.executors import Placement, make_executor, parallel_runs
from norm_matters.experiments.pace import Estimate, estimate
from norm_matters.experiments.runner import OnChange, run_cells, runs_of
from norm_matters.experiments.statistics import mean_interval
from norm_matters.record.files import make_folder, write_file

PILOT_SEEDS = range(2000, 2003)
"""Seeds that no comparison uses."""
MOST_SEEDS = 20
_PILOT_FILE = "pilot.json"


@dataclass(frozen=True)
class Pilot:
    """What a few runs of the baseline and one arm say of the seeds that are needed.

    Attributes:
        sd: standard deviation of the paired differences, in points.
        n: pairs it is taken from.
        arm: beside the baseline.
        seeds: for 80% power at half the margin.
    """

    sd: float
    n: int
    arm: str
    seeds: int


@dataclass(frozen=True)
class Result:
    """What an experiment left.

    Attributes:
        verdicts: one for each claim.
        evidence: what they were made from.
        page: the HTML page.
        failed: runs that failed, and why; those that diverged are no failures.
        kept: the names of runs that are not here, but were published before.
    """

    verdicts: Sequence[Verdict]
    evidence: Evidence
    page: Path
    failed: Mapping[str, str] = field(default_factory=dict)
    kept: Sequence[str] = ()


def reproduce(
    experiment: str,
    *,
    scale: str = "small",
    output: Path | str = "reproduced",
    arms: Sequence[str] = (),
    seeds: int | None = None,
    dataset: str | None = None,
    data_dir: str | None = None,
    download: bool = False,
    device: str | None = None,
    executor: str | None = None,
    jobs: int | None = None,
    threads: int = 1,
    command: Sequence[str] = (),
    on_change: OnChange | None = None,
) -> Result:
    """Run an experiment on a claim of the paper as far as it has not been run, and say what came out.

    Args:
        experiment: such as `wd`; see `norm-matters reproduce list`.
        scale: `smoke`, `small` or `paper`.
        output: folder of the pages, the verdicts and the runs.
        arms: names; all unless given.
        seeds: how many; the recipe's or the pilot's unless given.
        dataset, data_dir, download, device: where the images are, and what to compute on.
        executor, jobs, threads: see `Placement`; `inline` at smoke scale, else `local`, unless given.
        command: the command line, for the record.
        on_change: called as runs go on.

    Raises:
        UserError: anything that is wrong with the input; then nothing has been run.
    """
    placement = Placement(executor or usual_executor(scale), jobs, threads)
    plan = plan_from(
        experiment,
        scale=scale,
        output=Path(output),
        arms=arms,
        seeds=seeds,
        given=user_settings(dataset=dataset, data_dir=data_dir, download=download, device=device),
        placement=placement,
    )
    return perform(plan, command=command, on_change=on_change)


def usual_executor(scale: str) -> str:
    """Where the runs are unless the user says: those of the smoke scale are over before a process has started."""
    return "inline" if scale == "smoke" else "local"


def user_settings(
    *, dataset: str | None, data_dir: str | None, download: bool = False, device: str | None = None
) -> dict[str, Any]:
    """Dotted key -> value of what a user has named."""
    named = {"data.name": dataset, "data.dir": data_dir, "data.download": download or None, "device": device}
    return {key: value for key, value in named.items() if value is not None}


def plan_from(
    experiment: str,
    *,
    scale: str,
    output: Path,
    arms: Sequence[str] = (),
    seeds: int | None = None,
    given: Mapping[str, Any] | None = None,
    placement: Placement | None = None,
) -> ExperimentPlan:
    """The plan of an experiment by its name, with as many seeds as a pilot in the output folder asks for.

    Raises:
        UserError: see `plan_experiment`.
    """
    recipe = RECIPES.get(experiment)
    plan = plan_experiment(recipe, scale, output=output, arms=arms, seeds=seeds, given=given, placement=placement)
    pilot = read_pilot(plan)
    if seeds is None and pilot is not None:
        count = min(MOST_SEEDS, max(pilot.seeds, len(plan.seeds)))
        plan = replace(plan, seeds=range(count))
    return plan


def check_images(plan: ExperimentPlan) -> int:
    """Read the images; the optimizer steps of an epoch.

    Raises:
        UserError: they cannot be read; says how to name them.
    """
    data = plan.comparing()[0].cell.config.data
    try:
        count = _training_images(data.model_dump_json())
    except UserError as error:
        hint = "name the images with --dataset (such as parquet:FOLDER) or --data-dir"
        raise UserError(*(f"{plan.recipe.id} {plan.scale}: {problem}; {hint}" for problem in error.problems)) from None
    return max(1, count // data.batch_size)


@cache
def _training_images(data: str) -> int:
    """How many there are in the dataset of a `DataConfig` in JSON."""
    from norm_matters.datasets import load_dataset

    return len(load_dataset(DataConfig.model_validate_json(data)).train)


def products_of(plan: ExperimentPlan, steps_per_epoch: int) -> list[PhaseProduct]:
    """`2 lr lambda T / (1 - m)` of each phase of the arm that must come to equilibrium; empty where none must."""
    arm = plan.recipe.equilibrium
    config = next((member.cell.config for member in plan.comparing() if member.arm == arm), None)
    return [] if config is None else phase_products(config, steps_per_epoch=steps_per_epoch)


def estimate_time(plan: ExperimentPlan) -> Estimate:
    """How long the plan takes; may train a few steps of each kind of run."""
    work = [
        (standing.cell, standing.cell.epochs - len(standing.rows))
        for members in (plan.choosing(), plan.comparing(plan.chosen()))
        for standing in plan.standings(members)
        if standing.status in ("new", "cut off")
    ]
    parallel = parallel_runs(plan.placement, [cell.config for cell, _ in work])
    return estimate(work, plan.runs, parallel=parallel, threads=plan.placement.threads)


def perform(
    plan: ExperimentPlan,
    *,
    command: Sequence[str] = (),
    retries: int = 0,
    on_change: OnChange | None = None,
    publish_to: Path | None = None,
) -> Result:
    """Run what is left of a plan, and write verdicts, tables and pages; also, with what is there, when interrupted.

    Args:
        publish_to: folder to copy verdicts and tables to; runs that were published there before, of the same settings,
            are part of the evidence.

    Raises:
        UserError: what was published there is damaged, or had other settings; then nothing has been run.
        KeyboardInterrupt: after the runs have ended, and everything has been written.
    """
    products: list[float] = []
    if plan.recipe.arms:
        products = [each.product for each in products_of(plan.whole(), check_images(plan))]

    published = None if publish_to is None else read_published(plan, publish_to)
    make_folder(plan.output)
    if publish_to is not None:
        make_folder(publish_to)  # that it cannot be written must not be told hours later
    device = str(plan.given.get("device", "auto"))
    tables = list(plan.recipe.compute(plan.scale, device)) if plan.recipe.compute else []

    def finish(failed: Mapping[str, str], *, interrupted: bool = False) -> Result:
        whole = plan.whole()
        evidence = joined(gather(whole, tables, products), published)
        verdicts = judge(evidence)
        provenance = provenance_of(whole, command)
        kept = [] if published is None else kept_runs(evidence, published)
        if published is not None and kept:
            provenance = joined_provenance(provenance, published, kept)
        write_verdicts(whole, evidence, verdicts, provenance, seeds_sentence(plan) if plan.recipe.arms else "")
        if publish_to is not None and not interrupted:
            publish(plan, publish_to)
        from norm_matters.experiments.claims.pages import write_index, write_page

        page = write_page(whole, evidence, verdicts, provenance, failed, seeds_sentence(plan))
        write_index(plan.output)
        return Result(verdicts, evidence, page, failed, kept)

    failed: dict[str, str] = {}
    try:
        if plan.recipe.arms:
            failed |= _run(plan, plan.choosing(), retries, on_change)
            if not failed:
                failed |= _run(plan, plan.comparing(plan.chosen()), retries, on_change)
    except KeyboardInterrupt:
        finish(failed, interrupted=True)
        raise
    return finish(failed)


def pilot_of(plan: ExperimentPlan) -> ExperimentPlan:
    """The runs of a pilot: the baseline and the first arm that a claim sets beside it, with seeds of their own.

    Raises:
        UserError: there is nothing to compare.
    """
    recipe, known = plan.recipe, {arm.name: arm for arm in plan.arms}
    named = (name for claim in recipe.claims for name in claim.arms if name != recipe.baseline)
    other = next((name for name in named if name in known and not known[name].after), None)
    if other is None or recipe.baseline not in known:
        raise UserError(f"--pilot: {recipe.id} has no two arms to compare")
    return replace(plan, arms=[known[recipe.baseline], known[other]], seeds=PILOT_SEEDS)


def run_pilot(plan: ExperimentPlan, *, on_change: OnChange | None = None) -> Pilot:
    """Train the baseline and an arm that a claim sets beside it, and say how many seeds are needed.

    Raises:
        UserError: there is nothing to compare, or the runs have failed.
    """
    recipe = plan.recipe
    small = pilot_of(plan)
    make_folder(plan.output)
    failed = _run(small, small.choosing(), 0, on_change) or _run(small, small.comparing(small.chosen()), 0, on_change)
    if failed:
        raise UserError(*(f"{name}: {error}" for name, error in failed.items()))
    evidence = gather(small)
    (other,) = (arm.name for arm in small.arms if arm.name != recipe.baseline)
    own, base = (evidence.accuracy(name) for name in (other, recipe.baseline))
    spread = mean_interval([own[seed] - base[seed] for seed in own if seed in base])
    if spread.n < 2:
        raise UserError("--pilot: its runs diverged; they say nothing of the spread")
    seeds = seeds_for_power(spread.sd, margin=recipe.margin)
    document = {"sd": spread.sd, "n": spread.n, "arm": other, "seeds": seeds}
    make_folder(plan.folder)
    write_file(plan.folder / _PILOT_FILE, json.dumps(document, indent=1) + "\n")
    return Pilot(**document)


def read_pilot(plan: ExperimentPlan) -> Pilot | None:
    """What a pilot in the plan's folder said; None where there is none.

    Raises:
        UserError: its file is damaged.
    """
    path = plan.folder / _PILOT_FILE
    if not path.is_file():
        return None
    try:
        return Pilot(**json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path}: no pilot's result: {error}") from None


def seeds_sentence(plan: ExperimentPlan) -> str:
    """How many seeds there are, and how many a pilot asks for."""
    recipe, count, pilot = plan.recipe, len(plan.seeds), read_pilot(plan)
    text = f"{count} seeds of each arm"
    if pilot is None:
        return f"{text}; no pilot has been run (--pilot), so the power is not known"
    return (
        f"{text}; a pilot of {pilot.n} pairs has shown an SD of {pilot.sd:.2g} points, which asks for "
        f"{wanted_seeds(pilot)} seeds (80% power at half the margin of {recipe.margin:g}); more than {MOST_SEEDS} "
        "are run only where --seeds says so"
    )


def wanted_seeds(pilot: Pilot) -> str:
    """How many seeds a pilot asks for, in words."""
    return str(pilot.seeds) if pilot.seeds < MOST_ASKED else f"{MOST_ASKED:,} or more"


def _run(plan: ExperimentPlan, members: Sequence[Member], retries: int, on_change: OnChange | None) -> dict[str, str]:
    """Run what is left of these; those that failed, and why."""
    runs = runs_of(plan.standings(members))
    if all(run.ended for run in runs):
        return {}
    make_folder(plan.runs)
    executor = make_executor(plan.placement, [member.cell.config for member in members], plan.runs)
    after = {member.cell.name: member.after for member in members}
    stopped = {run.cell.name for run in runs if run.status == "failed"}
    try:
        run_cells(
            runs,
            plan.runs,
            executor,
            threads=plan.placement.threads,
            retries=retries,
            after=after,
            on_change=on_change,
        )
    finally:
        executor.close()
    stopped |= {standing.cell.name for standing in plan.standings(members) if standing.status == "failed"}
    return {
        run.cell.name: run.error
        for run in runs
        # Whoever comes after one that diverged has nothing to follow: no failure either.
        if run.status == "failed" and not stopped & {run.cell.name, *after[run.cell.name]}
    }
