"""Writes paper.md from the verdicts in results/claims: `python docs/paper.py`. Every number there comes from a file.

The plots are drawn by `python docs/paper_plots.py`.
"""

import csv
import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from norm_matters.experiments.claims import RECIPES
from norm_matters.experiments.claims.evidence import RUNS_FILE, read_verdicts
from norm_matters.experiments.claims.published import judge_again, read_evidence
from norm_matters.experiments.claims.recipe import SCALES, Recipe, outcome
from norm_matters.experiments.statistics import mean_interval

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "results" / "claims"
PAGE = ROOT / "docs" / "paper.md"
MOST_ROWS = 24  # of a table on the page; longer ones are in the folder

_HEAD = """# What holds of the paper, claim by claim

Hoffer, Banner, Golan and Soudry, *Norm matters: efficient and accurate normalization schemes in deep networks*
(NeurIPS 2018, [arXiv 1803.01814](https://arxiv.org/abs/1803.01814)). All curves of the paper are single runs without
error bars; what stands here are repetitions with seeds and tests. This page is written by `python docs/paper.py` from
the verdicts in [results/claims](../results/claims).

```bash
norm-matters reproduce list
norm-matters reproduce wd --scale small --data-dir DIR     # or --dataset parquet:DIR
norm-matters reproduce all --scale smoke                   # everything once, in minutes: it shows that it runs
```

The time is estimated and printed first; the same command again goes on where it was cut off. `--output DIR`
(`reproduced`) receives the run folders, a `verdict.json` for each claim, a page for each experiment and `index.html`.
`--pilot` trains three seeds of two arms and says how many seeds are needed for 80% power at half the margin.
`--publish results/claims` copies verdicts and tables, without the runs; runs of other machines that were published
there before count as well, so that an experiment can be made arm by arm.

**How a claim is decided.** Arms are paired by seed: the same initial weights, order of images and augmentation. The
metric is the mean test accuracy over the last quarter of the epochs. One verdict comes from one interval, that of the
paired difference (t, 90%, two-sided), and a margin (0.5 points unless said otherwise): *equal* inside the margin,
*worse* or *better* beyond it, *worse but within the margin* inside it without 0, *undecided* otherwise, also where it
is certain that an arm is worse but not by how much, and where runs of an arm stopped on numbers that are not finite.
A sign that turns round needs both one-sided tests at 5% (an
intersection-union test); a share of a gap has Fieller's interval; divergence is told by Fisher's exact test, of eight
runs or more of each arm. Margins,
seeds, choices and what counts as diverged are fixed in the recipe before the run; nothing is chosen by the test images.
While runs of an arm are left, whatever has been found is provisional, and the claim undecided.
"""


def main() -> None:
    """Judge what was run in today's words, and write the page."""
    for name in RECIPES.names():
        for scale in RECIPES.get(name).scales:
            folder = RESULTS / f"{name}-{scale}"
            if (folder / RUNS_FILE).is_file():
                judge_again(RECIPES.get(name), scale, folder)
    PAGE.write_text(text())


def text() -> str:
    """The page, from the verdicts and tables that lie in results/claims."""
    found = {(each["experiment"], each["scale"], each["claim"]): each for each in read_verdicts(RESULTS)}
    parts = [_HEAD, "## At a glance\n", _glance(found)]
    parts += [_experiment(RECIPES.get(name), found) for name in RECIPES.names()]
    return "\n".join(parts)


def _glance(found: Mapping[tuple[str, str, str], Mapping[str, Any]]) -> str:
    lines = ["| claim | statement | verdict | scale | seeds |", "|---|---|---|---|---|"]
    for name in RECIPES.names():
        for claim in RECIPES.get(name).claims:
            told = [found[name, scale, claim.id] for scale in SCALES if (name, scale, claim.id) in found]
            for each in told:
                seeds = str(len(each["seeds"])) if each["seeds"] else "–"
                lines.append(
                    _row(
                        claim.id,
                        claim.statement,
                        f"**{_outcome(each)}**",
                        each["scale"],
                        seeds,
                    )
                )
            if not told:
                lines.append(_row(claim.id, claim.statement, "not run yet", "", ""))
    return "\n".join(lines) + "\n"


