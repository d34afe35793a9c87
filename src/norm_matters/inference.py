"""Using a trained network: load it, score it, let it name the classes of images."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from norm_matters.core.config import RunConfig
from norm_matters.core.errors import UserError, reading
from norm_matters.datasets import Dataset, Loader, Workers, decode_image, load_dataset
from norm_matters.datasets.folder import ENDINGS
from norm_matters.datasets.loader import evaluation_batch_size
from norm_matters.engine.device import resolve_device
from norm_matters.engine.evaluate import evaluate as score
from norm_matters.engine.precision import PRECISIONS, input_dtype
from norm_matters.engine.tensors import load_weights
from norm_matters.models import build_model
from norm_matters.models.trust import read_code
from norm_matters.plan import CHECKS
from norm_matters.record import Measurements, find_checkpoint, load_checkpoint, read_measurements, read_table
from norm_matters.record.state import STATE_FILE
from norm_matters.transforms.batch import normalise
from norm_matters.transforms.image import evaluation_pixels
from norm_matters.transforms.preprocessing import Preprocessing


@dataclass(frozen=True)
class LoadedRun:
    """A trained network with what is needed to use it.

    Attributes:
        model: in evaluation mode, on the device asked for, in the precision it was trained in.
        classes: names, in the order of the network's outputs.
        transform: PIL image -> float32 tensor (C, H, W) as the network expects it.
        results: the rows of results.csv ([] for a checkpoint folder on its own).
        config: the run's settings.
        checkpoint: the folder the weights came from.
        state: the checkpoint's state.json.
    """

    model: nn.Module
    classes: list[str]
    transform: Callable[[Image.Image], Tensor]
    results: list[dict[str, Any]]
    config: RunConfig
    checkpoint: Path
    state: dict[str, Any]
    device: torch.device
    preprocessing: Preprocessing
    own_transform: Callable[[Image.Image], Tensor] | None
    own_training_transform: Callable[[Image.Image], Tensor] | None

    @property
    def instruments(self) -> Measurements | None:
        """What the instruments measured, epoch by epoch; None for a run without, or a checkpoint folder on its own.

        Raises:
            UserError: the files are damaged.
        """
        return read_measurements(self.checkpoint.parent.parent)

    def logits(self, images: Tensor) -> Tensor:
        """Scores of images (N, C, H, W) as `transform` gives them: float32 (N, classes)."""
        precision = PRECISIONS[self.config.train.precision]
        with torch.no_grad(), precision.context(self.device):
            return self.model(images.to(self.device, input_dtype(self.model))).float()


@dataclass(frozen=True)
class Prediction:
    """The likeliest classes of one image, best first; or why it could not be read."""

    path: str
    classes: list[str]
    probabilities: list[float]
    error: str | None = None


def load_run(target: Path | str, *, device: str = "auto") -> LoadedRun:
    """Load the network of a run (its best checkpoint) or of one checkpoint folder.

    Raises:
        UserError: neither a run nor a checkpoint, or a damaged one.
    """
    folder = find_checkpoint(Path(target), prefer="best")
    checkpoint = load_checkpoint(folder)
    state = checkpoint.state
    with reading(str(folder / STATE_FILE)):
        config, preprocessing = _understand(state)
    _check_model_file(state["model_source"])
    built = build_model(
        config.model.model_copy(update={"pretrained": False}),
        num_classes=len(state["classes"]),
        in_channels=preprocessing.channels,
        input_size=preprocessing.input_size,
    )
    load_weights(built.module, checkpoint.model)
    PRECISIONS[config.train.precision].convert(built.module)
    where = resolve_device(device)
    built.module.to(device=where, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
    table = folder.parent.parent / "results.csv"
    own = (built.input_transform or {}).get("eval")

    def transform(image: Image.Image) -> Tensor:
        if own is not None:
            return own(image)
        pixels = evaluation_pixels(image, preprocessing)
        return normalise(pixels[None], preprocessing, torch.contiguous_format)[0]

    return LoadedRun(
        model=built.module,
        classes=list(state["classes"]),
        transform=transform,
        results=read_table(table) if table.is_file() else [],
        config=config,
        checkpoint=folder,
        state=state,
        device=where,
        preprocessing=preprocessing,
        own_transform=own,
        own_training_transform=(built.input_transform or {}).get("train"),
    )


def evaluate(
    target: Path | str,
    *,
    data_dir: str | None = None,
    dataset: str | None = None,
    device: str = "auto",
    batch_size: int | None = None,
    workers: Workers = "auto",
) -> dict[str, Any]:
    """Score a run's best checkpoint, or a checkpoint, on the images its training reported as `val`.

    Args:
        data_dir: where the dataset lies now.
        dataset: the name of the same images in another place (`imagefolder:NEW`), or of others of the same classes.

    Returns:
        loss, error1, error5 (percent; None below six classes), images, dataset, split, checkpoint, epoch.
    """
    run = load_run(target, device=device)
    return evaluate_run(run, load_data(run, data_dir, dataset), batch_size=batch_size, workers=workers)


def load_data(run: LoadedRun, data_dir: str | None = None, dataset: str | None = None) -> Dataset:
    """The dataset of a run, or what stands in for it; the arguments are those of `evaluate`.

    Raises:
        UserError: it is not there, or its images or classes are not those of the network.
    """
    given = {"dir": data_dir, "name": dataset}
    found = load_dataset(run.config.data.model_copy(update={key: value for key, value in given.items() if value}))
    if list(found.classes) != run.classes:
        raise UserError(f"the classes of '{found.name}' are not those the network was trained on")
    takes = run.preprocessing
    if found.channels != takes.channels:
        raise UserError(f"images of '{found.name}' have {found.channels} channels; the network takes {takes.channels}")
    if found.size not in (None, takes.input_size):
        raise UserError(
            f"the side of the images of '{found.name}' is {found.size}; the network takes {takes.input_size}"
        )
    return found


def evaluate_run(
    run: LoadedRun, dataset: Dataset, *, batch_size: int | None = None, workers: Workers = "auto"
) -> dict[str, Any]:
    """Score a loaded network; what `evaluate` returns."""
    loader = Loader(
        dataset.val,
        run.preprocessing,
        batch_size=batch_size or evaluation_batch_size(run.config.data.batch_size),
        train=False,
        seed=run.config.seed,
        workers=workers,
        device=run.device,
        transform=run.own_transform,
    )
    scores = score(
        run.model,
        loader.epoch(0),
        device=run.device,
        precision=PRECISIONS[run.config.train.precision],
        input_dtype=input_dtype(run.model),
    )
    return {
        "loss": scores.loss,
        "error1": scores.error1,
        "error5": scores.error5,
        "images": scores.images,
        "dataset": dataset.name,
        "split": dataset.val_name,
        "epoch": run.state["epoch"],
        "checkpoint": str(run.checkpoint),
    }


def predict(
    target: Path | str, images: Sequence[Path], *, top: int = 5, device: str = "auto", batch_size: int = 64
) -> Iterator[Prediction]:
    """Name the likeliest classes of images; an image that cannot be read gives a Prediction with `error` set.

    Args:
        images: files, or folders searched for image files at any depth.
        top: how many classes per image.

    Raises:
        UserError: a path that does not exist, or a folder without images; found before the first prediction.
    """
    run = load_run(target, device=device)
    return _predict_files(run, expand_images(images), top=min(top, len(run.classes)), batch_size=batch_size)


def expand_images(paths: Sequence[Path]) -> list[Path]:
    """Replace folders by the image files in them, sorted; UserError for what does not exist or holds no image."""
    files: list[Path] = []
    for path in paths:
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.suffix.lower() in ENDINGS and p.is_file())
            if not found:
                raise UserError(f"'{path}' holds no images ({', '.join(ENDINGS)})")
            files += found
        elif path.exists():
            files.append(path)
        else:
            raise UserError(f"'{path}' does not exist")
    return files


def _understand(state: dict[str, Any]) -> tuple[RunConfig, Preprocessing]:
    """The settings and the preprocessing in a checkpoint; raises where they, or the classes, are not what they must be.

    The file may be a stranger's.
    """
    config = RunConfig.model_validate(state["config"])
    for key in ("name", "norm", "norm_kinds", "weight_norm"):
        value = getattr(config.model, key)
        if value is not None:
            CHECKS[f"model.{key}"](value)
    classes, source, epoch = state["classes"], state["model_source"], state["epoch"]
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes) or len(classes) < 2:
        raise ValueError("classes are no list of names")
    if source is not None and not (isinstance(source["path"], str) and isinstance(source["sha256"], str)):
        raise ValueError("model_source is no path with its SHA-256")
    if type(epoch) is not int:
        raise ValueError(f"epoch {epoch!r:.40} is no number")
    return config, Preprocessing.from_json(state["preprocessing"])


def _check_model_file(source: dict[str, str] | None) -> None:
    """Refuse to run a user's model file that is not the one the network was trained with."""
    if source is None:
        return
    path = Path(source["path"])
    if not path.is_file():
        raise UserError(f"the network was defined in '{path}', which does not exist any more")
    if hashlib.sha256(read_code(path)).hexdigest() != source["sha256"]:
        raise UserError(f"the network was defined in '{path}', which has changed since")


def _predict_files(run: LoadedRun, files: Sequence[Path], *, top: int, batch_size: int) -> Iterator[Prediction]:
    for start in range(0, len(files), batch_size):
        group = files[start : start + batch_size]
        tensors: dict[Path, Tensor] = {}
        errors: dict[Path, str] = {}
        for path in group:
            try:
                tensors[path] = run.transform(decode_image(path, run.preprocessing.channels))
            except UserError as error:
                errors[path] = str(error)
        likeliest: dict[Path, tuple[list[float], list[int]]] = {}
        if tensors:
            values, indices = run.logits(torch.stack(list(tensors.values()))).softmax(1).topk(top)
            for path, probabilities, classes in zip(tensors, values.tolist(), indices.tolist(), strict=True):
                likeliest[path] = (probabilities, classes)
        for path in group:
            if path in errors:
                yield Prediction(str(path), [], [], errors[path])
            else:
                probabilities, classes = likeliest[path]
                yield Prediction(str(path), [run.classes[i] for i in classes], probabilities)
