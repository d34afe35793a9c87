"""One run from configuration to report: the file that joins the rooms, top to bottom."""

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from norm_matters.core.allocator import keep_pages
from norm_matters.core.clock import Clock
from norm_matters.core.config import (
    OPTION_KEYS,
    RegimeConfig,
    RunConfig,
    TrainConfig,
    differences,
    dump_config,
    flatten,
    load_config,
)
from norm_matters.core.errors import NumericalError, StorageError, UserError, nearest
from norm_matters.core.seeding import seed_everything
from norm_matters.datasets import Dataset, Loader, check_dataset, load_dataset
from norm_matters.datasets.entry import ENCODED_SIZE
from norm_matters.engine.device import check_device, device_name, resolve_device
from norm_matters.engine.instruments.collect import Instruments
from norm_matters.engine.loop import OnProgress, Progress, training_rows
from norm_matters.engine.state import TrainingState
from norm_matters.engine.step import StepOptions
from norm_matters.models import MODELS, BuiltModel, build_model, check_model
from norm_matters.norms import (
    available_backends,
    canonical_spec,
    check_kinds,
    check_spec,
    norms_of,
    set_kernels,
    spec_of,
)
from norm_matters.record import (
    RunLog,
    append_event,
    append_measurements,
    append_row,
    claim_run_folder,
    collect_provenance,
    default_name,
    is_run,
    latest_checkpoint,
    load_checkpoint,
    read_table,
    remove_temporaries,
    save_checkpoint,
    trim_measurements,
    trim_table,
    write_file,
    write_layout,
    write_provenance,
)
from norm_matters.regimes import Regime, build_regime, check_regime
from norm_matters.transforms import Preprocessing
from norm_matters.weights import canonical_weight_norm, check_weight_norm

# Settings of a recorded run that a resume may change, because no result depends on them.
FREE_TO_CHANGE = {
    "data.workers",
    "data.dir",
    "data.download",
    "device",
    "allocator",
    "train.epochs",
    "train.save_memory",
}


def check_phases(phases: list[dict[str, Any]]) -> None:
    """Raise UserError with what is wrong with the phases of a regime."""
    build_regime(RegimeConfig(phases=phases), default="constant")


# What `load_config` asks of each value, so that every mistake is found before anything is built or created.
CHECKS: Mapping[str, Callable[[Any], None]] = {
    "model.name": check_model,
    "model.norm": check_spec,
    "model.norm_kinds": check_kinds,
    "model.weight_norm": check_weight_norm,
    "data.name": check_dataset,
    "regime.name": check_regime,
    "regime.phases": check_phases,
    "device": check_device,
}


@dataclass(frozen=True)
class RunResult:
    """A finished run: its folder, the rows of results.csv, the report's path, and the last row."""

    folder: Path
    rows: list[dict[str, Any]]
    report: Path
    last: dict[str, Any]


@dataclass(frozen=True)
class Plan:
    """A run with everything built and nothing written; `allocator` says what was set up in malloc, if anything."""

    config: RunConfig
    dataset: Dataset
    built: BuiltModel
    preprocessing: Preprocessing
    regime: Regime
    state: TrainingState
    train: Loader
    val: Loader
    allocator: str | None


def train(
    config: RunConfig | None = None,
    *,
    command: Sequence[str] | None = None,
    on_progress: OnProgress | None = None,
    **options: Any,
) -> RunResult:
    """Train a network from the beginning and record it in a new run folder.

    Args:
        config: the run; or give the common options by name: `train(model="resnet20", norm="l1", epochs=3)`.
        command: the command line, for the record.
        on_progress: called as training goes on (see `engine.loop.Progress`).

    Raises:
        UserError: wrong input; what can be found before training is, and then nothing has been created.
        StorageError: the run folder cannot be written.
        NumericalError: the loss is no longer finite.
    """
    if config is None:
        config = load_config(options=_dotted(options), checks=CHECKS)
    elif options:
        raise UserError(f"give a config or options, not both: {', '.join(options)}")
    plan = prepare(config)
    model = plan.config.model
    default = default_name(_short(model.name), model.norm or "default", _short(plan.config.data.name), plan.config.seed)
    folder = claim_run_folder(Path(config.output), config.name, default)
    write_file(folder / "config.yaml", dump_config(plan.config))
    write_provenance(folder, _provenance(plan, command or []))
    return _execute(plan, folder, best=None, on_progress=on_progress)


