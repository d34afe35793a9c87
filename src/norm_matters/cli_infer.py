"""The commands `eval` and `predict`: what a trained network makes of images."""

import csv
import json
import math
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from norm_matters.cli_options import AnyDevice, AsJson, DataDir, Number, checked, number
from norm_matters.core.cells import plain_cell
from norm_matters.core.errors import UserError
from norm_matters.progress import say

if TYPE_CHECKING:
    from norm_matters.inference import Prediction

Target = Annotated[
    Path, typer.Argument(metavar="RUN|CHECKPOINT", help="a run's folder (its best checkpoint counts) or a checkpoint's")
]


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
    count = number("--batches", batches)
    from norm_matters import calibration, inference

    settings = checked({"device": device, "data.name": dataset, "data.batch_size": batch_size, "data.workers": workers})
    options: dict[str, Any] = {
        "data_dir": data_dir,
        "dataset": dataset,
        "device": settings.device,
        "batch_size": settings.data.batch_size if batch_size else None,  # None: as in training
        "workers": settings.data.workers,
    }
    if calibrate:
        result = calibration.calibrate_run(target, batches=count, **options)
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
        say(
            f"{title}{title and ' '}{scores['dataset']} ({scores['split']}, {scores['images']} images): "
            f"loss {scores['loss']:.4f}, error@1 {scores['error1']:.2f}%{error5}"
        )
    if result:
        say(f"calibrated on {result.report.batches} batches of {result.batch_size} training images")
    say(f"checkpoint {list(found.values())[-1]['checkpoint']}")


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
    classes = number("--top", top)
    paths = [Path(path) for image in images for path in (_paths_from_stdin() if image == "-" else [image])]
    if not paths:
        raise UserError("-: standard input names no image")
    from norm_matters import inference

    settings = checked({"device": device, "data.batch_size": batch_size})
    predictions = inference.predict(
        target, paths, top=classes, device=settings.device, batch_size=settings.data.batch_size
    )
    count = Counter[str]()
    show = _show_csv if as_csv else _show_json if as_json else _show_lines
    show(_without_broken(predictions, count))
    if count["broken"]:
        print(f"skipped {count['broken']} of {count.total()} images", file=sys.stderr)
    if not count["shown"]:
        raise UserError("none of the images can be read")


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
            say(f"skipped: {prediction.error}", sys.stderr)


def _show_lines(predictions: "Iterable[Prediction]") -> None:
    for prediction in predictions:
        likeliest = zip(prediction.classes, prediction.probabilities, strict=True)
        say(f"{prediction.path}: {', '.join(f'{name} {100 * share:.1f}%' for name, share in likeliest)}")


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


def _is_json(value: Any) -> bool:
    return not isinstance(value, float) or math.isfinite(value)
