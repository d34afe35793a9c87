"""`exponential-lr`: weight decay as a learning rate that grows; see `instead_of_decay.py`."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from norm_matters.core.clock import Clock
from norm_matters.core.errors import UserError
from norm_matters.regimes.instead_of_decay import ExponentialLr
from norm_matters.regimes.replay import Group, Replay
from norm_matters.weights.recorded import ChannelWeight

RENORMALISE_AT = 2.0**10
"""How much longer than with decay the weights may become before they are shortened by this factor, a power of two."""


def exponential_step(lr: float, momentum: float, decay: float, length: float, carried: float) -> tuple[float, ...]:
    """One step of the learning rate that brings about what weight decay does, exactly.

    In the run with decay the buffer is `v = m v + g + decay w` and the step `w -= lr v`. Here the weight is `W = c w`,
    moved by SGD without decay. The part of v that came by decay is `k w` (k starts at 0); with `p = decay + m k` the
    step there is `w' = (1 - lr p) w - lr (...)`, so with `alpha = 1 - lr p`, `c' = c / alpha`, `k' = p / alpha` and the
    learning rate `lr c c'` here, W' = c' w'. Any schedule of lr, momentum and decay may be behind the arguments. With
    constant ones alpha comes to the larger root of `x^2 - (1 + m - lr decay) x + m = 0` (Li and Arora 2020, arXiv
    1910.07454).

    Args:
        lr: of the run with decay, in this step.
        length: c, how much longer the weight is than in the run with decay.
        carried: k.

    Returns:
        The learning rate of this step; length and carried for the next.

    Raises:
        UserError: the decay is so strong that it would turn the weight round.
    """
    pull = decay + momentum * carried
    alpha = 1 - lr * pull
    if not alpha > 0:
        raise UserError(f"instead_of_decay: lr {lr:g} and decay {decay:g} shorten weights below 0 in one step")
    return lr * length**2 / alpha, length / alpha, pull / alpha


def exponential_root(lr: float, momentum: float, decay: float) -> float:
    """The alpha that `exponential_step` comes to: the larger root of `x^2 - (1 + m - lr decay) x + m = 0`.

    Raises:
        UserError: there is none: `lr decay` is above `(1 - sqrt(m))^2`, and decay alone makes weights swing.
    """
    half = (1 + momentum - lr * decay) / 2
    if half <= 0 or half**2 < momentum:
        raise UserError(
            f"instead_of_decay: lr {lr:g}, decay {decay:g}, momentum {momentum:g}: weights would swing through 0; "
            f"exponential-lr is for lr * decay up to {(1 - math.sqrt(momentum)) ** 2:.3g}"
        )
    return half + math.sqrt(half**2 - momentum)


class GrowingLr(Replay):
    """`exponential-lr`: plain SGD with another learning rate; `exponential_step` derives it."""

    form: ExponentialLr

    def __init__(self, form: ExponentialLr, weights: Mapping[str, ChannelWeight]) -> None:
        super().__init__(form, weights)
        # Of each group: how much longer its weights are than with decay, and the part of the buffer that came by decay.
        self._now: list[tuple[float, float]] = []
        self._next: list[tuple[float, float]] = []

    def prepare(self, clock: Clock, groups: Sequence[Group]) -> None:
        """See the base class."""
        self._now = self._now or [(1.0, 0.0)] * len(groups)
        self._next = []
        for group, (length, carried) in zip(groups, self._now, strict=True):
            rate, length, carried = exponential_step(
                float(group["lr"]), float(group["momentum"]), self.form.decay, length, carried
            )
            group["lr"] = rate
            self._next.append((length, carried))

    @torch.no_grad()
    def step(
        self, take: Callable[[], None], groups: Sequence[Group], states: Mapping[Tensor, Any], leave_out: Tensor | None
    ) -> None:
        """See the base class.

        A step that is left out on the device counts as made: the host does not know of it.
        """
        take()
        self._now = self._next
        for number, (group, (length, carried)) in enumerate(zip(groups, self._now, strict=True)):
            if length < RENORMALISE_AT:
                continue
            self._now[number] = length / RENORMALISE_AT, carried
            for tensor in group["params"]:
                # The gradient of a shorter weight is longer by as much; powers of two change no digit.
                tensor.div_(RENORMALISE_AT)
                buffer = states.get(tensor, {}).get("momentum_buffer")
                if buffer is not None:
                    buffer.mul_(RENORMALISE_AT)

    def numbers(self) -> dict[str, Any]:
        """See the base class."""
        return {"groups": [list(pair) for pair in self._now]}

    def load(self, numbers: Mapping[str, Any]) -> None:
        """See the base class."""
        self._now = [(float(length), float(carried)) for length, carried in numbers["groups"]]

    def forget_momentum(self) -> None:
        """See the base class."""
        self._now = [(length, 0.0) for length, _ in self._now]
