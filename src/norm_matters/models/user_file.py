"""A user's own network: a Python file with `def model(**kwargs)`, as in the README of the original code.

    class Model(nn.Module):
        def __init__(self, num_classes=1000):
            super().__init__()
            self.model = nn.Sequential(...)
            self.regime = [{'epoch': 0, 'optimizer': 'SGD', 'lr': 1e-2}, {'epoch': 15, 'lr': 1e-3}]
            self.input_transform = {'train': transforms.Compose([...]), 'eval': transforms.Compose([...])}

        def forward(self, inputs):
            return self.model(inputs)

    def model(**kwargs):
        return Model()

`model` is called with num_classes, in_channels, the options of `model.options`, and norm when one was asked for;
of these a function without `**kwargs` gets those it names. `regime` and `input_transform` may be absent.
"""

import hashlib
import inspect
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from norm_matters.core.errors import UserError, nearest
from norm_matters.models.trust import check_trusted, read_code

_MODES = ("train", "eval")
_NOT_BUILT = ("criterion", "data_regime")


@dataclass(frozen=True)
class UserModel:
    """What a user's file gave.

    Attributes:
        module: the network.
        phases: its `regime`: a list of phases or a function, unchecked; None where it has none.
        input_transform: its `input_transform`: functions from a PIL image to a tensor for `train` and `eval`.
        source: path and SHA-256 of the file.
    """

    module: nn.Module
    phases: Any
    input_transform: dict[str, Callable[..., Any]] | None
    source: dict[str, str]


def describe_error(path: Path, error: BaseException) -> str:
    """One line: where in the user's file the error arose, its type and its text."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    line = error.lineno if isinstance(error, SyntaxError) and error.filename == str(path) else (lines or [None])[-1]
    text = str(error.msg if isinstance(error, SyntaxError) else error).strip() or "no message"
    return f"{path}{f':{line}' if line else ''}: {type(error).__name__}: {text.splitlines()[0]}"


def load_user_model(
    path: Path, *, num_classes: int, in_channels: int, norm: str | None, options: Mapping[str, Any]
) -> UserModel:
    """Run the file and call its `model` function.

    Args:
        norm: canonical spec, passed on only when it is not None.
        options: further keyword arguments.

    Raises:
        UserError: the file is missing, is not trusted, has no such function, or fails (with file and line).
    """
    path = path.absolute()
    module, source = _import_file(path)
    function = getattr(module, "model", None)
    if not callable(function):
        raise UserError(f"model.name: {path} defines no function 'model'; it needs one: def model(**kwargs)")
    arguments = {"num_classes": num_classes, "in_channels": in_channels}
    if norm is not None:
        arguments["norm"] = norm  # type: ignore[assignment]
    try:
        network = function(**_accepted(function, arguments, options))
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"model.name: {describe_error(path, error)}") from error
    if not isinstance(network, nn.Module):
        raise UserError(f"model.name: 'model' in {path} returned {type(network).__name__}, which is no torch module")
    for attribute in _NOT_BUILT:
        if getattr(network, attribute, None) is not None:
            raise UserError(f"model.name: {path} sets '{attribute}', which is not supported yet; remove it")
    return UserModel(network, getattr(network, "regime", None), _input_transform(path, network), source)


def _import_file(path: Path) -> tuple[ModuleType, dict[str, str]]:
    """Run the file as a module with a private name; the hash is that of the very bytes that were run.

    Raises:
        UserError: nobody vouched for it (see `models.trust`), or it fails.
    """
    import norm_matters.core.torchvision  # noqa: F401  (the file may import torchvision, which fails on its own)

    text = read_code(path)
    digest = hashlib.sha256(text).hexdigest()
    check_trusted(path, digest)
    module = ModuleType(f"_norm_matters_user_{digest[:16]}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # dataclasses and pickle look their module up
    try:
        exec(compile(text, str(path), "exec"), module.__dict__)
    except (Exception, SystemExit) as error:
        del sys.modules[module.__name__]
        raise UserError(f"model.name: {describe_error(path, error)}") from error
    return module, {"path": str(path), "sha256": digest}


def _accepted(function: Callable[..., Any], arguments: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments the function takes; UserError for an option that it does not take."""
    parameters = inspect.signature(function).parameters.values()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return {**arguments, **options}
    names = [parameter.name for parameter in parameters if parameter.kind is not parameter.POSITIONAL_ONLY]
    problems = [
        f"model.options.{option}: 'model' in the file takes no such argument{nearest(option, names)}"
        for option in options
        if option not in names
    ]
    if problems:
        raise UserError(*problems)
    return {name: value for name, value in {**arguments, **options}.items() if name in names}


def _input_transform(path: Path, network: nn.Module) -> dict[str, Callable[..., Any]] | None:
    transform = getattr(network, "input_transform", None)
    if transform is None:
        return None
    valid = isinstance(transform, dict) and set(transform) == set(_MODES) and all(map(callable, transform.values()))
    if not valid:
        raise UserError(f"model.name: 'input_transform' in {path} must be a dict of two functions, 'train' and 'eval'")
    return dict(transform)
