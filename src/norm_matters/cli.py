"""The commands: each reads its arguments, asks one function of the package, and prints the answer. No logic is here.

Only typer is imported at the top: `--help` answers without torch, and each command imports what it needs.
"""

import math
import os
import sys
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from fnmatch import fnmatch
from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer

from norm_matters.cli_bench import bench
from norm_matters.cli_data import data
from norm_matters.cli_import import import_old
from norm_matters.cli_infer import evaluate, predict
from norm_matters.cli_reproduce import reproduce
from norm_matters.cli_sweep import sweep
from norm_matters.cli_train import train
from norm_matters.cli_trust import trust
from norm_matters.cli_verify import verify
from norm_matters.core.errors import INTERRUPTED, LostRankError, PreemptedError, UserError, nearest
from norm_matters.core.faults import check_faults
from norm_matters.core.ranks import (
    ONE_PROCESS,
    Ranks,
    check_earlier_attempts,
    die_with_the_launcher,
    find_ranks,
    leave,
    note_failure,
    status_of_rank,
    words,
    words_of_this_rank,
)
from norm_matters.progress import printable, say

INTERNAL_ERROR = 1
WRONG_INPUT = UserError.exit_status

_KINDS = ("models", "norms", "weight-norms", "datasets", "regimes", "transforms")

# Help without rich: its import alone takes longer than everything else that `--help` does.
app = typer.Typer(
    invoke_without_command=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; return its exit status: 0 done, 1 internal, 130 interrupted, else that of the error's kind.

    Args:
        argv: the arguments without the program's name; the process's own by default.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    launched = "RANK" in os.environ or "SLURM_STEP_NUM_TASKS" in os.environ
    if launched:
        # Before torch is imported, whose C++ warnings about its own use would be repeated by every rank.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        # And at once: a launcher that is killed meanwhile must not leave its ranks behind.
        die_with_the_launcher()
    status = status_of_rank(_run(arguments))
    if status and launched and _ranks().world > 1:
        leave(status)
    return status


def _run(arguments: Sequence[str]) -> int:
    """Run a command and tell what went wrong; its exit status."""
    try:
        # Before anything slow is imported.
        check_faults()
        check_earlier_attempts(find_ranks())
        status = typer.main.get_command(app).main(
            _with_value_for_pretrained(arguments),
            prog_name="norm-matters",
            standalone_mode=False,
            obj=["norm-matters", *arguments],
        )
        sys.stdout.flush()
    except PreemptedError as error:
        # Not an error; and told once, by the first rank.
        for line in words_of_this_rank(error, _ranks()):
            say(line, sys.stderr)
        return error.exit_status
    except UserError as error:
        return _fail_as_rank(error, error.exit_status)
    except (KeyboardInterrupt, typer.Abort):
        status = INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has had enough; Python must not complain when it flushes the rest at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return INTERNAL_ERROR
    except Exception as error:
        # Wrong arguments, in typer's words; the class of these errors has no public name.
        if not hasattr(error, "format_message"):
            traceback.print_exc()
            return _fail_as_rank(error, INTERNAL_ERROR) if _ranks().world > 1 else INTERNAL_ERROR
        return _fail([error.format_message()], WRONG_INPUT)  # pyright: ignore[reportAttributeAccessIssue]
    if status == INTERRUPTED:
        return _fail(["interrupted"] if _ranks().first else [], INTERRUPTED)
    return status or 0


@app.callback()
def about(context: typer.Context) -> None:
    """Train convolutional networks with the normalisation you choose, and know what it did."""
    if context.invoked_subcommand is None:
        print(context.get_help())


app.command()(train)
app.command("eval")(evaluate)
app.command()(predict)


@app.command()
def report(run: Annotated[Path, typer.Argument(metavar="RUN", help="a run's folder")]) -> None:
    """Write the report.html of a run anew."""
    from norm_matters.report import write_report

    say(f"report {write_report(run)}")


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="folders of runs")],
    output: Annotated[Path, typer.Option(metavar="FILE.html", help="the page to write")] = Path("comparison.html"),
) -> None:
    """Compare runs in a table of their last epochs and a page with their curves.

    Runs that differ in the seed only are counted together: their mean and spread are shown.
    """
    from norm_matters.report import compare as compare_runs

    comparison = compare_runs(runs, output)
    metrics = {"val_error1": "val error@1 (%)", "val_loss": "val loss", "train_error1": "train error@1 (%)"}
    lines = [["run", "n", "epoch", *metrics.values()]]
    for row in comparison.table.to_dict("records"):
        numbers = [_mean_and_deviation(row[metric], row[f"{metric}_std"]) for metric in metrics]
        lines.append([str(row["run"]), str(row["n"]), str(row["epoch"]), *numbers])
    _say_columns(lines)
    for note in comparison.notes:
        say(f"note: {note}")
    say(f"page {comparison.page}")


