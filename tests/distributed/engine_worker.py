"""One rank of the tests of the engine: trains each case, evaluates, and writes what came out.

Usage: python engine_worker.py FOLDER, with RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT in the environment. Reads
FOLDER/cases.json, writes FOLDER/rank-RANK.safetensors and FOLDER/rank-RANK.json. The tests import `trained` and
`evaluated` too, for what one process does.
"""

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from norm_matters.core.clock import Clock
from norm_matters.core.config import RegimeConfig
from norm_matters.core.distributed import Group
from norm_matters.core.errors import NumericalError
from norm_matters.core.joining import joined
from norm_matters.core.shares import share
from norm_matters.datasets import Loader, ResidentImages
from norm_matters.engine.evaluate import evaluate
from norm_matters.engine.metrics import Meter
from norm_matters.engine.precision import PRECISIONS
from norm_matters.engine.state import TrainingState
from norm_matters.engine.step import StepOptions, train_step
from norm_matters.norms import create_norm, sync_norm
from norm_matters.regimes import build_regime
from norm_matters.transforms.preprocessing import Preprocessing

CPU = torch.device("cpu")
PREPROCESSING = Preprocessing(3, 8, (0.5,) * 3, (0.2,) * 3, "pad", 2, True, 8)
SGD = {"optimizer": "SGD", "lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3}
CLASSES = 7


def network(spec: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """Two convolutions, each with a norm, and a classifier; the same weights at every call."""
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        create_norm(spec, 8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2, bias=False),
        create_norm(spec, 8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, CLASSES),
    )
    return module.to(dtype)


def images_of_step(step: int, images: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The whole batch of a step: (N, 3, 8, 8) and labels (N,), which can be learnt."""
    draw = torch.Generator().manual_seed(step)
    labels = torch.randint(CLASSES, (images,), generator=draw)
    noise = torch.randn(images, 3, 8, 8, generator=draw, dtype=torch.float64)
    return (noise + labels[:, None, None, None] / 3).to(dtype), labels


def state_of(case: dict[str, Any], group: Group) -> TrainingState:
    """A training of the case's network; `case` may leave out all but the norm."""
    dtype = getattr(torch, case.get("dtype", "float32"))
    module = network(case["norm"], dtype)
    if case.get("sync"):
        sync_norm(module)
    phases = [{"epoch": 0, **case.get("settings", SGD)}]
    state = TrainingState(
        module,
        build_regime(RegimeConfig(phases=phases), default="constant"),
        Clock(0, 100, 1, case.get("images", 12)),
        device=CPU,
        precision=case.get("precision", "fp32"),
        deferred=case.get("deferred", False),
    )
    state.join(group, seed=0, shard_optimizer=case.get("shard", False))
    return state


def trained(case: dict[str, Any], group: Group) -> dict[str, Tensor]:
    """Weights, buffers, optimizer state and the loss's sum after the case's steps."""
    state = state_of(case, group)
    options = StepOptions(
        accumulate=case.get("accumulate", 1),
        clip_norm=case.get("clip"),
        nonfinite=case.get("nonfinite", "stop"),
        save_memory=case.get("save_memory", False),
    )
    meter = Meter(CPU)
    state.module.train()
    if options.nonfinite == "rollback":
        state.remember()
    for step in range(case.get("steps", 1)):
        images, labels = images_of_step(step, state.clock.batch_size, getattr(torch, case.get("dtype", "float32")))
        if step in case.get("poisoned", []):
            images[case.get("poisoned_image", 0)] = float("nan")
        own = share(np.arange(len(images)), options.accumulate, rank=group.rank, world=group.world)
        train_step(state, images[own], labels[own], options=options, meter=meter)
    state.settle()
    scores = meter.scores(group)
    found = dict(state.model_tensors())
    if not case.get("sync"):
        state.share_statistics()
    training = state.training_tensors()
    state.numbers()
    found |= {name: tensor for name, tensor in training.items() if name.startswith("optimizer/")}
    found["scores"] = torch.tensor([scores.loss, scores.error1, scores.images], dtype=torch.float64)
    found["skipped"] = torch.tensor(state.skipped_steps)
    return {name: tensor.detach().clone().contiguous() for name, tensor in found.items()}


def evaluated(group: Group, images: int = 1007, batch_size: int = 13) -> list[float | None]:
    """Scores of a network on that many images, taken in turns."""
    draw = torch.Generator().manual_seed(3)
    pixels = torch.randint(256, (images, 3, 8, 8), dtype=torch.uint8, generator=draw)
    data = ResidentImages(pixels, np.arange(images) % CLASSES, title="made up")
    loader = Loader(data, PREPROCESSING, batch_size=batch_size, train=False, seed=0, rank=group.rank, world=group.world)
    # In float64, where the order of a sum shows: those of a few float32 numbers are exact.
    module = network("l2", torch.float64).train()
    module(images_of_step(0, 32, torch.float64)[0])
    found = evaluate(
        module,
        loader.epoch(0),
        device=CPU,
        precision=PRECISIONS["fp32"],
        input_dtype=torch.float64,
        group=group,
    )
    return list(found)


def exchanges_of_a_step(group: Group, accumulate: int) -> int:
    """How many buckets of gradients one step sends."""
    state = state_of({"norm": "l2"}, group)
    count = Counter[str]()
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    def counted(_, bucket):  # no annotations: torch reads them
        count["buckets"] += 1
        return allreduce_hook(None, bucket)

    state.forward.register_comm_hook(None, counted)
    images, labels = images_of_step(0, 12, torch.float32)
    own = share(np.arange(12), accumulate, rank=group.rank, world=group.world)
    options = StepOptions(accumulate=accumulate)
    train_step(state, images[own], labels[own], options=options, meter=Meter(CPU))
    return count["buckets"]


def failure(group: Group) -> dict[str, Any]:
    """What each rank raises when one rank's images alone are not finite."""
    try:
        trained({"norm": "l1", "sync": True, "steps": 3, "poisoned": [2], "poisoned_image": 11}, group)
    except NumericalError as error:
        return {"raised": str(error)}
    return {"raised": None}


def agreements(group: Group) -> dict[str, Any]:
    """What `Group` gives each rank."""
    found: dict[str, Any] = {"gathered": group.gather([group.rank, 0.1 * group.rank, None])}
    found["alone"] = group.alone(lambda: {"from": group.rank})
    found["sums"] = group.sums([0.1, 1e-17 * (group.rank + 1)])
    found["largest"] = group.largest(-group.rank)
    flags = [torch.tensor(True), torch.tensor(group.rank != 1)]
    found["flags"] = [bool(group.all_true(flag)) for flag in flags]
    mixed = [torch.full((2, 3), group.rank), torch.tensor(group.rank == 0), torch.full((), 0.5 + group.rank)]
    group.copy_from(1, mixed)
    found["copied"] = [tensor.tolist() for tensor in mixed]
    sent = group.tensors_of_first({"x": torch.arange(3)} if group.first else {})
    found["sent"] = sent["x"].tolist()
    parts = group.gather_tensors({"x": torch.full((group.rank + 1,), group.rank)})
    found["parts"] = [part["x"].tolist() for part in parts]

    def fails_on_last() -> int:
        if group.rank == group.world - 1:
            raise ValueError("out of order")
        return group.rank

    for name, action in (("together", group.together), ("alone_failed", group.alone)):
        try:
            found[name] = action(fails_on_last)
        except Exception as error:
            found[name] = [type(error).__name__, str(error), getattr(error, "rank", None)]
    return found


def main(folder: Path) -> None:
    cases = json.loads((folder / "cases.json").read_text())
    with joined(timeout=60) as group:
        tensors = {
            f"{number}/{name}": tensor
            for number, case in enumerate(cases["train"])
            for name, tensor in trained(case, group).items()
        }
        facts = {
            "evaluated": [evaluated(group, *sizes) for sizes in cases.get("evaluate", [])],
            "exchanges": [exchanges_of_a_step(group, chunks) for chunks in cases.get("accumulate", [])],
            "failure": failure(group) if cases.get("failure") else None,
            "agreements": agreements(group) if cases.get("agreements") else None,
        }
    save_file(tensors, folder / f"rank-{group.rank}.safetensors")
    (folder / f"rank-{group.rank}.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
