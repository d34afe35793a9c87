"""The command `reproduce`. Only typer is imported at the top: `--help` answers without torch."""

import json
import signal
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from norm_matters.cli_options import AsJson, DataDir, Device, number, setting
from norm_matters.cli_sweep import FAILED, terminable
from norm_matters.core.errors import INTERRUPTED, PreemptedError, UserError, nearest
from norm_matters.progress import say

if TYPE_CHECKING:
    from norm_matters.experiments.claims.performing import Result
    from norm_matters.experiments.claims.planning import ExperimentPlan

_SCALES = ("smoke", "small", "paper")


def _ids() -> list[str]:
    from norm_matters.experiments.claims import RECIPES

    return ["list", "all", *RECIPES.names()]


def reproduce(
    context: typer.Context,
    experiment: Annotated[
        str, typer.Argument(metavar="ID|list|all", help="an experiment; see `reproduce list`", autocompletion=_ids)
    ],
    scale: Annotated[
        str,
        typer.Option(metavar="|".join(_SCALES), help="how large", autocompletion=lambda: list(_SCALES)),
    ] = "small",
    seeds: Annotated[str | None, typer.Option(metavar="N", help="of each arm; the recipe's by default")] = None,
    arms: Annotated[str | None, typer.Option(metavar="ARM,...", help="only these, and what they come after")] = None,
    dataset: Annotated[str | None, typer.Option(help="other images, such as parquet:DIR or fashion-mnist")] = None,
    data_dir: DataDir = None,
    download: Annotated[bool, typer.Option("--download", help="fetch the dataset if it is missing")] = False,
    device: Device = None,
    executor: Annotated[
        str | None,
        typer.Option(metavar="local|slurm|ray|inline", help="where the runs are; inline at smoke scale, else local"),
    ] = None,
    jobs: Annotated[str | None, typer.Option(metavar="N", help="runs side by side; as many as fit by default")] = None,
    threads: Annotated[str, typer.Option(metavar="N", help="of each run")] = "1",
    slurm: Annotated[
        list[str] | None, typer.Option(metavar="KEY=VALUE", help="of the jobs, such as partition=gpu")
    ] = None,
    ray_address: Annotated[str | None, typer.Option(metavar="ADDRESS", help="of a cluster, such as auto")] = None,
    retries: Annotated[str, typer.Option(metavar="N", help="start a run that failed again, so often")] = "0",
    pilot: Annotated[
        bool, typer.Option("--pilot", help="train three seeds of two arms, to say how many seeds are needed")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="show the runs and how long they would take")] = False,
    output: Annotated[Path, typer.Option(metavar="DIR", help="where pages, verdicts and runs lie")] = Path(
        "reproduced"
    ),
    publish: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="copy verdicts and tables there, without the runs; adds to what lies there"),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Put a claim of the paper to the test: all arms with all seeds, a verdict for each claim, and a page.

    Runs that are done are skipped, those that were cut off go on: the same command again finishes an experiment.
    """
    if experiment == "list":
        _list(as_json=as_json)
        return
    from norm_matters.experiments.claims import performing
    from norm_matters.experiments.claims.published import read_published
    from norm_matters.experiments.executors import Placement

    placement = Placement(
        executor or performing.usual_executor(scale),
        number("--jobs", jobs) if jobs is not None else None,
        number("--threads", threads),
        dict(setting("--slurm", text) for text in slurm or []),
        ray_address,
    )
    again = number("--retries", retries, least=0)
    count = None if seeds is None else number("--seeds", seeds)
    names = [] if arms is None else list(dict.fromkeys(name.strip() for name in arms.split(",")))
    if experiment == "all" and names:
        raise UserError("--arms: experiments have arms of their own; leave it out, or name one experiment")
    given = performing.user_settings(dataset=dataset, data_dir=data_dir, download=download, device=device)
    plans = _plans(experiment, scale, output=output, arms=names, seeds=count, given=given, placement=placement)
    if pilot:
        plans = [performing.pilot_of(plan) for plan in plans if plan.recipe.arms or experiment != "all"]
    for plan in plans:
        # Of all at once: what is wrong with the last must not be told hours later.
        if plan.recipe.arms:
            performing.check_images(plan)
        if publish is not None and not pilot:
            read_published(plan, publish)
    told: list[dict[str, Any]] = []
    failed = False
    for plan in plans:
        facts = _introduce(
            plan, stream=sys.stderr if as_json else sys.stdout, estimate=dry_run or scale != "smoke", pilot=pilot
        )
        if dry_run:
            told.append(facts)
            if not as_json:
                _list_runs(facts)
            continue
        if pilot:
            _pilot(plan, as_json=as_json)
            continue
        result = _perform(plan, context.obj, again, publish, as_json=as_json)
        failed |= bool(result.failed)
        told += [_plain(plan, verdict) for verdict in result.verdicts]
        if not as_json:
            _show_result(result)
    if as_json and (dry_run or not pilot):
        print(json.dumps(told))
    if failed:
        raise typer.Exit(FAILED)


def _plans(experiment: str, scale: str, *, given: dict[str, Any], **options: Any) -> "list[ExperimentPlan]":
    """The plans of one experiment, or of all that have the scale; `options` are those of `plan_from`.

    Of all, those about images that come with this package keep them, whatever the others are trained on.
    """
    from norm_matters.experiments.claims import RECIPES, performing

    if experiment != "all":
        return [performing.plan_from(experiment, scale=scale, given=given, **options)]
    names = [name for name in RECIPES.names() if scale in RECIPES.get(name).scales]
    if not names:
        raise UserError(
            f"--scale: value '{scale}' is not valid; it takes {', '.join(_SCALES)}{nearest(scale, _SCALES)}"
        )
    others = {key: value for key, value in given.items() if not key.startswith("data.")}
    return [
        performing.plan_from(name, scale=scale, given=others if _brings_images(name, scale) else given, **options)
        for name in names
    ]


def _brings_images(experiment: str, scale: str) -> bool:
    """Whether an experiment is about images that come with this package."""
    from norm_matters.experiments.claims import RECIPES

    return RECIPES.get(experiment).scale(scale).dataset == "digits"


def _list(*, as_json: bool) -> None:
    from norm_matters.experiments.claims import RECIPES

    entries = [(name, RECIPES.summary(name)) for name in RECIPES.names()]
    if as_json:
        print(json.dumps([{"id": name, "summary": summary} for name, summary in entries]))
        return
    width = max(len(name) for name, _ in entries)
    for name, summary in entries:
        say(f"{name:{width}}  {summary}")


def _introduce(plan: "ExperimentPlan", *, stream: Any, estimate: bool, pilot: bool) -> dict[str, Any]:
    """Say what is about to be run, and how long it takes, before anything is; the runs and the time, in seconds."""
    from norm_matters.experiments.claims import performing
    from norm_matters.experiments.claims.phases import describe_products
    from norm_matters.experiments.pace import show_seconds

    tell = partial(say, stream=stream)
    tell(f"{plan.recipe.id}, {plan.scale} scale: {plan.recipe.question}")
    facts: dict[str, Any] = {"experiment": plan.recipe.id, "scale": plan.scale, "runs": {}, "seconds": None}
    if not plan.recipe.arms:
        return facts
    steps = performing.check_images(plan)
    tell(plan.size.about)
    tell(f"a pilot: {len(plan.seeds)} seeds of their own" if pilot else performing.seeds_sentence(plan))
    if products := performing.products_of(plan.whole(), steps):
        tell(describe_products(plan.recipe.equilibrium or "", products))
    members = [*plan.choosing(), *plan.comparing(plan.chosen())]
    standings = plan.standings(members)
    facts["runs"] = {standing.cell.name: standing.status for standing in standings}
    left = sum(standing.status in ("new", "cut off") for standing in standings)
    tell(f"arms: {', '.join(arm.name for arm in plan.arms)}; {len(members)} runs, {left} to train")
    if estimate:
        found = performing.estimate_time(plan)
        facts["seconds"] = found.seconds
        time = "time unknown" if found.seconds is None else f"about {show_seconds(found.seconds)}"
        tell(f"{time} ({found.source})")
    return facts


def _list_runs(facts: dict[str, Any]) -> None:
    """Where each run stands."""
    for name, status in facts["runs"].items():
        say(f"  {name}: {status}")


def _perform(
    plan: "ExperimentPlan", command: list[str], retries: int, publish: Path | None, *, as_json: bool
) -> "Result":
    """Run an experiment with its display; SIGTERM ends it as Ctrl-C does."""
    from norm_matters.experiments.claims import performing

    with terminable() as signals:
        try:
            with _table(plan, as_json=as_json) as table:
                return performing.perform(plan, command=command, retries=retries, on_change=table, publish_to=publish)
        except KeyboardInterrupt:
            members = [*plan.choosing(), *plan.comparing(plan.chosen())]
            done = sum(standing.status == "done" for standing in plan.standings(members))
            print(f"{done} of {len(members)} runs are done; the same command goes on from here", file=sys.stderr)
            raise typer.Exit(PreemptedError.exit_status if signal.SIGTERM in signals else INTERRUPTED) from None


def _pilot(plan: "ExperimentPlan", *, as_json: bool) -> None:
    from norm_matters.experiments.claims import performing

    with _table(plan, as_json=as_json) as table:
        found = performing.run_pilot(plan, on_change=table)
    if as_json:
        print(json.dumps({"sd": found.sd, "n": found.n, "arm": found.arm, "seeds": found.seeds}))
        return
    print(
        f"{found.arm} less {plan.recipe.baseline}: SD {found.sd:.2g} points over {found.n} pairs; "
        f"{performing.wanted_seeds(found)} seeds give 80% power at half the margin of {plan.recipe.margin:g}"
    )


def _table(plan: "ExperimentPlan", *, as_json: bool) -> Any:
    """The display of the runs; nothing for an experiment without any."""
    if not plan.recipe.arms:
        return nullcontext()
    from norm_matters.experiments.executors import parallel_runs
    from norm_matters.experiments.pace import recorded_pace
    from norm_matters.experiments.summary import Measure
    from norm_matters.experiments.table import SweepTable

    parallel = parallel_runs(plan.placement, [member.cell.config for member in plan.comparing()])
    stream = sys.stderr if as_json else sys.stdout
    return SweepTable(Measure(), recorded_pace(plan.runs), parallel, stream=stream)


def _plain(plan: "ExperimentPlan", verdict: Any) -> dict[str, Any]:
    return {
        "experiment": plan.recipe.id,
        "scale": plan.scale,
        "claim": verdict.claim,
        "verdict": verdict.word,
        "holds": verdict.holds,
        "sentence": verdict.sentence,
    }


def _show_result(result: "Result") -> None:
    from norm_matters.experiments.claims.recipe import outcome

    for verdict in result.verdicts:
        say(f"{verdict.claim}: {outcome(verdict.word, verdict.holds)}. {verdict.sentence}")
    if result.kept:
        say(f"with {len(result.kept)} runs that were published before: {', '.join(result.kept)}")
    for name, error in result.failed.items():
        say(f"failed: {name}: {error}", sys.stderr)
    say(f"page {result.page}")
