"""The command `verify`. Only typer is imported at the top: `--help` answers without torch."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from norm_matters.cli_options import AsJson, number
from norm_matters.core.ranks import find_ranks
from norm_matters.progress import say

if TYPE_CHECKING:
    from norm_matters.verification import StepCheck, Verification

DIFFERENT = 1
"""Exit status where a step came out otherwise, as of `cmp` and `diff`: the input was right, the answer is no."""


def verify(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="a run's folder")],
    steps: Annotated[str, typer.Option(metavar="N", help="train so many steps anew, at most")] = "20",
    data_dir: Annotated[str | None, typer.Option(metavar="DIR", help="where datasets such as cifar10 lie")] = None,
    dataset: Annotated[
        str | None, typer.Option(metavar="SOURCE:PATH", help="where the images of imagefolder: and the like lie now")
    ] = None,
    device: Annotated[str, typer.Option(help="another than the run's own: cpu, cuda, cuda:N or mps")] = "",
    as_json: AsJson = False,
) -> None:
    """Train the first steps of a run anew and compare losses and weights with its record, to the bit.

    Exit status 0: all are equal; 1: a step differs. The run's folder is only read.
    """
    count = number("--steps", steps)
    from norm_matters.verification import verify as verify_run

    found = verify_run(run, steps=count, data_dir=data_dir, dataset=dataset, device=device)
    if find_ranks().first:
        _print_json(run, found) if as_json else _print_lines(found)
        if not found.equal:
            raise typer.Exit(DIFFERENT)


def _print_lines(found: "Verification") -> None:
    for check in found.checks:
        print(f"step {check.step}: {_outcome(check)}")
    for each in found.differences:
        say(f"{each.kind}: {each.fact} was {_shown(each.recorded)}, is {_shown(each.found)}")
    if not found.differences:
        print("code, data, versions, device and threads are those recorded")
    first = found.first_difference
    last = found.checks[-1].step
    print(f"equal to the bit up to step {last}" if first is None else f"different from step {first.step} on")


def _outcome(check: "StepCheck") -> str:
    if check.equal:
        return f"equal (loss {check.found.loss:.6g})"
    loss = f"loss {check.found.loss:.9g} instead of {check.recorded.loss:.9g} ({check.loss_difference:+.2g})"
    return f"different: {loss}; norm of the weights {check.weight_difference:+.2g} of itself"


def _shown(value: Any) -> str:
    return "not known" if value is None else value if isinstance(value, str) else json.dumps(value)


def _print_json(run: Path, found: "Verification") -> None:
    document = {
        "run": str(run),
        "equal": found.equal,
        "first_difference": None if found.first_difference is None else found.first_difference.step,
        "steps": [
            {
                "step": check.step,
                "equal": check.equal,
                "recorded": dict(zip(check.recorded._fields, map(_finite, check.recorded), strict=True)),
                "found": dict(zip(check.found._fields, map(_finite, check.found), strict=True)),
            }
            for check in found.checks
        ],
        "differences": [vars(each) for each in found.differences],
    }
    print(json.dumps(document))


def _finite(value: Any) -> Any:
    """JSON knows no NaN."""
    return value if not isinstance(value, float) or value - value == 0 else None
