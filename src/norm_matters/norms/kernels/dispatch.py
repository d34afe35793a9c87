"""Which kernels compute what: the fastest backend that can, or the one that is asked for."""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, Protocol, get_args

import torch
from torch import Tensor

from norm_matters.core.errors import UserError, nearest
from norm_matters.norms.kernels import reference
from norm_matters.norms.kernels.estimator import Estimator

BackendName = Literal["reference", "cpu", "triton"]
Choice = Literal["auto", "reference"]
_HOME: dict[str, tuple[BackendName, str]] = {
    "cpu": ("cpu", "norm_matters.norms.kernels.cpu"),
    "cuda": ("triton", "norm_matters.norms.kernels.triton"),
}
_loaded: dict[str, Any] = {}
_choice: Choice = "auto"


class Backend(Protocol):
    """A module with the functions of `reference`; `reason_against` says in words why it cannot do something."""

    def reason_against(self, x: Tensor, estimator: Estimator) -> str | None: ...
    def forward(self, x: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor]: ...
    def apply(self, x: Tensor, *args: Any, **options: Any) -> Tensor: ...
    def backward(self, grad: Tensor, *args: Any, **options: Any) -> tuple[Tensor, Tensor, Tensor, Tensor | None]: ...


class Availability(NamedTuple):
    """Whether a backend works here: its name, the device it is for, and why not (None where it does)."""

    name: BackendName
    device: str
    reason: str | None


def set_kernels(choice: Choice) -> None:
    """Choose for this process: "auto", the fastest kernels there are, or "reference", plain torch only.

    Raises:
        UserError: no such choice.
    """
    global _choice
    if choice not in get_args(Choice):
        raise UserError(f"kernels: '{choice}' is neither auto nor reference{nearest(choice, get_args(Choice))}")
    _choice = choice


@contextmanager
def kernels(choice: Choice) -> Iterator[None]:
    """`set_kernels` for a while."""
    before = _choice
    set_kernels(choice)
    try:
        yield
    finally:
        set_kernels(before)


def fast_backend(x: Tensor, estimator: Estimator) -> Backend | None:
    """The backend with a kernel for this input; None where there is none, or none is wanted."""
    if _choice == "reference":
        return None
    backend = _backend_of(x.device.type)
    return None if backend is None or backend.reason_against(x, estimator) else backend


def available_backends() -> list[Availability]:
    """What each backend says of a small input on its device."""
    found = [Availability("reference", "any", None)]
    for device, (name, _) in _HOME.items():
        try:
            backend, x = _backend_of(device), torch.zeros(2, 16, 4, 4, device=device)
            reason = "it cannot be imported" if backend is None else backend.reason_against(x, Estimator("l1"))
        except (AssertionError, RuntimeError) as error:  # torch's words for a device that is not there
            reason = str(error).splitlines()[0]
        found.append(Availability(name, device, reason))
    return found


def _backend_of(device: str) -> Any:
    """The backend module for a device type; None without one, or where its own packages are missing."""
    if device not in _loaded:
        home = _HOME.get(device)
        try:
            _loaded[device] = home and importlib.import_module(home[1])
        except ImportError:
            _loaded[device] = None
    return _loaded[device]


def total_backend(x: Tensor, estimator: Estimator) -> Backend:
    """As `fast_backend`, with the reference where it has none."""
    return fast_backend(x, estimator) or reference
