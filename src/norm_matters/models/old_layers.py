"""Norms and weight norms as the paper's code and its successor stored them, turned into our norms and plain weights.

What the old layers keep, and compute in evaluation (read from eladhoffer/norm_matters and eladhoffer/convNet.pytorch):

- Lp, L1, Top(k) and smoothed Top(k): `(x - running_mean) * running_var * scale + mean` in the paper's code; in the
  successor the last two are named `weight` and `bias`. `running_var` is the inverse of sigma, with constant and eps.
- L1 of the paper's resnet: `(x - running_mean) / running_scale * weight + bias`.
- Mean-only: `x - running_mean + bias`.
- Plain batch norm: as today, but without `num_batches_tracked` before torch 0.4.1.

The old eps is in units of variance for Lp with p = 2, of sigma for the others, and absent from the resnet's L1. None of
that matters here: the estimate that gives the same outputs in our norm is `sigma^2 - eps` with the eps of our norm.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from norm_matters.core.errors import UserError
from norm_matters.norms import is_norm

RunningVar = Literal["inverse", "variance"]
"""What a `running_var` holds: the inverse of sigma, or sigma squared."""

VARIANCE = "the variance"
_MEAN_ONLY = "the mean only"
_AFFINE = {"scale": "weight", "mean": "bias"}
_SMOOTHED = "meanTOPK"
_BOUNDS = ("_g_prenorm", "_v_prenorm", "_init_norm")


class _MisfitError(Exception):
    """An old norm that cannot be converted; the message says why, without its name."""


@dataclass
class ConvertedNorms:
    """The state with its norms converted, and what that took.

    Attributes:
        tensors: all tensors of the state; those of its norms under our names.
        kinds: what the norms kept -> how many did.
        renamed: old name -> our name.
        rescaled: norm -> its channels whose weight took over what an estimate of sigma below our eps cannot say.
        passed_over: old name -> why it is of no use.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    kinds: Counter[str] = field(default_factory=Counter)
    renamed: dict[str, str] = field(default_factory=dict)
    rescaled: dict[str, int] = field(default_factory=dict)
    passed_over: dict[str, str] = field(default_factory=dict)


def plain_weights(tensors: Mapping[str, Tensor], *, p: float = 2.0) -> tuple[dict[str, Tensor], list[str]]:
    """Compute the weights of layers whose weight was normalised, as the old network did before each use.

    With w the weight's name, v = `w_v`, g = `w_g`, and norms taken over the dimensions along which g does not vary:

    - `w_g` and `w_v`, torch's weight norm: `g v / |v|`;
    - with `w_g_prenorm`, bounded with a learned g: `w_g_prenorm g / |g| * v / |v|_p`;
    - `w_v` with `w_v_prenorm` or `w_init_norm`, bounded: that number times `v / |v|`, per output channel.

    Args:
        tensors: an old state.
        p: the norm in the second case, 2 in the released networks; the files do not say it.

    Returns:
        The state with weights in place of their parts, and the names of these weights.

    Raises:
        UserError: a part has a shape that does not fit.
    """
    plain: dict[str, Tensor] = {}
    parts: set[str] = set()
    computed: list[str] = []
    for name, tensor in tensors.items():
        weight = name.removesuffix("_v")
        beside = [weight + suffix for suffix in ("_g", *_BOUNDS) if weight + suffix in tensors]
        if name == weight or not beside:
            plain[name] = tensor
            continue
        plain[weight] = _weight(weight, tensors, p)
        computed.append(weight)
        parts.update(beside)
    return {name: tensor for name, tensor in plain.items() if name not in parts}, computed


def convert_norms(
    tensors: Mapping[str, Tensor], network: nn.Module, *, running_var: RunningVar | None = None
) -> ConvertedNorms:
    """Give the norms of an old state our names and meaning; evaluation gives what it gave.

    Args:
        tensors: an old state, with the names of the network's layers.
        network: ours, with the norms that are to take the state over. Not changed.
        running_var: what it holds in layers that do not show it: those with `weight` and `bias` and without
            `num_batches_tracked` may be of the successor, or plain batch norms before torch 0.4.1.

    Raises:
        UserError: that is needed and not given; or statistics are not those of a trained network, or of a kind
            that the network's norm has no place for. Names the layers.
    """
    layers: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        layer, _, part = name.rpartition(".")
        layers.setdefault(layer, {})[part] = tensor
    norms = {name: module for name, module in network.named_modules() if is_norm(module)}
    done, misfits = ConvertedNorms(), dict[str, list[str]]()
    for layer, old in layers.items():
        norm = norms.get(layer)
        if norm is None or not {"running_mean"} <= norm.state_dict().keys() & old.keys():
            done.tensors |= _under(layer, old)  # what is wrong with it shows when all names are compared
            continue
        try:
            _convert_norm(layer, old, norm, running_var, done)
        except _MisfitError as misfit:
            misfits.setdefault(str(misfit), []).append(layer)
    if misfits:
        raise UserError(*(f"{some_of(names)}: {why}" for why, names in misfits.items()))
    return done


