"""The command `import`. Only typer is imported at the top: `--help` answers without torch."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from norm_matters.core.errors import UserError
from norm_matters.core.numbers import is_whole
from norm_matters.progress import say

if TYPE_CHECKING:
    from norm_matters.models.old_layers import RunningVar

_OPTION = "model.options."
_RUNNING_VAR = ("inverse", "variance")
_POWERS = {"1": 1.0, "2": 2.0, "inf": float("inf")}


def import_old(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="such as model_best.pth.tar")],
    output: Annotated[Path, typer.Argument(metavar="OUT.safetensors", help="the file to write")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="model.options.NAME=VALUE of the network")
    ] = None,
    model: Annotated[
        str, typer.Option(help="the network with the same layers, such as resnet56; see `list models`")
    ] = "",
    norm: Annotated[str | None, typer.Option(help="the norm that the old network had, such as l1 or topk:k=10")] = None,
    num_classes: Annotated[str | None, typer.Option(metavar="N", help="that of the file by default")] = None,
    running_var: Annotated[
        str | None, typer.Option(metavar="|".join(_RUNNING_VAR), help="what it holds, where the file does not show it")
    ] = None,
    weight_p: Annotated[
        str, typer.Option(metavar="|".join(_POWERS), help="norm of weights bounded with a learned g")
    ] = "2",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print what would be done and write nothing")] = False,
    force: Annotated[bool, typer.Option("--force", help="replace OUT if it exists")] = False,
) -> None:
    """Turn a checkpoint of the paper's code, or of convNet.pytorch, into weights for --pretrained."""
    problems = []
    if not model:
        problems.append("--model: missing; name our network with the same layers, such as resnet56")
    if output.suffix != ".safetensors":
        problems.append(f"'{output}': the file to write must end in .safetensors")
    elif output.exists() and not (force or dry_run):
        problems.append(f"'{output}' exists; choose another name, or replace it with --force")
    if num_classes is not None and not is_whole(num_classes, 1):
        problems.append(f"--num-classes: value '{num_classes}' is not valid; it takes a whole number from 1")
    if running_var not in (None, *_RUNNING_VAR):
        problems.append(f"--running-var: value '{running_var}' is not valid; it takes inverse or variance")
    if weight_p not in _POWERS:
        problems.append(f"--weight-p: value '{weight_p}' is not valid; it takes 1, 2 or inf")
    for override in overrides or []:
        if not override.startswith(_OPTION):
            problems.append(f"'{override}': only options of the network can be set here, as {_OPTION}NAME=VALUE")
    if problems:
        raise UserError(*problems)
    from safetensors.torch import save

    from norm_matters.core.config import load_config
    from norm_matters.models.old_checkpoints import import_checkpoint
    from norm_matters.record import write_file

    config = load_config(options={"model.name": model, "model.norm": norm}, overrides=overrides or []).model
    imported = import_checkpoint(
        file,
        model=config.name,
        norm=config.norm,
        num_classes=None if num_classes is None else int(num_classes),
        running_var=cast("RunningVar | None", running_var),
        weight_p=_POWERS[weight_p],
        options=config.options,
    )
    for line in imported.lines():
        say(line)
    if not dry_run:
        write_file(output, save(imported.tensors, metadata={"format": "pt"}))
        spec = "" if norm is None else f" --norm {norm}"
        options = "".join(f" {override}" for override in overrides or [])
        say(f"written: use it with --model {model}{spec} --pretrained {output}{options}")
