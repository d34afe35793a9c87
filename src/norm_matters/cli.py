"""The commands: each reads its arguments, asks one function of the package, and prints the answer. No logic is here.

Only typer is imported at the top: `--help` answers without torch, and each command imports what it needs.
"""

import csv
import json
import math
import os
import sys
import traceback
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from fnmatch import fnmatch
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from norm_matters.cli_bench import bench
from norm_matters.cli_data import data
from norm_matters.cli_import import import_old
from norm_matters.cli_reproduce import reproduce
from norm_matters.cli_sweep import sweep
from norm_matters.cli_trust import trust
from norm_matters.cli_verify import verify
from norm_matters.core import stopping
from norm_matters.core.cells import plain_cell
from norm_matters.core.errors import LostRankError, PreemptedError, UserError, nearest
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
from norm_matters.progress import ConsoleProgress, printable

if TYPE_CHECKING:
    from norm_matters.core.config import RunConfig
    from norm_matters.inference import Prediction

INTERNAL_ERROR = 1
WRONG_INPUT = UserError.exit_status
INTERRUPTED = 130

# Numbers are taken as text, so that a wrong one is told together with all other mistakes.
Number = Annotated[str | None, typer.Option(metavar="N")]
DataDir = Annotated[str | None, typer.Option(metavar="DIR", help="where datasets lie")]
AnyDevice = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON")]
Target = Annotated[
    Path, typer.Argument(metavar="RUN|CHECKPOINT", help="a run's folder (its best checkpoint counts) or a checkpoint's")
]

_NUMBERS = {"epochs", "batch_size", "lr", "seed", "keep"}
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
            print(printable(line), file=sys.stderr)
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


@app.command()
def train(
    context: typer.Context,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="any setting, such as train.clip_norm=1")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(metavar="FILE.yaml", help="settings; the config.yaml of a run is one")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="see `list models`; also timm:NAME, torchvision:NAME, FILE.py")
    ] = None,
    norm: Annotated[str | None, typer.Option(help="such as l1, linf, topk:k=10; see `list norms`")] = None,
    weight_norm: Annotated[
        str | None, typer.Option(help="such as bounded, bounded:p=1; see `list weight-norms`")
    ] = None,
    pretrained: Annotated[
        str | None, typer.Option(metavar="[FILE]", help="start from a .safetensors file, or the library's own weights")
    ] = None,
    dataset: Annotated[
        str | None, typer.Option(help="see `list datasets`; also imagefolder:DIR, webdataset:PATTERN")
    ] = None,
    data_dir: DataDir = None,
    download: Annotated[bool, typer.Option("--download", help="fetch the dataset if it is missing")] = False,
    bad_images: Annotated[
        str | None, typer.Option(metavar="POLICY", help="training images that cannot be read: fail, or skip:N of them")
    ] = None,
    epochs: Number = None,
    batch_size: Number = None,
    lr: Annotated[str | None, typer.Option(metavar="N", help="learning rate of the regime, at its highest")] = None,
    seed: Number = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda, cuda:N or mps")] = None,
    precision: Annotated[str | None, typer.Option(help="fp32, bf16, amp-bf16, amp-fp16 or fp16")] = None,
    nonfinite: Annotated[
        str | None, typer.Option(help="what to do with a step that is not finite: stop, skip or rollback")
    ] = None,
    compile: Annotated[
        bool, typer.Option("--compile", help="train compiled code: a slow first step, then faster")
    ] = False,
    save_memory: Annotated[
        bool, typer.Option("--save-memory", help="make the norms' outputs again instead of keeping them")
    ] = False,
    checkpoint_every: Annotated[
        str | None, typer.Option(metavar="INTERVAL", help="such as 1ep (the default), 500st (steps) or 5min")
    ] = None,
    keep: Annotated[
        str | None, typer.Option(metavar="N", help="newest checkpoints to keep beside the best; 2 by default")
    ] = None,
    max_time: Annotated[
        str | None, typer.Option(metavar="TIME", help="such as 55min: save and end with status 75 before it is over")
    ] = None,
    output: Annotated[str | None, typer.Option(metavar="DIR", help="where run folders lie; runs by default")] = None,
    name: Annotated[str | None, typer.Option(help="name of the run's folder")] = None,
    resume: Annotated[Path | None, typer.Option(metavar="RUN", help="continue this run")] = None,
    extend: Annotated[bool, typer.Option("--extend", help="with --resume: plan for another number of epochs")] = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="with --resume: begin again if no checkpoint can be read")
    ] = False,
    processes: Annotated[
        str | None,
        typer.Option(metavar="N", help="train as N processes of this machine, a GPU or its part of the cores each"),
    ] = None,
    max_restarts: Annotated[
        str | None, typer.Option(metavar="N", help="with --processes: start again, at most so often, when one dies")
    ] = None,
) -> None:
    """Train a network and record the run. With no option: scikit-learn's digits.

    torchrun -m norm_matters train, and srun norm-matters train, train as many processes together.
    """
    if resume and config:
        raise UserError(f"--config '{config}': a resumed run has its own settings; leave --config out")
    if extend and not resume:
        raise UserError("--extend: it needs --resume RUN, the run to extend")
    if restart and not resume:
        raise UserError("--restart: it needs --resume RUN, the run to begin again")
    options, overrides, command = _common_options(context.params), overrides or [], context.obj
    if processes or max_restarts:
        from norm_matters import launch

        count, restarts = launch.check_numbers(processes, max_restarts)
        if not resume:
            # Wrong settings are told before anything is started, and no restart is spent on them.
            _load_checked(config, options, overrides)
        rest = launch.without_options(command[1:], "--processes", "--max-restarts")
        raise typer.Exit(launch.launch(rest, processes=count, restarts=restarts))
    # From here on, so that a signal that comes while torch is imported is heard too.
    with stopping.listening(*stopping.PREEMPTING):
        from norm_matters import run
        from norm_matters.models.trust import trust_named_file

        settings = None if resume else _load_checked(config, options, overrides)
        trust_named_file(options, overrides)
        with ConsoleProgress() as progress:
            if settings is None:
                assert resume is not None
                result = run.resume(
                    resume,
                    options=options,
                    overrides=overrides,
                    extend=extend,
                    restart=restart,
                    command=command,
                    on_progress=progress,
                )
            else:
                result = run.train(settings, command=command, on_progress=progress)
    if _ranks().first:
        _say(f"accuracy {100 - result.last['val_error1']:.2f}% after epoch {result.last['epoch']}")
        if result.report.exists():
            _say(f"report {result.report}")


