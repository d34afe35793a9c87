"""From an experiment to its page, and from all verdicts to the index: the bridge to `report`, which knows no claims."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from norm_matters.experiments.cells import setting_text
from norm_matters.experiments.claims import RECIPES, figures
from norm_matters.experiments.claims.evidence import read_verdicts
from norm_matters.experiments.claims.planning import ExperimentPlan
from norm_matters.experiments.claims.recipe import Arm, Claim, Evidence, Finding, Recipe, Verdict, outcome
from norm_matters.report.experiment import (
    ArmView,
    ClaimView,
    ExperimentView,
    TableView,
    TestView,
    write_experiment_page,
    write_index_page,
)
from norm_matters.report.groups import Group
from norm_matters.report.read import RunFiles, columns_of

INDEX_FILE = "index.html"


def write_page(
    plan: ExperimentPlan,
    evidence: Evidence,
    verdicts: Sequence[Verdict],
    provenance: Mapping[str, Any],
    failed: Mapping[str, str],
    power: str = "",
) -> Path:
    """Write the page of an experiment.

    Args:
        provenance: of the verdicts.
        failed: runs that failed, and why.
        power: how many seeds there are, and how many a pilot asks for; a sentence.

    Returns:
        the page.

    Raises:
        StorageError: it cannot be written.
    """
    recipe, size = plan.recipe, plan.size
    arms = [_arm_view(recipe, plan.scale, arm, evidence) for arm in plan.arms]
    claims: dict[TestView, list[str]] = {}  # several may look at the same test
    for verdict in verdicts:
        for found in verdict.findings:
            claims.setdefault(_test_view(found), []).append(verdict.claim)
    view = ExperimentView(
        title=f"{recipe.id}, {plan.scale} scale",
        question=recipe.question,
        claims=[_claim_view(claim, verdict) for claim, verdict in zip(recipe.claims, verdicts, strict=True)],
        tests=[replace(test, claim=", ".join(dict.fromkeys(ids))) for test, ids in claims.items()],
        arms=arms,
        tables=[
            TableView(table.title, table.note, table.rows, table.curves)
            for table in evidence.tables.values()
            if table.rows
        ],
        differs=[text for text in (recipe.differs, size.about) if text],
        setup=_setup(plan, evidence, power),
        provenance=provenance,
        source=figures.source(),
        notes=[f"{name} failed: {error}" for name, error in failed.items()],
    )
    path = plan.output / f"{plan.name}.html"
    write_experiment_page(path, view)
    return path


def write_index(output: Path) -> Path:
    """Write the index over all the verdicts below a folder, in the order of the recipes, and what was not run.

    Raises:
        UserError: a verdict there cannot be read.
        StorageError: the index cannot be written.
    """
    order = {name: index for index, name in enumerate(RECIPES.names())}
    places = {(name, claim.id): place for name in order for place, claim in enumerate(RECIPES.get(name).claims)}
    found = sorted(
        read_verdicts(output),
        key=lambda each: (
            order.get(each["experiment"], len(order)),
            each["scale"],
            places.get((each["experiment"], each["claim"]), 0),
        ),
    )
    rows = [
        {
            "experiment": each["experiment"],
            "scale": each["scale"],
            "question": str(each.get("question", "")),
            "claim": each["claim"],
            "statement": str(each.get("statement", "")),
            "verdict": outcome(each["verdict"], each.get("holds")),
            "holds": each.get("holds"),
            "sentence": each["sentence"],
            "seeds": ", ".join(map(str, each.get("seeds") or [])),
            "page": f"{each['experiment']}-{each['scale']}.html",
        }
        for each in found
    ]
    absent = {name: RECIPES.get(name).question for name in order if not any(name == row["experiment"] for row in rows)}
    write_index_page(output / INDEX_FILE, rows, absent)
    return output / INDEX_FILE


def _claim_view(claim: Claim, verdict: Verdict) -> ClaimView:
    word = outcome(verdict.word, verdict.holds)
    return ClaimView(claim.id, claim.statement, claim.paper, claim.rule, word, verdict.sentence, verdict.holds)


def _test_view(found: Finding) -> TestView:
    p = ", ".join(f"{name} {value:.2g}" for name, value in found.p.items() if value == value)
    return TestView(
        "",
        found.what,
        found.test,
        found.n,
        found.estimate,
        found.low,
        found.high,
        found.unit,
        found.word,
        p or "–",
        found.note,
        found.margin,
    )


def _arm_view(recipe: Recipe, scale: str, arm: Arm, evidence: Evidence) -> ArmView:
    runs = list(evidence.runs.get(arm.name, {}).values())
    count = Counter(run.state for run in runs)
    # From their rows: the folders of runs that were published elsewhere are gone.
    shown = [RunFiles(run.folder, {"seed": run.seed}, {}, columns_of(run.rows)) for run in runs if run.rows]
    curve = recipe.paper_curves.get(arm.name)
    return ArmView(
        arm.name,
        arm.meaning,
        " ".join(setting_text(key, value) for key, value in arm.settings(scale).items()),
        "not run" if set(count) == {"missing"} else ", ".join(f"{number} {state}" for state, number in count.items()),
        Group(arm.name, shown) if shown else None,
        None if curve is None else (*figures.paper_curve(curve), curve.label),
    )


def _setup(plan: ExperimentPlan, evidence: Evidence, power: str) -> dict[str, str]:
    """What all arms share, in words."""
    recipe, size = plan.recipe, plan.size
    facts: dict[str, Any] = {}
    if recipe.arms:
        facts = {"data.name": size.dataset, **size.config, **plan.given}
        facts["seeds"] = ", ".join(map(str, plan.seeds))
        facts["power"] = power
        facts["metric"] = "mean test accuracy over the last quarter of the epochs"
        facts["margin"] = f"{recipe.margin:g} points"
        facts["diverged"] = (
            f"a run that stops on numbers that are not finite, or whose metric is below {recipe.diverged:g}%"
        )
    if evidence.products:
        facts["2 lr lambda T / (1 - m), by phase"] = ", ".join(f"{value:.3g}" for value in evidence.products)
    return {
        key: value if isinstance(value, str) else setting_text(key, value).partition("=")[2]
        for key, value in facts.items()
    }
