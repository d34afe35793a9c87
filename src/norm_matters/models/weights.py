"""Initial weights from files, with the head replaced where the number of classes differs.

Only safetensors files are read from the user, and only torchvision's own downloads from its cache: reading
weights runs no code and fetches nothing.
"""

import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from norm_matters.core.errors import UserError
from norm_matters.core.reading import read_regular
from norm_matters.models.old_files import load_plain
from norm_matters.norms import is_norm
from norm_matters.record.tensors import most_bytes, unpack_tensors

_AUXILIARY = ("AuxLogits.", "aux1.", "aux2.")


def read_weights(path: Path) -> dict[str, Tensor]:
    """Tensors of a safetensors file by name; UserError where it is none."""
    if path.suffix != ".safetensors":
        raise UserError(f"model.pretrained: '{path}' is no .safetensors file; others can run code when they are read")
    if not path.is_file():
        raise UserError(f"model.pretrained: there is no file '{path}'")
    try:
        return unpack_tensors(read_regular(path, limit=most_bytes()))
    except (ValueError, OSError) as error:
        raise UserError(f"model.pretrained: '{path}' cannot be read: {error}") from error


def describe_file(path: Path) -> dict[str, str]:
    """Path and SHA-256, for the record."""
    with path.open("rb") as file:
        return {"path": str(path.absolute()), "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def cached_torchvision_file(name: str) -> Path:
    """Where torchvision keeps the published weights of its network of that name.

    Raises:
        UserError: they were not downloaded yet (with the address), or none are published.
    """
    from norm_matters.core.torchvision import torchvision

    try:
        published = torchvision.models.get_model_weights(name)
        url = getattr(published, "DEFAULT").url  # noqa: B009  (not every network's enumeration has it)
    except (AttributeError, ValueError) as error:
        raise UserError(f"model.pretrained: torchvision publishes no weights for '{name}'; name a file") from error
    path = Path(torch.hub.get_dir()) / "checkpoints" / url.rsplit("/", 1)[1]
    if not path.is_file():
        raise UserError(f"model.pretrained: the weights are not in torchvision's cache; download {url} to {path}")
    return path


def read_torchvision_file(path: Path) -> dict[str, Tensor]:
    """Tensors of a file from torchvision's cache, under the names its networks use today.

    Raises:
        UserError: the start of the SHA-256 in the file's name does not fit the contents, or they are unreadable.
    """
    expected = path.stem.rpartition("-")[2]
    if not describe_file(path)["sha256"].startswith(expected):
        raise UserError(f"model.pretrained: '{path}' is damaged (its SHA-256 does not start with {expected})")
    try:
        state = load_plain(path)
    except UserError as error:
        raise UserError(*(f"model.pretrained: {problem}" for problem in error.problems)) from error
    # densenet's files are older than its module names; the auxiliary heads are not built
    renamed = {re.sub(r"(denselayer\d+\.(?:norm|conv))\.([12])\.", r"\1\2.", name): t for name, t in state.items()}
    return {name: tensor for name, tensor in renamed.items() if not name.startswith(_AUXILIARY)}


def cached_timm_file(network: nn.Module) -> Path:
    """Where the Hugging Face cache keeps timm's published weights of this network.

    Raises:
        UserError: they were not downloaded yet (with the command that does), or none are published.
    """
    import huggingface_hub

    published: Mapping[str, Any] = getattr(network, "pretrained_cfg", None) or {}
    repository = published.get("hf_hub_id")
    if not repository:
        raise UserError("model.pretrained: timm publishes no weights for this network; name a file")
    # the argument is given because its default is fixed when huggingface_hub is imported
    cache = os.environ.get("HF_HUB_CACHE", huggingface_hub.constants.HF_HUB_CACHE)
    found = huggingface_hub.try_to_load_from_cache(repository, "model.safetensors", cache_dir=cache)
    if not isinstance(found, str):
        command = f"hf download {repository} model.safetensors"
        raise UserError(f"model.pretrained: the weights are not in the cache; fetch them with: {command}")
    return Path(found)


def load_weights(network: nn.Module, tensors: Mapping[str, Tensor], *, num_classes: int) -> list[str]:
    """Copy tensors into a network in place.

    A parameter whose first dimension is the number of classes, and in which nothing else differs, is the head's:
    it keeps its fresh values. Statistics that the network's norm has no use for are passed over, and a missing
    count of batches stays 0.

    Returns:
        The names of the parameters that kept their fresh values.

    Raises:
        UserError: anything else is missing, left over or of another shape.
    """
    own = network.state_dict()
    norms = tuple(f"{name}." for name, module in network.named_modules() if is_norm(module))
    surplus = [name for name in tensors if name not in own and not name.startswith(norms)]
    missing = [name for name in own if name not in tensors and not name.endswith("num_batches_tracked")]
    replaced, wrong = [], []
    for name in own.keys() & tensors.keys():
        ours, theirs = own[name].shape, tensors[name].shape
        if ours != theirs:
            is_head = ours[:1] == (num_classes,) and ours[1:] == theirs[1:]
            (replaced if is_head else wrong).append(name)
    problems = [
        f"{kind} {_some(names)}"
        for kind, names in (("no", missing), ("unknown", surplus), ("of another shape:", wrong))
        if names
    ]
    if problems:
        raise UserError(f"model.pretrained: the weights do not fit the network: {'; '.join(problems)}")
    kept = {name: tensor for name, tensor in tensors.items() if name in own and name not in replaced}
    network.load_state_dict(kept, strict=False)
    return sorted(replaced)


def _some(names: list[str]) -> str:
    """The first three names, and how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(sorted(names)[:3]) + more
