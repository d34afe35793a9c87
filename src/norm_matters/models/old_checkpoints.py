"""Import of checkpoints of the paper's code and of its successor, convNet.pytorch, for networks of the same layers.

Their residual networks and the VGG of the weight decay experiments have our layers under the same names, or nearly.
What is different in them, the norms and the normalised weights, is converted (`old_layers`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from norm_matters.core.config import ModelConfig
from norm_matters.core.errors import UserError
from norm_matters.models.build import build_model
from norm_matters.models.old_files import LARGEST, OldFile, read_old_file
from norm_matters.models.old_layers import VARIANCE, ConvertedNorms, RunningVar, convert_norms, plain_weights, some_of

# The wrapper of DataParallel, DistributedDataParallel and the successor's activation checkpointing.
_WRAPPER = "module"
_HEAD_OF_DECAY_EXPERIMENTS = "lastlayer_classifier"


@dataclass(frozen=True)
class ImportedCheckpoint:
    """The weights of an old checkpoint for a network of ours, and what was done to them.

    Attributes:
        tensors: the whole state of the network, by our names, on the CPU.
        file: what the old file said.
        num_classes: number of scores of the network.
        renamed: old name -> our name.
        computed: weights computed from normalised ones.
        norms: what became of the norms.
        passed_over: old name -> why it is of no use; anything else without a place is an error.
    """

    tensors: dict[str, Tensor]
    file: OldFile
    num_classes: int
    renamed: dict[str, str]
    computed: list[str]
    norms: ConvertedNorms
    passed_over: dict[str, str]

    def lines(self) -> list[str]:
        """The report, for the eye."""
        file, norms = self.file, self.norms
        epoch = "epoch unknown" if file.epoch is None else f"epoch {file.epoch}"
        best = "best accuracy unknown" if file.best_accuracy is None else f"best accuracy {file.best_accuracy:.2f}%"
        known = [epoch, best, *(text for text in (file.model, file.config) if text)]
        lines = [f"file: {', '.join(known)}", f"tensors: {len(file.tensors)} read, {len(self.tensors)} given"]
        if self.renamed:
            lines.append(f"renamed: {len(self.renamed)} ({_some_pairs(self.renamed)})")
        if self.computed:
            lines.append(f"weights computed from normalised ones: {len(self.computed)} ({some_of(self.computed)})")
        lines += [f"norms: {count} kept {kind}" for kind, count in norms.kinds.items()]
        lines += [f"passed over: {name}: {why}" for name, why in self.passed_over.items()]
        if norms.rescaled:
            lines.append(
                f"weights of {sum(norms.rescaled.values())} channels with sigma below the square root of eps took a "
                f"factor, so that outputs stay ({some_of(list(norms.rescaled))}); a norm with eps=1e-10 needs none"
            )
        if norms.kinds.keys() - {VARIANCE}:
            lines.append(
                "hint: the old momentum 0.1 was the weight of the past: statistics are nine tenths the last batch's; "
                "calibrate them, or expect evaluation to be noisy"
            )
        return lines


def import_checkpoint(
    path: Path,
    *,
    model: str,
    norm: str | None = None,
    num_classes: int | None = None,
    running_var: RunningVar | None = None,
    weight_p: float = 2.0,
    limit: int = LARGEST,
    options: Mapping[str, Any] | None = None,
) -> ImportedCheckpoint:
    """Read a checkpoint of the paper's code or its successor as the state of a network of ours.

    In evaluation the network gives the old outputs (to float32 rounding). Nothing in the file is run, and nothing
    of its state is dropped without being told in the result.

    Args:
        path: the old file: a checkpoint, or a bare state dict, of `torch.save`.
        model: name of our network with the same layers, e.g. `resnet50`, `resnet56`, `vgg11`; or `FILE.py`.
        norm: spec of the norm the old network had; the file does not say it. None is `l2`.
        num_classes: scores per image; None takes those of the file.
        running_var: see `convert_norms`.
        weight_p: see `plain_weights`.
        limit: bytes of the largest file to read.
        options: of the network, e.g. `{"width": 32}`.

    Raises:
        UserError: the file cannot be read without running code, or its state is not that of the network; names
            what is missing, unknown or of another shape.
    """
    file = read_old_file(path, limit=limit)
    named = _our_names(file.tensors)
    plain, computed = plain_weights({new: file.tensors[old] for old, new in named.items()}, p=weight_p)
    num_classes = num_classes or _count_classes(plain)
    with torch.random.fork_rng(devices=[]):  # the initial weights drawn here are thrown away
        config = ModelConfig(name=model, norm=norm, options=dict(options or {}))
        channels = _count_channels(plain)
        network = build_model(config, num_classes=num_classes, in_channels=channels, input_size=None).module
    if f"{_HEAD_OF_DECAY_EXPERIMENTS}.weight" in {name.removeprefix(f"{_WRAPPER}.") for name in file.tensors}:
        running_var = running_var or "variance"  # these had plain batch norms only
    norms = convert_norms(plain, network, running_var=running_var)
    tensors, unused = _fit(norms.tensors, network)
    renamed = {old: new for old, new in named.items() if old != new}
    back = {new: old for old, new in named.items()}
    renamed |= {back[ours]: new for ours, new in norms.renamed.items()}
    passed_over = {back[name]: why for name, why in (norms.passed_over | unused).items()}
    return ImportedCheckpoint(tensors, file, num_classes, renamed, computed, norms, passed_over)


def _our_names(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Old name -> our name, but for what the norms rename."""
    named: dict[str, str] = {}
    taken: set[str] = set()
    for old in tensors:
        parts = [part for part in old.split(".") if part != _WRAPPER]
        if parts[:1] == [_HEAD_OF_DECAY_EXPERIMENTS]:
            parts[0] = "classifier"
        new = ".".join(parts)
        if new in taken:
            raise UserError(f"'{old}' is there twice, with and without '{_WRAPPER}'")
        taken.add(new)
        named[old] = new
    return named


