"""Recorded norms and what stands in for decay, in whole runs: files, resuming to the bit, precisions, mistakes."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from norm_matters.core.config import load_config
from norm_matters.core.errors import UserError
from norm_matters.record import find_checkpoint, load_checkpoint, read_measurements, read_table
from norm_matters.record.weight_norms import NORMS_FOLDER, read_weight_norms
from norm_matters.run import CHECKS, RunResult, resume, train

COMMON = [
    "model.name=resnet8",
    "model.options.width=4",
    "data.name=digits",
    "data.batch_size=256",
    "device=cpu",
    "deterministic=true",
    "train.epochs=3",
    "train.instruments=none",
]
DECAY = 0.02
FORMS: dict[str, dict[str, Any]] = {
    "epoch": {"form": "lr-correction", "every": "epoch"},
    "step": {"form": "lr-correction", "every": "step", "decay": DECAY},
    "norm": {"form": "norm-schedule", "lr": 0.1},
    "exponential": {"form": "exponential-lr", "decay": DECAY},
}


def phases(form: dict[str, Any] | None) -> str:
    first = {"epoch": 0, "lr": 0.1, "momentum": 0.9, "weight_decay": DECAY if form is None else 0.0}
    if form is not None:
        first |= {"instead_of_decay": form, "groups": {"last": {"weight_decay": DECAY}}}
    return f"regime.phases={json.dumps([first, {'epoch': 2, 'lr': 0.01}])}"


def run(output: Path, name: str, form: str | None, *overrides: str, norms: Path | None = None) -> RunResult:
    chosen = None if form is None else FORMS[form]
    place = [f"output={output}", f"name={name}", *([f"regime.norms={norms}"] if norms else [])]
    return train(load_config(overrides=[*COMMON, phases(chosen), *place, *overrides], checks=CHECKS))


@pytest.fixture(scope="module", autouse=True)
def _without_reports() -> Iterator[None]:
    """Reports take longer than these runs, and have tests of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("norm_matters.report.write_report", lambda folder: folder / "report.html")
        yield


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def on(output: Path) -> Path:
    """A run with decay whose norms are recorded at every step."""
    return run(output, "on", None, "train.record_norms=step").folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_checkpoint(find_checkpoint(folder, prefer="last")).model


def same(a: Path, b: Path) -> bool:
    first, second = (load_checkpoint(find_checkpoint(folder, prefer="last")) for folder in (a, b))
    return all(
        one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
        for one, other in ((first.model, second.model), (first.training, second.training))
    )


def test_norms_are_recorded_before_every_step_and_at_the_end_of_every_epoch(on: Path) -> None:
    found = read_weight_norms(on)
    steps = read_table(on / "results.csv")[0]["step"]
    assert list(found) == [1, 2, 3]
    model = weights(on)
    for name, rows in found[3][0].items():
        assert rows.shape == (steps + 1, len(model[f"{name}.weight"]))
        last = model[f"{name}.weight"].flatten(1).double().norm(dim=1)
        np.testing.assert_allclose(rows[-1], last, rtol=1e-6)
    for epoch in (1, 2):
        for name, rows in found[epoch][0].items():
            assert np.array_equal(rows[-1], found[epoch + 1][0][name][0]), "an epoch begins where the last one ended"


def test_recording_changes_no_bit_of_a_run(output: Path, on: Path) -> None:
    plain = run(output, "plain", None).folder
    assert same(plain, on)
    assert not (plain / NORMS_FOLDER).exists()
    assert not (on / "instruments.json").exists()
    once = run(output, "once", None, "train.record_norms=epoch", "train.instruments=default").folder
    assert read_measurements(once) is not None
    for epoch, (layers, _) in read_weight_norms(once).items():
        for name, rows in layers.items():
            assert np.array_equal(rows, read_weight_norms(on)[epoch][0][name][-1:])


@pytest.mark.parametrize(
    "form", [pytest.param(form, marks=[] if form in ("epoch", "exponential") else pytest.mark.slow) for form in FORMS]
)
def test_it_takes_the_place_of_decay_and_goes_on_to_the_bit(output: Path, on: Path, form: str) -> None:
    norms = None if form == "exponential" else on
    whole = run(output, f"{form}-whole", form, "train.instruments=default", norms=norms)
    assert not same(whole.folder, on)
    config = load_config(whole.folder / "config.yaml")
    assert config.regime.norms == (None if norms is None else str(on))
    assert config.regime.phases is not None
    assert config.regime.phases[0]["instead_of_decay"] == FORMS[form]
    part = run(output, f"{form}-part", form, "train.instruments=default", "train.epochs=2", norms=norms).folder
    resume(part, options={"train.epochs": 3})
    assert same(whole.folder, part)


