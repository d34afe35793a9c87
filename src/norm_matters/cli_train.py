"""The command `train`: one run, new or resumed, in this process or in several."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from norm_matters.cli_options import DataDir, Device, Number, parsed
from norm_matters.core import stopping
from norm_matters.core.errors import UserError
from norm_matters.core.ranks import find_ranks
from norm_matters.progress import ConsoleProgress, say

if TYPE_CHECKING:
    from norm_matters.core.config import RunConfig

_NUMBERS = {"epochs", "batch_size", "lr", "seed", "keep"}


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
    device: Device = None,
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
    if find_ranks().first:
        say(f"accuracy {100 - result.last['val_error1']:.2f}% after epoch {result.last['epoch']}")
        if result.report.exists():
            say(f"report {result.report}")


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
            value = parsed(value)
        elif option == "pretrained":
            value = {"true": True, "false": False}.get(value, value)
        options[key] = value
    return options