def _experiment(recipe: Recipe, found: Mapping[tuple[str, str, str], Mapping[str, Any]]) -> str:
    module = f"src/norm_matters/experiments/claims/{recipe.id.replace('-', '_')}.py"
    scales = [scale for scale in SCALES if any((recipe.id, scale, claim.id) in found for claim in recipe.claims)]
    lines = [f"## {recipe.id}: {recipe.question}", ""]
    lines.append(f"Recipe: [{module.rpartition('/')[2]}](../{module}). {recipe.differs}".strip())
    lines.append("")
    if recipe.arms:
        lines += [*_arms(recipe, scales), ""]
        for scale in scales:
            words = f"{recipe.id}, {scale} scale: accuracy, the same less that of the baseline, and the intervals"
            lines += [f"![{words}](paper/{recipe.id}-{scale}.png)", ""]
    for scale in scales:
        lines += _tables(recipe, scale)
    for claim in recipe.claims:
        lines += [f"**{claim.id}** {claim.statement}" + (f" In the paper: {claim.paper}" if claim.paper else "")]
        lines += [f"Rule: {claim.rule}.", ""]
        told = [found[recipe.id, scale, claim.id] for scale in scales if (recipe.id, scale, claim.id) in found]
        if not told:
            lines += ["*Not run yet.*", ""]
        for each in told:
            lines += [
                f"*{each['scale'].capitalize()} scale: **{_outcome(each)}**.* {each['sentence']}",
                "",
            ]
            lines += _tests(each)
    for scale in scales:
        lines += [_ran(recipe, scale, found), ""]
    return "\n".join(lines)


def _arms(recipe: Recipe, scales: Sequence[str]) -> list[str]:
    """The arms as a table, with what came out of each: mean and standard deviation over its seeds."""
    heads = ["arm", "what it is", *(f"accuracy, {scale} scale, % (SD; seeds)" for scale in scales)]
    results = [_accuracies(recipe, scale) for scale in scales]
    rows = [
        _row(
            f"`{arm.name}`",
            arm.meaning.rstrip("."),
            *(_spread(found.get(arm.name), recipe.diverged) for found in results),
        )
        for arm in recipe.arms
    ]
    return [_row(*heads), _row(*("---" for _ in heads)), *rows]


def _tables(recipe: Recipe, scale: str) -> list[str]:
    """The small tables of an experiment, as they lie in its folder."""
    lines = []
    for path in sorted((RESULTS / f"{recipe.id}-{scale}").glob("*.csv")):
        with path.open(newline="") as stream:
            head, *rows = csv.reader(stream)
        if path.name != RUNS_FILE and len(rows) <= MOST_ROWS:
            told = [_row(*(_short(cell) for cell in row)) for row in rows]
            lines += [f"*{path.stem}, {scale} scale*", "", _row(*head), _row(*("---" for _ in head)), *told, ""]
    return lines


def _short(cell: str) -> str:
    """A number in four digits, a whole one and a word as they are."""
    try:
        return cell if cell.lstrip("-").isdecimal() else f"{float(cell):.4g}"
    except ValueError:
        return cell


def _accuracies(recipe: Recipe, scale: str) -> dict[str, list[float]]:
    """Arm -> the mean accuracy over the last quarter of each run that came to an end; NaN of one that stopped."""
    evidence = read_evidence(recipe, scale, RESULTS / f"{recipe.id}-{scale}")
    return {
        arm: [evidence.accuracy(arm).get(seed, math.nan) for seed in evidence.diverged(arm)]
        for arm in evidence.runs
        if evidence.diverged(arm)
    }


