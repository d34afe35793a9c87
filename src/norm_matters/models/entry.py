"""What the register knows of a network of ours, and what every one of them has."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from torch import nn

from norm_matters.core.errors import UserError, nearest

Width = Annotated[int, Field(ge=1, le=4096)]
"""Channels of the first stage; the others are multiples of it."""

DropRate = Annotated[float, Field(ge=0, lt=1)]
"""Share of the values that dropout sets to zero."""

_COMMON = ("num_classes", "in_channels", "norm")


def read_options(build: Callable[..., nn.Module], options: Mapping[str, Any]) -> dict[str, Any]:
    """Check options against the signature of the function that takes them.

    Args:
        build: keyword-only parameters; those besides num_classes, in_channels and norm are the options, and
            their annotations say which values are valid.

    Returns:
        The options, as `build` takes them.

    Raises:
        UserError: unknown options and wrong values, all at once.
    """
    parameters = inspect.signature(build).parameters
    known = [name for name in parameters if name not in _COMMON]
    values: dict[str, Any] = {}
    problems: list[str] = []
    for name, value in options.items():
        if name not in known:
            hint = nearest(name, known) or f"; there are: {', '.join(known)}"
            problems.append(f"model.options.{name}: unknown option{hint}")
            continue
        try:
            values[name] = TypeAdapter(parameters[name].annotation, config=ConfigDict(strict=True)).validate_python(
                value
            )
        except ValidationError as error:
            reason = error.errors()[0]["msg"]
            problems.append(f"model.options.{name}: value '{value}' is not valid: {reason[0].lower()}{reason[1:]}")
    if problems:
        raise UserError(*problems)
    return values


@dataclass(frozen=True)
class ModelEntry:
    """A network that can be asked for by name.

    Attributes:
        build: called with the keywords num_classes, in_channels, norm (channels -> norm layer) and options.
        regime: name of the regime it is trained with unless another is asked for.
        published: torchvision's name of the same network, whose weights fit; None where there is none.
    """

    build: "Callable[..., Network]"
    regime: str
    published: str | None = None


class Network(nn.Module):
    """Base of the networks of ours: images (N, C, H, W) to scores (N, classes).

    Attributes:
        min_input_size: side in pixels of the smallest square image that leaves a value to every layer.
    """

    min_input_size: int