@app.command("eval")
def evaluate(
    target: Target,
    data_dir: DataDir = None,
    dataset: Annotated[
        str | None, typer.Option(metavar="SOURCE:PATH", help="where its images lie now, or others of the same classes")
    ] = None,
    device: AnyDevice = "auto",
    batch_size: Number = None,
    workers: Number = None,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="take the norms' running statistics anew; saves a new checkpoint")
    ] = False,
    batches: Annotated[str, typer.Option(metavar="N", help="training batches to calibrate with, at most")] = "200",
    as_json: AsJson = False,
) -> None:
    """Score a trained network on the images that its run held back."""
    if not batches.isdecimal() or int(batches) == 0:
        raise UserError(f"--batches: value '{batches}' is not valid; it takes a whole number from 1")
    from norm_matters import calibration, inference

    settings = _checked(
        {"device": device, "data.name": dataset, "data.batch_size": batch_size, "data.workers": workers}
    )
    options: dict[str, Any] = {
        "data_dir": data_dir,
        "dataset": dataset,
        "device": settings.device,
        "batch_size": settings.data.batch_size if batch_size else None,  # None: as in training
        "workers": settings.data.workers,
    }
    if calibrate:
        result = calibration.calibrate_run(target, batches=int(batches), **options)
        found = {"before": result.before, "after": result.after}
    else:
        result, found = None, {"": inference.evaluate(target, **options)}
    if as_json:
        # JSON knows no NaN.
        plain = [{key: value if _is_json(value) else None for key, value in each.items()} for each in found.values()]
        print(json.dumps(dict(zip(found, plain, strict=True)) if result else plain[0]))
        return
    for title, scores in found.items():
        error5 = "" if scores["error5"] is None else f", error@5 {scores['error5']:.2f}%"
        _say(
            f"{title}{title and ' '}{scores['dataset']} ({scores['split']}, {scores['images']} images): "
            f"loss {scores['loss']:.4f}, error@1 {scores['error1']:.2f}%{error5}"
        )
    if result:
        _say(f"calibrated on {result.report.batches} batches of {result.batch_size} training images")
    _say(f"checkpoint {list(found.values())[-1]['checkpoint']}")