def resume(
    folder: Path,
    *,
    options: Mapping[str, Any] | None = None,
    overrides: Sequence[str] = (),
    extend: bool = False,
    command: Sequence[str] | None = None,
    on_progress: OnProgress | None = None,
) -> RunResult:
    """Continue a recorded run from its last checkpoint, or from the beginning when it has none.

    Args:
        options, overrides: as for `load_config`; they may repeat the run's settings or change where and how far it
            runs (`FREE_TO_CHANGE`), nothing else.
        extend: allow another number of epochs although the schedule is relative to it; it is planned anew.

    Raises:
        UserError: not a run, settings that contradict it, data that changed, a damaged checkpoint.
    """
    if not is_run(folder):
        raise UserError(f"'{folder}' is no run folder: it needs config.yaml and provenance.json")
    recorded = load_config(folder / "config.yaml")
    config = load_config(folder / "config.yaml", options or {}, overrides, CHECKS)
    before, after = flatten(recorded), flatten(config)
    problems = [
        f"{key}: the run in '{folder}' has {before[key]!r}, not {after[key]!r}; a resumed run keeps its settings"
        for key in differences(recorded, config)
        if key not in FREE_TO_CHANGE
    ]
    if problems:
        raise UserError(*problems)
    last = latest_checkpoint(folder)
    plan = prepare(config, restored=last is not None)
    best, done = None, 0
    if last is not None:
        checkpoint = load_checkpoint(last)
        saved = checkpoint.state
        if saved["data"]["fingerprint"] != plan.dataset.fingerprint:
            raise UserError(
                f"the data of '{config.data.name}' is not what '{folder}' was trained on; see provenance.json"
            )
        done = saved["epoch"]
        _check_length(plan, recorded, done, extend)
        plan.state.load(checkpoint.model, checkpoint.training, saved["training"])
        best = saved["best"]
    event = {"event": "resumed", "epoch": done, "epochs": plan.config.train.epochs, "command": list(command or [])}
    remove_temporaries(folder)
    trim_table(folder / "results.csv", done)
    trim_measurements(folder, done)
    if config != recorded:
        write_file(folder / "config.yaml", dump_config(plan.config))
        event["changed"] = {key: [before[key], after[key]] for key in differences(recorded, config)}
    append_event(folder, event)
    return _execute(plan, folder, best=best, on_progress=on_progress)


def prepare(config: RunConfig, *, restored: bool = False) -> Plan:
    """Build everything a run needs, without writing anything: whatever is wrong with the input is found here.

    Args:
        restored: a checkpoint will replace the weights, so that pretrained ones are not asked for.
    """
    # Asked first, for setting it imports torch's compiler: two seconds.
    if torch.are_deterministic_algorithms_enabled() != config.deterministic:
        torch.use_deterministic_algorithms(config.deterministic)
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    device = resolve_device(config.device)
    _check_compilation(config.train, device)
    allocator = keep_pages() if config.allocator == "keep" and device.type == "cpu" else None
    set_kernels(config.kernels)
    dataset = load_dataset(config.data)
    config = _complete(config, dataset)
    input_size = dataset.size or config.data.input_size or ENCODED_SIZE
    seed_everything(config.seed)
    initial = config.model.model_copy(update={"pretrained": False}) if restored else config.model
    built = build_model(initial, num_classes=len(dataset.classes), in_channels=dataset.channels, input_size=input_size)
    preprocessing = dataset.preprocessing(
        crop=built.crop, input_size=input_size, cutout=config.data.cutout, draft=config.data.draft
    )
    train_loader, val_loader = (
        Loader(
            images,
            preprocessing,
            batch_size=config.data.batch_size,
            train=part == "train",
            seed=config.seed,
            workers=config.data.workers,
            device=device,
            transform=(built.input_transform or {}).get(part),
        )
        for part, images in (("train", dataset.train), ("eval", dataset.val))
    )
    assert config.train.epochs is not None
    regime = build_regime(config.regime, default=built.regime, own=built.phases)
    clock = Clock(0, len(train_loader), config.train.epochs, min(config.data.batch_size, len(dataset.train)))
    state = TrainingState(
        built.module,
        regime,
        clock,
        device=device,
        precision=config.train.precision,
        compiled=config.train.compile or config.train.cuda_graphs,
        cuda_graphs=config.train.cuda_graphs,
    )
    return Plan(config, dataset, built, preprocessing, regime, state, train_loader, val_loader, allocator)