def some_of(names: list[str]) -> str:
    """The first three names, and how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _weight(name: str, tensors: Mapping[str, Tensor], p: float) -> Tensor:
    """The weight of that name from its parts, in float64."""
    v = tensors[f"{name}_v"].double()
    bound = next((tensors[name + suffix].double() for suffix in _BOUNDS if name + suffix in tensors), None)
    if bound is not None and bound.numel() != 1:
        raise UserError(f"{name}: its bound has the shape {tuple(bound.shape)}; it takes one number")
    if f"{name}_g" not in tensors:
        assert bound is not None
        return bound.reshape(()) * v / torch.linalg.vector_norm(v, dim=tuple(range(1, v.dim())), keepdim=True)
    g = tensors[f"{name}_g"].double()
    if g.numel() == 1:
        g = g.reshape((1,) * v.dim())
    if g.dim() != v.dim() or any(a not in (1, b) for a, b in zip(g.shape, v.shape, strict=True)):
        raise UserError(f"{name}_g: its shape {tuple(g.shape)} does not fit that of {name}_v, {tuple(v.shape)}")
    dims = tuple(dim for dim, size in enumerate(g.shape) if size == 1)
    if bound is None:
        return g * v / torch.linalg.vector_norm(v, dim=dims, keepdim=True)
    return bound.reshape(()) / g.norm() * g * v / torch.linalg.vector_norm(v, p, dim=dims, keepdim=True)


def _convert_norm(
    layer: str, old: dict[str, Tensor], norm: nn.Module, running_var: RunningVar | None, done: ConvertedNorms
) -> None:
    """Convert one norm and enter it into `done`; _MisfitError where that cannot be."""
    new = dict(old)
    if new.pop(_SMOOTHED, None) is not None:
        done.passed_over[f"{layer}.{_SMOOTHED}"] = "the smoothed mean of the old norm's largest, used in training only"
    for theirs, ours in _AFFINE.items():
        if theirs in old:
            new[ours] = new.pop(theirs)
            done.renamed[f"{layer}.{theirs}"] = f"{layer}.{ours}"
    kind, sigma = _stored_sigma(old, running_var)
    # Mean-only norms are asked by attribute: a norm of torch estimates sigma and has no such one.
    if getattr(norm, "estimates_sigma", True) != (kind != _MEAN_ONLY):
        raise _MisfitError(
            "the old norm only subtracts the mean; import it with the norm 'mean'"
            if kind == _MEAN_ONLY
            else "the old norm divides by sigma, and the norm asked for does not"
        )
    if kind == _MEAN_ONLY:
        new["running_var"] = torch.ones_like(old["running_mean"])
    if sigma is not None:
        new.pop("running_scale", None)
        new["running_var"], factor = _as_variance(sigma, float(getattr(norm, "eps", 0.0)))
        rescaled = int((factor != 1).sum())
        if rescaled:
            if "weight" not in new:
                raise _MisfitError("sigma is below the square root of our eps, and the norm has no weight; lower eps")
            new["weight"] = new["weight"].double() * factor
            done.rescaled[layer] = rescaled
    if "num_batches_tracked" in norm.state_dict():
        new.setdefault("num_batches_tracked", torch.zeros((), dtype=torch.long))
    done.kinds[kind] += 1
    done.tensors |= _under(layer, new)


def _stored_sigma(old: Mapping[str, Tensor], running_var: RunningVar | None) -> tuple[str, Tensor | None]:
    """What an old norm kept, in words, and the sigma (float64) in it; None where nothing needs to be converted."""
    if "running_scale" in old:
        kind, sigma = "sigma", old["running_scale"].double()
    elif "running_var" not in old:
        return _MEAN_ONLY, None
    else:
        if "num_batches_tracked" in old:
            running_var = "variance"
        elif _AFFINE.keys() & old.keys():
            running_var = "inverse"
        if running_var is None:
            raise _MisfitError(
                "running_var is the inverse of sigma in convNet.pytorch's own norms, and the variance in a plain batch "
                "norm before torch 0.4.1; the file does not show which, so say it: --running-var inverse or variance"
            )
        if running_var == "variance":
            return VARIANCE, None
        kind, sigma = "the inverse of sigma", 1 / old["running_var"].double()
    if not (torch.isfinite(sigma) & (sigma > 0)).all():
        raise _MisfitError(
            f"a {'running_scale' if kind == 'sigma' else 'running_var'} holds 0, a negative or no finite number, as "
            "before the first step of training or after it diverged"
        )
    return kind, sigma


def _as_variance(sigma: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The `running_var` with `sqrt(running_var + eps) = sigma`, and what is missing to that, as a factor per channel.

    The factor is 1 but where sigma^2 < eps: no variance gives so small a divisor, and 0 comes nearest.
    """
    square = sigma.square()
    factor = torch.where(square < eps, eps**0.5 / sigma, 1.0)
    return (square - eps).clamp(min=0), factor


def _under(layer: str, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{layer}.{part}" if layer else part: tensor for part, tensor in parts.items()}