def _count_classes(tensors: Mapping[str, Tensor]) -> int:
    """Rows of the last linear layer: the files keep the order in which networks were built."""
    heads = [tensor for name, tensor in tensors.items() if name.endswith("weight") and tensor.dim() == 2]
    if not heads:
        raise UserError("the file has no linear layer that shows the number of classes; say it with --num-classes")
    return len(heads[-1])


def _count_channels(tensors: Mapping[str, Tensor]) -> int:
    """Channels of the images: the inputs of the first convolution, three where there is none."""
    return next((t.shape[1] for name, t in tensors.items() if name.endswith("weight") and t.dim() == 4), 3)


def _fit(tensors: Mapping[str, Tensor], network: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors as the state of the network, in its order and dtypes, and what of them is known to be of no use."""
    own = network.state_dict()
    unused: dict[str, str] = {}
    scale = tensors.get("scale")
    if scale is not None and scale.shape == (1,) and "scale" not in own:
        unused["scale"] = "the old network had it and never used it"
    missing = [name for name in own if name not in tensors]
    unknown = [name for name in tensors if name not in own and name not in unused]
    common = [name for name in own if name in tensors]
    wrong = [name for name in common if own[name].shape != tensors[name].shape]
    infinite = [name for name in common if not torch.isfinite(tensors[name]).all()]
    problems = []
    if missing:
        problems.append(f"the file lacks {some_of(missing)}")
    if unknown:
        problems.append(f"the network has no {some_of(unknown)}")
    for name in wrong[:3]:
        problems.append(f"{name} is {tuple(tensors[name].shape)} in the file, {tuple(own[name].shape)} in the network")
    if infinite:
        problems.append(f"not finite: {some_of(infinite)}")
    if problems:
        raise UserError(*(f"the file does not fit the network: {problem}" for problem in problems))
    return {
        name: tensors[name].to(own[name].dtype).clone(memory_format=torch.contiguous_format) for name in own
    }, unused


def _some_pairs(renamed: Mapping[str, str]) -> str:
    return some_of([f"{old} to {new}" for old, new in renamed.items()])