def _check_compilation(train: TrainConfig, device: torch.device) -> None:
    """Refuse what compiled code cannot do."""
    problems = []
    if train.cuda_graphs and device.type != "cuda":
        problems.append(f"train.cuda_graphs: they need a CUDA device; this run is on {device.type}")
    if train.cuda_graphs and train.accumulate > 1:
        problems.append(f"train.cuda_graphs: they take whole batches only; leave train.accumulate={train.accumulate}")
    if (train.compile or train.cuda_graphs) and train.save_memory:
        problems.append("train.save_memory: compiled code decides itself what it keeps; leave one of the two")
    if (train.compile or train.cuda_graphs) and train.instruments == "all":
        problems.append("train.instruments: 'all' listens to layers, which compiled code has not; take 'default'")
    if problems:
        raise UserError(*problems)


def _complete(config: RunConfig, dataset: Dataset) -> RunConfig:
    """Fill in what depends on the dataset and the model, so that the recorded config says all."""
    model, data = config.model, config.data
    norm = canonical_spec(model.norm) if model.norm else ("l2" if model.name in MODELS else None)
    weight_norm = canonical_weight_norm(model.weight_norm) if model.weight_norm else None
    name = str(Path(model.name).resolve()) if model.name.endswith(".py") else model.name
    source, colon, path = data.name.partition(":")
    if colon:
        # As the dataset reads it: relative to the data folder where one is given.
        place = (Path(data.dir or "").expanduser() / Path(path).expanduser()).resolve()
        data = data.model_copy(update={"name": f"{source}:{place}"})
    train = config.train.model_copy(update={"epochs": config.train.epochs or dataset.epochs})
    model = model.model_copy(update={"name": name, "norm": norm, "weight_norm": weight_norm})
    # The folder bears the name; recorded, it would be taken already when the config is fed back.
    return config.model_copy(update={"model": model, "data": data, "train": train, "name": None})


def _check_length(plan: Plan, recorded: RunConfig, done: int, extend: bool) -> None:
    epochs, planned = plan.config.train.epochs, recorded.train.epochs
    assert epochs is not None
    if epochs < done:
        raise UserError(f"train.epochs: {epochs} epochs asked for, but the run has done {done} already")
    if epochs != planned and plan.regime.relative and not extend:
        raise UserError(
            f"train.epochs: the run was planned for {planned} epochs and its schedule is relative to that; "
            f"--extend plans it anew for {epochs}"
        )


def _execute(plan: Plan, folder: Path, *, best: dict[str, Any] | None, on_progress: OnProgress | None) -> RunResult:
    """Train from where the state stands, recording every epoch; the report is written however it ends."""
    log = RunLog(folder / "log.txt")
    for warning in plan.regime.unreached(plan.state.clock):
        log.write(f"warning: {warning}")
    log.write(_headline(plan))
    if on_progress:
        clock = plan.state.clock
        on_progress(Progress("start", clock.epoch + 1, clock.epochs, message=f"{folder}: {_headline(plan)}"))
    try:
        _train_and_record(plan, folder, log, best=best, on_progress=on_progress)
    except BaseException as error:
        # The first error is the one to show: a full disk also refuses this line.
        with contextlib.suppress(StorageError):
            log.write(f"stopped: {type(error).__name__}: {error}")
            if isinstance(error, KeyboardInterrupt | NumericalError):
                _write_report(folder)
        raise
    finally:
        # Not left to the end of the interpreter, where a worker's end can meet anything.
        plan.train.close()
        plan.val.close()
    log.write("done")
    rows = read_table(folder / "results.csv")
    return RunResult(folder, rows, _write_report(folder), rows[-1])


def _write_report(folder: Path) -> Path:
    # It needs bokeh and pandas, whose import the first step must not wait for.
    from norm_matters.report import write_report

    return write_report(folder)