def test_the_norms_of_an_interrupted_run_are_those_of_a_whole_one(output: Path, on: Path) -> None:
    part = run(output, "on-part", None, "train.record_norms=step", "train.epochs=2").folder
    # As of a process that was killed after the row of an epoch whose checkpoint it did not write.
    (part / NORMS_FOLDER / "epoch-0007.safetensors").write_bytes(b"later")
    resume(part, options={"train.epochs": 3})
    for path in sorted((on / NORMS_FOLDER).iterdir()):
        assert (part / NORMS_FOLDER / path.name).read_bytes() == path.read_bytes()
    assert len(list((part / NORMS_FOLDER).iterdir())) == 3


def test_an_epoch_left_in_its_middle_keeps_its_norms(output: Path, on: Path) -> None:
    folder = output / "on-middle"
    seen = []

    def stop(progress) -> None:
        if progress.kind == "batch" and progress.epoch == 2 and progress.step >= 2 and not seen:
            seen.append(progress.step)
            raise KeyboardInterrupt

    from norm_matters.engine import loop

    patch = pytest.MonkeyPatch()
    patch.setattr(loop, "SECONDS_BETWEEN_REPORTS", 0.0)
    config = load_config(
        overrides=[
            *COMMON,
            phases(None),
            *("train.record_norms=step", "train.checkpoint_every=1st", f"output={output}", "name=on-middle"),
        ],
        checks=CHECKS,
    )
    with pytest.raises(KeyboardInterrupt):
        train(config, on_progress=stop)
    patch.undo()
    assert seen
    saved = load_checkpoint(find_checkpoint(folder, prefer="last")).training
    assert len(saved["instruments/norms/rows"]) >= 1
    resume(folder)
    for path in sorted((on / NORMS_FOLDER).iterdir()):
        assert (folder / NORMS_FOLDER / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("precision", [pytest.param("amp-bf16", marks=pytest.mark.slow), "bf16"])
def test_it_moves_the_masters_of_low_precision_weights(output: Path, precision: str) -> None:
    options = (f"train.precision={precision}", "train.epochs=1")
    on = run(output, f"on-{precision}", None, "train.record_norms=step", *options).folder
    folder = run(output, f"norm-{precision}", "norm", *options, norms=on).folder
    found, model = read_weight_norms(on)[1][0], weights(folder)
    for name, rows in found.items():
        assert rows.dtype == np.float32
        length = model[f"{name}.weight"].flatten(1).norm(dim=1)
        if name != "fc":
            np.testing.assert_allclose(length, rows[-1], rtol=1e-5)


def test_the_effective_rate_of_a_corrected_run_is_that_of_the_recorded_norms(output: Path, on: Path) -> None:
    folder = run(output, "measured", "step", "train.instruments=default", norms=on).folder
    measured = read_measurements(folder)
    assert measured is not None
    for layer, values in measured.columns["effective_lr"].items():
        rows = read_weight_norms(on)[1][0][layer]
        if layer != "fc":
            # Before the last step, as the instruments take them: lr / ((1 - m) |w|^2).
            expected = 0.1 / (0.1 * np.square(rows[-2].astype(float)).sum())
            assert values[0, 0] == pytest.approx(expected, rel=1e-4)


def test_mistakes_are_found_before_a_folder_is_made(output: Path, on: Path) -> None:
    cases = {
        "missing": (["regime.norms=nowhere"], "nowhere' has no recorded norms"),
        "another": ([f"regime.norms={on}", "model.options.width=8"], "is of another network: its layer"),
        "epochs": (
            [f"regime.norms={on}", "train.epochs=4"],
            "has the norms of 3 epochs; this run needs those of epoch 4",
        ),
        "steps": ([f"regime.norms={on}", "data.batch_size=128"], "norms of 5 steps in epoch 1; this run has 11 steps"),
        "none": ([], "regime.norms: missing"),
    }
    for name, (overrides, message) in cases.items():
        with pytest.raises(UserError, match=message) as error:
            run(output, f"wrong-{name}", "step", *overrides)
        assert len(error.value.problems) == 1
        assert not (output / f"wrong-{name}").exists()


def test_moved_norms_are_found_and_others_refused(output: Path, on: Path) -> None:
    moved = output / "moved"
    folder = run(output, "follows", "epoch", "train.epochs=2", norms=on).folder
    on.rename(moved)
    try:
        with pytest.raises(UserError, match="has no recorded norms"):
            resume(folder, options={"train.epochs": 3})
        other = run(output, "on-other", None, "train.record_norms=step", "seed=1").folder
        with pytest.raises(UserError, match="are not those that the run began with"):
            resume(folder, options={"train.epochs": 3, "regime.norms": str(other)})
        resume(folder, options={"train.epochs": 3, "regime.norms": str(moved)})
    finally:
        moved.rename(on)
    assert same(folder, run(output, "follows-whole", "epoch", norms=on).folder)
