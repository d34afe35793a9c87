"""Normalise the weights of a built network, and take that back."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from norm_matters.norms.selection import Patterns, Report, Row, is_selected, refuse_wrapped
from norm_matters.weights.base import WeightNorm
from norm_matters.weights.build import ResolvedWeightNorm, resolve_weight_norm
from norm_matters.weights.layers import WEIGHTED, channel_layout, last_layer


def bound_weights(
    model: nn.Module,
    p: float | str = 2,
    include: Patterns = None,
    exclude: Patterns = None,
    *,
    learn_g: bool = False,
) -> Report:
    """Bound the weights of a network in place, as in Hoffer et al. 2018: `normalise_weights` with `bounded`.

    Args:
        model, include, exclude: as in `normalise_weights`.
        p: 1, 2 or inf.
        learn_g: the variant of the code released with the paper.
    """
    text = p if isinstance(p, str) else f"{p:g}"
    return normalise_weights(model, f"bounded:p={text},learn_g={str(learn_g).lower()}", include, exclude)


def normalise_weights(model: nn.Module, spec: str, include: Patterns = None, exclude: Patterns = None) -> Report:
    """Normalise the weights of the convolutions and linear layers of a network, in place.

    The last layer stays plain unless `include` asks for it. The parameters stay the same objects, on their device and
    in their dtype; a layer used in several places is wrapped once. On an error the model is unchanged.

    Args:
        spec: e.g. `bounded:p=1`.
        include: glob patterns of dotted names (`layer1.*`): only matching layers, the last one among them.
        exclude: glob patterns of layers to leave plain.

    Returns:
        The report; `print` shows a table.

    Raises:
        ValueError: nothing was left to normalise; a layer's weight is normalised already, shared with something that
            is not to be normalised alike, or cannot be (no values yet, all zero); the model is wrapped or compiled.
        UserError: the spec is wrong.
    """
    resolved = resolve_weight_norm(spec)
    refuse_wrapped(model, "change the weights")
    layers = _chosen(model, include, exclude)
    if not layers:
        raise ValueError(f"no weight was normalised to '{resolved.spec}': " + _why_nothing(model))
    for name, layer in layers.items():
        _refuse_unsuitable(name, layer)
    _refuse_shared(model, layers)
    new = _create_all(layers, resolved)
    rows = [Row(name, type(layer).__name__, resolved.spec) for name, layer in layers.items()]
    for name, layer in layers.items():
        parametrize.register_parametrization(layer, "weight", new[name])
    last = last_layer(model)
    if last is None or last in layers:
        return Report(rows, [])
    kind = type(model.get_submodule(last)).__name__
    return Report(rows, [Row(last, kind, kind, "the last layer: stays plain unless it is included")])


def remove_weight_norm(model: nn.Module) -> Report:
    """Make the effective weights plain parameters again, in place; outputs stay the same bit by bit.

    Returns:
        The report; `print` shows a table.

    Raises:
        ValueError: no weight is normalised; one has another parametrization on top; the model is wrapped or compiled.
    """
    refuse_wrapped(model, "change the weights")
    found = weight_norms_of(model)
    if not found:
        raise ValueError("no weight of the model is normalised")
    layers: dict[str, Any] = {name: model.get_submodule(name) for name in found}
    for name, layer in layers.items():
        if len(_parametrizations(layer)) > 1:
            raise ValueError(
                f"layer '{name}' has another parametrization on top of {found[name].spec}; remove it first"
            )
    effective = {name: layer.weight.detach() for name, layer in layers.items()}
    rows = []
    for name, layer in layers.items():
        # A deep copy shares its class with the layer it was copied from, and torch's removal changes the class.
        kind = type(layer)
        layer.__class__ = type(kind.__name__, kind.__bases__, dict(vars(kind)))
        parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
        with torch.no_grad():
            layer.get_parameter("weight").copy_(effective[name])
        # Back in front of the bias: optimizer states go by the order of the parameters.
        for key in [key for key in layer._parameters if key != "weight"]:
            layer._parameters[key] = layer._parameters.pop(key)
        rows.append(Row(name, found[name].spec, type(layer).__name__))
    return Report(rows, [])


def weight_norms_of(model: nn.Module) -> dict[str, WeightNorm]:
    """Dotted name of every layer whose weight is normalised, and how; each layer once, in the model's order."""
    found = {}
    for name, module in model.named_modules():
        for parametrization in _parametrizations(module):
            if isinstance(parametrization, WeightNorm):
                found[name] = parametrization
    return found