def _train_and_record(
    plan: Plan, folder: Path, log: RunLog, *, best: dict[str, Any] | None, on_progress: OnProgress | None
) -> None:
    train_config = plan.config.train
    options = StepOptions(
        train_config.accumulate,
        train_config.clip_norm,
        train_config.label_smoothing,
        train_config.nonfinite,
        train_config.save_memory,
    )
    level = train_config.instruments
    instruments = None if level == "none" else Instruments(plan.state, level=level)
    if instruments:
        write_layout(folder, instruments.columns)
    rows = training_rows(
        plan.state, train=plan.train, val=plan.val, options=options, instruments=instruments, on_progress=on_progress
    )
    for row in rows:
        append_row(folder / "results.csv", row)
        if instruments:
            append_measurements(folder, row["epoch"], instruments.row)
        log.write(" ".join(f"{key}={value:g}" for key, value in row.items() if value is not None))
        while plan.state.incidents:
            log.write(f"warning: {plan.state.incidents.pop(0)}")
        improved = best is None or row["val_error1"] < best["val_error1"]
        if improved:
            best = {"epoch": row["epoch"], "val_error1": row["val_error1"]}
        save_checkpoint(
            folder,
            step=plan.state.clock.step,
            model=plan.state.model_tensors(),
            training=plan.state.training_tensors(),
            state=_saved_state(plan, row["epoch"], best),
            best=improved,
        )
        if on_progress:
            on_progress(Progress("epoch", row["epoch"], plan.state.clock.epochs, row=row))


def _saved_state(plan: Plan, epoch: int, best: dict[str, Any] | None) -> dict[str, Any]:
    """What makes a checkpoint folder work alone: settings, class names, preprocessing, position, data."""
    return {
        "config": plan.config.model_dump(mode="json"),
        "classes": list(plan.dataset.classes),
        "preprocessing": plan.preprocessing.to_json(),
        "epoch": epoch,
        "best": best,
        "data": {"val": plan.dataset.val_name, "fingerprint": plan.dataset.fingerprint},
        "model_source": plan.built.source,
        "training": plan.state.numbers(),
    }


def _provenance(plan: Plan, command: Sequence[str]) -> dict[str, Any]:
    specs = [spec_of(module) or type(module).__name__ for _, module in norms_of(plan.built.module)]
    parameters = sum(parameter.numel() for parameter in plan.built.module.parameters())
    return collect_provenance(
        list(command),
        device=str(plan.state.device),
        seed=plan.config.seed,
        allocator=plan.allocator,
        kernels=[backend.name for backend in available_backends() if backend.reason is None],
        model={
            "parameters": parameters,
            "norms": {spec: specs.count(spec) for spec in dict.fromkeys(specs)},
            "converted": plan.built.converted,
            "weight_norms": plan.built.weight_norms,
            "source": plan.built.source,
            "initial_weights": plan.built.weights,
        },
        data={
            "train_images": len(plan.dataset.train),
            "val_images": len(plan.dataset.val),
            "val": plan.dataset.val_name,
            "classes": list(plan.dataset.classes),
            "preprocessing": plan.preprocessing.to_json(),
            "workers": plan.train.workers,
            "fingerprint": plan.dataset.fingerprint,
        },
    )


def _headline(plan: Plan) -> str:
    model, clock = plan.config.model, plan.state.clock
    norm = " ".join(filter(None, (model.norm or "its own norms", plan.built.conversion)))
    if model.weight_norm:
        norm += f" and {model.weight_norm} weights"
    compiled = ", compiled (its first step takes long)" if plan.state.forward is not plan.state.module else ""
    return (
        f"{_short(model.name)} with {norm} on {plan.config.data.name}, {len(plan.dataset.train)} training and "
        f"{len(plan.dataset.val)} {plan.dataset.val_name} images, epochs: {clock.epochs}, "
        f"steps per epoch: {clock.steps_per_epoch}, {plan.config.train.precision} on {device_name(plan.state.device)}"
        f"{compiled}"
    )


def _short(name: str) -> str:
    """A name fit for a folder: a file's stem, a folder's own name behind its source."""
    if name.endswith(".py"):
        return Path(name).stem
    source, colon, rest = name.partition(":")
    return f"{source}-{Path(rest).name}" if colon else source


def _dotted(options: Mapping[str, Any]) -> dict[str, Any]:
    for name in options:
        if name not in OPTION_KEYS:
            raise UserError(f"unknown option '{name}'{nearest(name, OPTION_KEYS)}")
    return {OPTION_KEYS[name]: value for name, value in options.items()}
