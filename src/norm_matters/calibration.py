"""The running statistics of a trained network taken anew from its training images, as a checkpoint of its own."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor

from norm_matters.core.errors import UserError
from norm_matters.datasets import Dataset, Loader, Workers
from norm_matters.engine.precision import PRECISIONS, input_dtype
from norm_matters.inference import LoadedRun, evaluate_run, load_data, load_run
from norm_matters.norms import CalibrationReport, calibrate_norm
from norm_matters.record import load_checkpoint, write_checkpoint

MOST_BATCHES = 200
"""How many batches are taken unless somebody says: statistics have settled long before."""


@dataclass(frozen=True)
class Calibration:
    """What `calibrate_run` did.

    Attributes:
        before, after: scores, as `inference.evaluate` gives them.
        report: what became of each norm.
        batch_size: images per batch, the training's.
        checkpoint: the new checkpoint's folder.
    """

    before: dict[str, Any]
    after: dict[str, Any]
    report: CalibrationReport
    batch_size: int
    checkpoint: Path


def calibrate_run(
    target: Path | str,
    *,
    data_dir: str | None = None,
    dataset: str | None = None,
    device: str = "auto",
    batch_size: int | None = None,
    workers: Workers = "auto",
    batches: int = MOST_BATCHES,
) -> Calibration:
    """Calibrate the norms of a run's best checkpoint, or of a checkpoint, and write the result beside it.

    The statistics come from the training images as training shows them: shuffled, augmented, in batches of its size.
    The new folder is named after the old one with `-calibrated`; it holds the weights, not the training's state, and
    the run's `last` and `best` stay what they were.

    Args:
        data_dir, dataset: see `norm_matters.inference.evaluate`.
        batch_size: of the evaluations before and after; the training's by default.
        batches: how many training batches to take, at most an epoch's.

    Raises:
        UserError: no run and no checkpoint, data that does not fit, or a network without a norm to calibrate.
        StorageError: the checkpoint cannot be written.
    """
    run = load_run(target, device=device)
    if run.checkpoint.parent.is_symlink():
        raise UserError(f"{run.checkpoint.parent} is a link; a run's files are its own: nothing is written there")
    images = load_data(run, data_dir, dataset)
    before = evaluate_run(run, images, batch_size=batch_size, workers=workers)
    try:
        with PRECISIONS[run.config.train.precision].context(run.device):
            report = calibrate_norm(run.model, _training_images(run, images, batches, workers))
    except ValueError as error:
        raise UserError(f"'{target}': {error}") from error
    after = evaluate_run(run, images, batch_size=batch_size, workers=workers)
    folder = _free_name(run.checkpoint)
    facts = {
        "from": run.checkpoint.name,
        "dataset": images.name,
        "batches": report.batches,
        "rejected": report.rejected,
        "error1": {"before": before["error1"], "after": after["error1"]},
    }
    _write(run, folder, report, facts)
    after["checkpoint"] = str(folder)
    return Calibration(before, after, report, run.config.data.batch_size, folder)


def _training_images(run: LoadedRun, dataset: Dataset, batches: int, workers: Workers) -> Iterator[Tensor]:
    loader = Loader(
        dataset.train,
        run.preprocessing,
        batch_size=run.config.data.batch_size,
        train=True,
        seed=run.config.seed,
        workers=workers,
        device=run.device,
        transform=run.own_training_transform,
    )
    dtype = input_dtype(run.model)
    try:
        for batch in islice(loader.epoch(0), batches):
            yield batch.images.to(dtype)
    finally:
        loader.close()


def _write(run: LoadedRun, folder: Path, report: CalibrationReport, facts: dict[str, Any]) -> None:
    """The old checkpoint with new statistics; the weights in full precision, as they were saved."""
    old = load_checkpoint(run.checkpoint)
    calibrated = tuple(f"{row.name}." if row.name else "" for row in report.rows)
    statistics = {
        key: tensor
        for key, tensor in run.model.state_dict().items()
        if key.startswith(calibrated)
        and key.rpartition(".")[2] in ("running_mean", "running_var", "num_batches_tracked")
    }
    state = {**old.state, "calibration": facts}
    write_checkpoint(folder, step=old.step, model={**old.model, **statistics}, training={}, state=state, best=False)


def _free_name(checkpoint: Path) -> Path:
    """`step-000000022-calibrated` beside the checkpoint, or with `-2` and so on where that is taken."""
    base = checkpoint.with_name(f"{checkpoint.name.partition('-calibrated')[0]}-calibrated")
    folder, count = base, 1
    while folder.exists():
        count += 1
        folder = base.with_name(f"{base.name}-{count}")
    return folder