@app.command("list")
def list_names(
    kind: Annotated[str, typer.Argument(metavar="|".join(_KINDS), autocompletion=lambda: list(_KINDS))],
    pattern: Annotated[
        str, typer.Option("--filter", metavar="PATTERN", help="part of a name, or with * as in 'timm:resnet*'")
    ] = "",
) -> None:
    """List the names there are of a kind. For regimes: the learning rate over the epochs."""
    if kind not in _KINDS:
        raise UserError(f"unknown kind '{kind}'{nearest(kind, _KINDS)}; there are: {', '.join(_KINDS)}")
    glob = pattern if "*" in pattern else f"*{pattern}*"
    found = {name: summary for name, summary in _summaries(kind, pattern) if fnmatch(name, glob)}
    if not found:
        raise UserError(f"--filter '{pattern}': there are no such {kind}")
    if kind != "regimes":
        _say_columns([[name, summary] for name, summary in found.items()])
        return
    from norm_matters.regimes import plot_lr

    for name in found:
        print(f"{plot_lr(name)}\n")


app.command("import")(import_old)
app.command()(sweep)
app.command()(reproduce)
app.command()(trust)
app.command()(verify)
app.add_typer(bench, name="bench")
app.add_typer(data, name="data")


def _with_value_for_pretrained(arguments: Sequence[str]) -> list[str]:
    """Write a `--pretrained` without a file as `--pretrained=true`: typer's options take a value always or never.

    What follows it is its file, unless that is another option or a `KEY=VALUE`.
    """
    following = [*arguments[1:], "-"]
    return [
        f"{argument}=true" if argument == "--pretrained" and (after.startswith("-") or "=" in after) else argument
        for argument, after in zip(arguments, following, strict=False)
    ]


def _summaries(kind: str, pattern: str) -> Iterator[tuple[str, str]]:
    """Names and summaries of a kind; a library's models when the pattern begins with the library."""
    if kind == "models" and pattern.startswith(("timm:", "torchvision:")):
        from norm_matters.models import library_models

        library = pattern.partition(":")[0]
        yield from ((name, "") for name in library_models(library))
        return
    room = "weights" if kind == "weight-norms" else kind
    registry = getattr(import_module(f"norm_matters.{room}"), kind.upper().replace("-", "_"))
    yield from ((name, registry.summary(name)) for name in registry.names())


def _mean_and_deviation(mean: float, deviation: float) -> str:
    if math.isnan(mean):
        return "-"
    return f"{mean:.4g}" if math.isnan(deviation) else f"{mean:.4g} ± {deviation:.2g}"


def _say_columns(lines: Sequence[Sequence[str]]) -> None:
    """Print a table, its columns aligned."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        say("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def _ranks() -> Ranks:
    """Which of how many this process is; one alone where the environment makes no sense, which has been told then."""
    with suppress(UserError):
        return find_ranks()
    return ONE_PROCESS


def _fail_as_rank(error: Exception, status: int) -> int:
    """Tell of an error, unless another rank of the run does, and leave word for the launcher."""
    if not isinstance(error, LostRankError):
        note_failure(words(error), status)
    return _fail(words_of_this_rank(error, _ranks()), status)


def _fail(problems: Iterable[str], status: int) -> int:
    for problem in problems:
        print(f"error: {printable(problem)}", file=sys.stderr)
    return status