def initialise_weight(layer: Any, function: Callable[..., Any], **options: Any) -> None:
    """Initialise the weight of a layer, normalised or plain.

    `nn.init.kaiming_normal_(layer.weight)` on a normalised weight is lost: what it writes to is made anew for every
    use. This draws into a plain tensor and assigns that, so that the norm starts anew from it (rho and g included).

    Args:
        function: one of `nn.init`, or any that fills a tensor in place.
        options: further arguments of it.
    """
    with torch.no_grad():
        fresh = layer.weight.detach().clone()
        function(fresh, **options)
        if parametrize.is_parametrized(layer, "weight"):
            layer.weight = fresh
        else:
            layer.get_parameter("weight").copy_(fresh)


def _parametrizations(layer: nn.Module) -> list[nn.Module]:
    if not parametrize.is_parametrized(layer, "weight"):
        return []
    return list(layer.parametrizations["weight"])  # type: ignore[index]


def _chosen(model: nn.Module, include: Patterns, exclude: Patterns) -> dict[str, nn.Module]:
    """The layers to be normalised by their first names."""
    found: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, WEIGHTED):
            found.setdefault(module, []).append(name)
    last = last_layer(model) if include is None else None
    return {
        names[0]: layer for layer, names in found.items() if last not in names and is_selected(names, include, exclude)
    }


def _why_nothing(model: nn.Module) -> str:
    names = [name for name, module in model.named_modules() if isinstance(module, WEIGHTED)]
    if not names:
        return "the model has no convolution and no linear layer"
    if names == [last_layer(model)]:
        return f"the only layer with a weight, '{names[0]}', is the last one; include it by its name"
    return f"include and exclude leave none of {', '.join(names[:5])}{' ...' if len(names) > 5 else ''}"


def _refuse_unsuitable(name: str, layer: nn.Module) -> None:
    if parametrize.is_parametrized(layer, "weight"):
        kinds = [p.spec if isinstance(p, WeightNorm) else type(p).__name__ for p in _parametrizations(layer)]
        raise ValueError(f"layer '{name}': its weight is parametrized already, by {', '.join(kinds)}")
    weight = layer._parameters.get("weight")
    if weight is None:
        raise ValueError(f"layer '{name}': its weight is no parameter; is it normalised by other means?")
    if isinstance(weight, nn.parameter.UninitializedParameter):
        raise ValueError(f"layer '{name}': its weight has no shape yet; run the model once before")
    if not weight.is_floating_point():
        raise ValueError(f"layer '{name}': its weight is {weight.dtype}, not real numbers")


def _refuse_shared(model: nn.Module, layers: dict[str, nn.Module]) -> None:
    """Raise ValueError where a weight also serves a layer that would go on using it plain, or in another layout."""
    layouts = {id(layer.get_parameter("weight")): channel_layout(layer) for layer in layers.values()}
    for name, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            alike = name in layers and key == "weight" and channel_layout(module) == layouts.get(id(parameter))
            if id(parameter) in layouts and not alike:
                other = f"{name}.{key}" if name else key
                raise ValueError(f"'{other}' is also the weight of a layer to be normalised; exclude or include both")


def _create_all(layers: dict[str, nn.Module], resolved: ResolvedWeightNorm) -> dict[str, WeightNorm]:
    """A weight norm for each layer, one for all layers that share a weight; each is tried on its weight."""
    made: dict[int, WeightNorm] = {}
    for name, layer in layers.items():
        weight = layer.get_parameter("weight")
        if id(weight) not in made:
            made[id(weight)] = resolved.create(layer)
            try:
                made[id(weight)].right_inverse(weight.detach())
            except ValueError as error:
                raise ValueError(f"layer '{name}': {error}") from error
    return {name: made[id(layer.get_parameter("weight"))] for name, layer in layers.items()}
