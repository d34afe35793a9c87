"""One rank of the test of synchronised norms: trains one step of each case on its part of the batch.

Usage: python sync_worker.py FOLDER RANK WORLD_SIZE. Reads FOLDER/cases.json and FOLDER/batch.safetensors, writes
FOLDER/rank-RANK.safetensors.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from norm_matters.norms import calibrate_norm, create_norm


def step(spec: str, x: torch.Tensor, g: torch.Tensor, seed: int = 0) -> dict[str, torch.Tensor]:
    """Outputs, gradients and buffers of a norm after one step on input x (N, C, *) with output gradient g."""
    torch.manual_seed(seed)
    norm = create_norm(spec, x.shape[1], dtype=x.dtype)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.copy_(torch.linspace(-1, 1.5, parameter.numel()))
    x = x.clone().requires_grad_()
    y = norm(x)
    y.backward(g)
    gradients = {f"{name}.grad": p.grad for name, p in norm.named_parameters() if p.grad is not None}
    assert x.grad is not None
    return {"y": y.detach(), "dx": x.grad, **gradients, **dict(norm.named_buffers())}


# The sizes of two batches, and of each rank's part of them.
CALIBRATION = ((6, (4, 2)), (2, (1, 1)))


def calibrated(spec: str, batches: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """The running statistics after calibration on the batches."""
    norm = create_norm(spec, batches[0].shape[1], dtype=batches[0].dtype)
    calibrate_norm(norm, batches)
    return dict(norm.named_buffers())


def main(folder: Path, rank: int, world_size: int) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    batch = load_file(folder / "batch.safetensors")
    found = {}
    for number, (spec, dtype, sizes) in enumerate(json.loads((folder / "cases.json").read_text())):
        parts = (batch[key].to(getattr(torch, dtype)).split(sizes)[rank] for key in ("x", "g"))
        found |= {f"{number}/{key}": value.contiguous() for key, value in step(spec, *parts, seed=rank).items()}
    whole = batch["x"].split([size for size, _ in CALIBRATION])
    parts = [images.split(sizes)[rank] for images, (_, sizes) in zip(whole, CALIBRATION, strict=True)]
    found |= {f"calibrated/{key}": value for key, value in calibrated("l2:sync=true", parts).items()}
    save_file(found, folder / f"rank-{rank}.safetensors")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
