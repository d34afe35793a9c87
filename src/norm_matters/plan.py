"""From a configuration to everything that a run needs, built and checked before anything is written."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from norm_matters.core.allocator import keep_pages
from norm_matters.core.clock import Clock
from norm_matters.core.config import RegimeConfig, RunConfig, TrainConfig
from norm_matters.core.errors import UserError
from norm_matters.core.ranks import ONE_PROCESS, Ranks
from norm_matters.core.seeding import seed_everything
from norm_matters.datasets import PLACES, Dataset, Loader, check_dataset, load_dataset
from norm_matters.datasets.entry import ENCODED_SIZE
from norm_matters.datasets.loader import evaluation_batch_size
from norm_matters.datasets.standing_in import images_to_skip
from norm_matters.datasets.workers import available_cores, count_workers
from norm_matters.engine.device import check_device, device_name, resolve_device
from norm_matters.engine.replicas import check_ranks
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
from norm_matters.record.weight_norms import read_weight_norms
from norm_matters.regimes import Regime, build_regime, check_regime
from norm_matters.transforms import Preprocessing
from norm_matters.weights import canonical_weight_norm, check_weight_norm
from norm_matters.weights.recorded import EpochNorms, RecordedNorms


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


def prepare(config: RunConfig, *, restored: bool = False, ranks: Ranks = ONE_PROCESS) -> Plan:
    """Build everything a run needs, without writing anything: whatever is wrong with the input is found here.

    Args:
        restored: a checkpoint will replace the weights, so that pretrained ones are not asked for.
        ranks: which of the processes that train together this is. Nothing is exchanged between them here.
    """
    # Asked first, for setting it imports torch's compiler: two seconds.
    if torch.are_deterministic_algorithms_enabled() != config.deterministic:
        torch.use_deterministic_algorithms(config.deterministic)
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    device = resolve_device(config.device, ranks)
    _check_compilation(config.train, device, ranks)
    allocator = keep_pages() if config.allocator == "keep" and device.type == "cpu" else None
    set_kernels(config.kernels)
    # By the full path, as the record names it: the fingerprint has the name, and a resumed run compares.
    dataset = load_dataset(complete(config, epochs=1).data)
    config = complete(config, epochs=dataset.epochs)
    input_size = dataset.size or config.data.input_size or ENCODED_SIZE
    seed_everything(config.seed)
    initial = config.model.model_copy(update={"pretrained": False}) if restored else config.model
    built = build_model(initial, num_classes=len(dataset.classes), in_channels=dataset.channels, input_size=input_size)
    preprocessing = dataset.preprocessing(
        crop=built.crop, input_size=input_size, cutout=config.data.cutout, draft=config.data.draft
    )
    workers = config.data.workers
    if workers == "auto" and ranks.local_world > 1:
        workers = count_workers(device, cores_of_rank(ranks))
    train_loader, val_loader = (
        Loader(
            images,
            preprocessing,
            batch_size=batch_size,
            train=part == "train",
            seed=config.seed,
            workers=workers,
            device=device,
            transform=(built.input_transform or {}).get(part),
            rank=ranks.rank,
            world=ranks.world,
            chunks=config.train.accumulate,
            to_skip=images_to_skip(config.data.bad_images),
        )
        for part, images, batch_size in (
            ("train", dataset.train, config.data.batch_size),
            ("eval", dataset.val, evaluation_batch_size(config.data.batch_size)),
        )
    )
    assert config.train.epochs is not None
    batch_size = min(config.data.batch_size, len(dataset.train))
    if ranks.world > 1:
        check_ranks(images=batch_size, chunks=config.train.accumulate, world=ranks.world)
    regime = build_regime(config.regime, default=built.regime, own=built.phases, batch_size=batch_size)
    clock = Clock(0, len(train_loader), config.train.epochs, batch_size)
    state = TrainingState(
        built.module,
        regime,
        clock,
        device=device,
        precision=config.train.precision,
        compiled=config.train.compile or config.train.cuda_graphs,
        cuda_graphs=config.train.cuda_graphs,
        norms=_recorded_norms(config.regime.norms),
    )
    return Plan(config, dataset, built, preprocessing, regime, state, train_loader, val_loader, allocator)


def cores_of_rank(ranks: Ranks) -> int:
    """The cores that are one rank's own, of those that all on its machine share.

    With `--cpus-per-task` srun may show each task its own alone: these are not divided again.
    """
    cores, own = available_cores(), os.environ.get("SLURM_CPUS_PER_TASK", "")
    if ranks.launcher == "srun" and own.isdecimal():
        return max(1, min(cores, int(own)))
    return max(1, cores // ranks.local_world)


def _recorded_norms(folder: str | None) -> RecordedNorms | None:
    """The norms of the run that a regime follows."""
    if folder is None:
        return None
    found = read_weight_norms(Path(folder))
    return RecordedNorms(folder, {epoch: EpochNorms(*norms) for epoch, norms in found.items()})


def _check_compilation(train: TrainConfig, device: torch.device, ranks: Ranks) -> None:
    """Refuse what compiled code cannot do."""
    problems = []
    if train.cuda_graphs and ranks.world > 1:
        problems.append(f"train.cuda_graphs: they are for one process; there are {ranks.world}")
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


def complete(config: RunConfig, *, epochs: int) -> RunConfig:
    """Fill in what depends on the dataset and the model, so that the recorded config says all.

    Args:
        epochs: the dataset's own length of training, taken where the config names none.
    """
    model, data = config.model, config.data
    norm = canonical_spec(model.norm) if model.norm else ("l2" if model.name in MODELS else None)
    weight_norm = canonical_weight_norm(model.weight_norm) if model.weight_norm else None
    name = str(Path(model.name).resolve()) if model.name.endswith(".py") else model.name
    source, colon, path = data.name.partition(":")
    if colon and source in PLACES:
        # As the dataset reads it: relative to the data folder where one is given.
        place = (Path(data.dir or "").expanduser() / Path(path).expanduser()).resolve()
        data = data.model_copy(update={"name": f"{source}:{place}"})
    train = config.train.model_copy(update={"epochs": config.train.epochs or epochs})
    regime = config.regime
    if regime.norms is not None:
        regime = regime.model_copy(update={"norms": str(Path(regime.norms).expanduser().resolve())})
    model = model.model_copy(update={"name": name, "norm": norm, "weight_norm": weight_norm})
    # The folder bears the name; recorded, it would be taken already when the config is fed back.
    return config.model_copy(update={"model": model, "data": data, "regime": regime, "train": train, "name": None})


def step_options(train: TrainConfig) -> StepOptions:
    """What a training step does besides the plain one, as configured."""
    return StepOptions(
        train.accumulate,
        train.clip_norm,
        train.label_smoothing,
        train.nonfinite,
        train.save_memory,
    )


def made_of(plan: Plan) -> dict[str, Any]:
    """What the record says of a plan beside its config, in JSON types."""
    specs = [spec_of(module) or type(module).__name__ for _, module in norms_of(plan.built.module)]
    parameters = sum(parameter.numel() for parameter in plan.built.module.parameters())
    return {
        "seed": plan.config.seed,
        "allocator": plan.allocator,
        "kernels": [
            backend.name
            for backend in available_backends()
            if backend.reason is None and plan.config.kernels in ("auto", backend.name)
        ],
        "model": {
            "parameters": parameters,
            "norms": {spec: specs.count(spec) for spec in dict.fromkeys(specs)},
            "converted": plan.built.converted,
            "weight_norms": plan.built.weight_norms,
            "source": plan.built.source,
            "initial_weights": plan.built.weights,
        },
        "data": {
            "train_images": len(plan.dataset.train),
            "val_images": len(plan.dataset.val),
            "val": plan.dataset.val_name,
            "classes": list(plan.dataset.classes),
            "preprocessing": plan.preprocessing.to_json(),
            "workers": plan.train.workers,
            "fingerprint": plan.dataset.fingerprint,
        },
    }


def saved_state(plan: Plan, numbers: dict[str, Any], *, epoch: int, best: dict[str, Any] | None) -> dict[str, Any]:
    """What makes a checkpoint folder work alone: settings, class names, preprocessing, position, data.

    Args:
        numbers: of the training, as the state gives them.
    """
    return {
        "config": plan.config.model_dump(mode="json"),
        "classes": list(plan.dataset.classes),
        "preprocessing": plan.preprocessing.to_json(),
        "epoch": epoch,
        "best": best,
        "data": {"val": plan.dataset.val_name, "fingerprint": plan.dataset.fingerprint},
        "model_source": plan.built.source,
        "training": numbers,
    }


def headline(plan: Plan) -> str:
    """What is about to be trained, in a line."""
    model, clock = plan.config.model, plan.state.clock
    norm = " ".join(filter(None, (model.norm or "its own norms", plan.built.conversion)))
    if model.weight_norm:
        norm += f" and {model.weight_norm} weights"
    world = plan.state.group.world
    ranks = f", {world} processes" if world > 1 else ""
    compiled = (
        ", compiled (its first step takes long)" if plan.config.train.compile or plan.config.train.cuda_graphs else ""
    )
    return (
        f"{short_name(model.name)} with {norm} on {plan.config.data.name}, {len(plan.dataset.train)} training and "
        f"{len(plan.dataset.val)} {plan.dataset.val_name} images, epochs: {clock.epochs}, "
        f"steps per epoch: {clock.steps_per_epoch}, {plan.config.train.precision} on {device_name(plan.state.device)}"
        f"{ranks}{compiled}"
    )


def short_name(name: str) -> str:
    """A name fit for a folder: a file's stem, a folder's own name behind its source."""
    if name.endswith(".py"):
        return Path(name).stem
    source, colon, rest = name.partition(":")
    return f"{source}-{Path(rest).name}" if colon else source