def _spread(values: Sequence[float] | None, least: float) -> str:
    """Mean, standard deviation and number of accuracies; how many stopped (NaN), or came out below `least`."""
    if values is None:
        return "not run"
    whole = [value for value in values if math.isfinite(value)]
    told = mean_interval(whole)
    lost, low = len(values) - len(whole), sum(value < least for value in whole)
    remarks = [f"{count} {what}" for count, what in ((lost, "stopped"), (low, "diverged")) if count]
    if len(whole) < 2:
        return ", ".join(["–", *remarks])
    return f"{told.mean:.2f} ({', '.join([f'{told.sd:.2f}; {told.n}', *remarks])})"


def _outcome(verdict: Mapping[str, Any]) -> str:
    return outcome(verdict["verdict"], verdict["holds"])


def _tests(verdict: Mapping[str, Any]) -> list[str]:
    """The tests of a verdict as a table; nothing for a single one, which the sentence tells."""
    if len(verdict["statistics"]) < 2:
        return []
    lines = ["| test | by | n | estimate (interval) | p | comes to |", "|---|---|---|---|---|---|"]
    for each in verdict["statistics"]:
        p = ", ".join(f"{name} {value:.2g}" for name, value in each["p"].items() if value is not None)
        lines.append(_row(each["what"], each["test"], str(each["n"]), _estimate(each), p or "–", each["word"]))
    return [*lines, ""]


def _row(*cells: str) -> str:
    """A row of a table; a bar in a cell would end it."""
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _estimate(finding: Mapping[str, Any]) -> str:
    sign = "" if finding["margin"] is None else "+"
    estimate, low, high = (
        math.nan if finding[key] is None else float(finding[key]) for key in ("estimate", "low", "high")
    )
    if math.isnan(estimate):
        return "–"
    told = f"{estimate:{sign}.3g}"
    if math.isinf(low):
        return f"{told} (unbounded)"
    return told if math.isnan(low) or low == high else f"{told} ({low:{sign}.3g} to {high:{sign}.3g})"


def _ran(recipe: Recipe, scale: str, found: Mapping[tuple[str, str, str], Mapping[str, Any]]) -> str:
    """What was run, on what, and where its numbers are."""
    verdict = next(
        found[recipe.id, scale, claim.id] for claim in recipe.claims if (recipe.id, scale, claim.id) in found
    )
    folder = f"results/claims/{recipe.id}-{scale}"
    provenance = verdict["provenance"]
    kinds = provenance.get("runs", [])
    arms = [_arms_of(kind) if len(kinds) > 1 else "" for kind in kinds]
    origins = [f"{kind['runs']} runs{own} {_origin(kind)}" for kind, own in zip(kinds, arms, strict=True)]
    origin = "; ".join(origins) or _origin(provenance)
    power = verdict.get("power", "")
    lines = [
        f"{recipe.scale(scale).about}{f' Here {power}.' if power else ''} Numbers: [{folder}](../{folder}), {origin}. "
        "Made by",
        "",
        "```bash",
        *map(shlex.join, (*provenance.get("earlier_commands", ()), provenance["command"])),
        "```",
    ]
    return "\n".join(lines)


def _arms_of(kind: Mapping[str, Any]) -> str:
    """The arms of a kind of runs, in words; empty where they are not told."""
    arms = dict.fromkeys(name.rpartition("-s")[0] for name in kind.get("names", ()))
    return f" of {', '.join(arms)}" if arms else ""


def _origin(kind: Mapping[str, Any]) -> str:
    """Commit, versions and device of what was run."""
    package = kind["package"]
    commit = f"{(package.get('commit') or 'unknown')[:7]}{' and changes' if package.get('dirty') else ''}"
    return f"at commit {commit}, torch {kind['versions']['torch']}, on {_machine(kind)}"


def _machine(provenance: Mapping[str, Any]) -> str:
    machine = provenance.get("machine") or {}
    return str(machine.get("device_name") or machine.get("cpu"))


if __name__ == "__main__":
    main()