@app.command()
def predict(
    target: Target,
    images: Annotated[
        list[str], typer.Argument(metavar="IMAGE...", help="files and folders; - reads their paths from standard input")
    ],
    top: Annotated[str, typer.Option(metavar="N", help="classes per image")] = "5",
    device: AnyDevice = "auto",
    batch_size: Annotated[str, typer.Option(metavar="N")] = "64",
    as_csv: Annotated[bool, typer.Option("--csv", help="print CSV: a row for each class of each image")] = False,
    as_json: AsJson = False,
) -> None:
    """Name the likeliest classes of images. Images that cannot be read are named and skipped."""
    if as_csv and as_json:
        raise UserError("--csv, --json: choose one")
    if not top.isdecimal() or int(top) == 0:
        raise UserError(f"--top: value '{top}' is not valid; it takes a whole number from 1")
    paths = [Path(path) for image in images for path in (_paths_from_stdin() if image == "-" else [image])]
    if not paths:
        raise UserError("-: standard input names no image")
    from norm_matters import inference

    settings = _checked({"device": device, "data.batch_size": batch_size})
    predictions = inference.predict(
        target, paths, top=int(top), device=settings.device, batch_size=settings.data.batch_size
    )
    count = Counter[str]()
    show = _show_csv if as_csv else _show_json if as_json else _show_lines
    show(_without_broken(predictions, count))
    if count["broken"]:
        print(f"skipped {count['broken']} of {count.total()} images", file=sys.stderr)
    if not count["shown"]:
        raise UserError("none of the images can be read")


@app.command()
def report(run: Annotated[Path, typer.Argument(metavar="RUN", help="a run's folder")]) -> None:
    """Write the report.html of a run anew."""
    from norm_matters.report import write_report

    _say(f"report {write_report(run)}")


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
        _say(f"note: {note}")
    _say(f"page {comparison.page}")


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


def _load_checked(config: Path | None, options: dict[str, Any], overrides: list[str]) -> "RunConfig":
    """A run's configuration, every mistake told at once."""
    from norm_matters.core.config import load_config
    from norm_matters.run import CHECKS

    return load_config(config, options, overrides, CHECKS)


def _common_options(parameters: dict[str, Any]) -> dict[str, Any]:
    """Dotted key -> value for the options given, of those that stand for a setting."""
    from norm_matters.core.config import OPTION_KEYS

    options: dict[str, Any] = {}
    for option, key in OPTION_KEYS.items():
        value = parameters[option]
        if value is None or value is False:
            continue
        if option in _NUMBERS:
            value = _number(value)
        elif option == "pretrained":
            value = {"true": True, "false": False}.get(value, value)
        options[key] = value
    return options


def _number(text: str) -> int | float | str:
    """The number, or the text as it is: the config says what is wrong with it."""
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    return text


def _checked(given: dict[str, str | None]) -> "RunConfig":
    """A configuration with these settings (dotted key -> text or None), checked like those of a run."""
    from norm_matters.core.config import load_config
    from norm_matters.run import CHECKS

    options = {key: _number(text) for key, text in given.items() if text is not None}
    return load_config(options=options, checks={"device": CHECKS["device"]})


def _paths_from_stdin() -> list[str]:
    return [line for line in sys.stdin.read().splitlines() if line]


def _without_broken(predictions: "Iterable[Prediction]", count: Counter[str]) -> "Iterator[Prediction]":
    """The predictions of readable images; the others are named on stderr. Counts the `shown` and the `broken`."""
    for prediction in predictions:
        if prediction.error is None:
            count["shown"] += 1
            yield prediction
        else:
            count["broken"] += 1
            print(f"skipped: {printable(prediction.error)}", file=sys.stderr)


def _show_lines(predictions: "Iterable[Prediction]") -> None:
    for prediction in predictions:
        likeliest = zip(prediction.classes, prediction.probabilities, strict=True)
        _say(f"{prediction.path}: {', '.join(f'{name} {100 * share:.1f}%' for name, share in likeliest)}")


def _show_csv(predictions: "Iterable[Prediction]") -> None:
    """Print a row per image and class, the likeliest first."""
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(["path", "rank", "class", "probability"])
    for prediction in predictions:
        likeliest = zip(prediction.classes, prediction.probabilities, strict=True)
        path = plain_cell(prediction.path)
        writer.writerows([path, rank, plain_cell(name), share] for rank, (name, share) in enumerate(likeliest, 1))


def _show_json(predictions: "Iterable[Prediction]") -> None:
    """Print one list of all images."""
    found = [{"path": p.path, "classes": p.classes, "probabilities": p.probabilities} for p in predictions]
    print(json.dumps(found, indent=1))


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


def _is_json(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)


def _mean_and_deviation(mean: float, deviation: float) -> str:
    if math.isnan(mean):
        return "-"
    return f"{mean:.4g}" if math.isnan(deviation) else f"{mean:.4g} ± {deviation:.2g}"


def _say_columns(lines: Sequence[Sequence[str]]) -> None:
    """Print a table, its columns aligned."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        _say("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def _say(text: str) -> None:
    print(printable(text))


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
