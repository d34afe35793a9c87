"""What stands in for weight decay, at work, where it follows recorded norms: `instead_of_decay.py` names the forms.

Each form moves the weights of some layers in its own way. They are in parameter groups of their own, for which the
optimizer's step is made with another learning rate, or followed by something.
"""

import abc
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from norm_matters.core.clock import Clock
from norm_matters.core.errors import UserError
from norm_matters.core.seeding import derive_seed
from norm_matters.regimes.instead_of_decay import InsteadOfDecay, LrCorrection, NormSchedule
from norm_matters.weights.base import SHORTEST
from norm_matters.weights.recorded import ChannelWeight, RecordedNorms

Group = dict[str, Any]
"""A parameter group of a torch optimizer."""


def shuffled_channels(weights: Sequence[ChannelWeight], seed: int) -> Tensor:
    """For each channel of all weights the place of another of its layer, int64 (channels,); a function of the seed."""
    places, start = [], 0
    for weight in weights:
        draw = np.random.default_rng(derive_seed(seed, "shuffled channels", weight.layer))
        # A circle through all channels in a random order: nobody keeps its own place, unless it is alone.
        order = draw.permutation(weight.channels)
        place = np.empty_like(order)
        place[order] = np.roll(order, 1)
        places.append(start + place)
        start += weight.channels
    return torch.from_numpy(np.concatenate(places))


def _direction(tensor: Tensor, group: Group, states: Mapping[Tensor, Any], gradient: Tensor | None) -> Tensor | None:
    """What SGD multiplies by the learning rate; None where it does not move the tensor in this step.

    Args:
        states: the optimizer's, its buffers renewed.
        gradient: before the optimizer's step, which may write into it where Nesterov's momentum is asked for.
    """
    if gradient is None or not group["momentum"]:
        return gradient
    buffer = states.get(tensor, {}).get("momentum_buffer")
    if buffer is None or not group["nesterov"]:
        return buffer
    return gradient.add(buffer, alpha=group["momentum"])


def _lengthening(constant: float, scheduled: float, clock: Clock) -> float:
    """What norms are multiplied by so that a constant rate does what a scheduled one does at the recorded norms."""
    if not scheduled > 0:
        raise UserError(f"instead_of_decay: norm-schedule has no norm for a learning rate of 0, at step {clock.step}")
    return math.sqrt(constant / scheduled)


class Replay(abc.ABC):
    """A form at work. For each step `prepare` and then `step`; both are given the groups of these weights alone.

    Args:
        form: with its options.
        weights: by the names of their parameters.
    """

    def __init__(self, form: InsteadOfDecay, weights: Mapping[str, ChannelWeight]) -> None:
        self.form = form
        self.weights = list(weights.values())
        self._names = {id(weight.tensor): name for name, weight in weights.items()}
        self._channels = [weight.channels for weight in self.weights]

    @abc.abstractmethod
    def prepare(self, clock: Clock, groups: Sequence[Group]) -> None:
        """Set the groups for the step that follows `clock`; they stand as the regime has them."""

    @abc.abstractmethod
    def step(
        self, take: Callable[[], None], groups: Sequence[Group], states: Mapping[Tensor, Any], leave_out: Tensor | None
    ) -> None:
        """Move the weights.

        Args:
            take: the optimizer's own step.
            states: the optimizer's, by parameter.
            leave_out: flag (no dimension) on the device; where it is true nothing changes.
        """

    def factors(self) -> dict[str, Tensor]:
        """By the names of the layers, what the learning rate of each channel was multiplied by in the last step."""
        return {}

    def numbers(self) -> dict[str, Any]:
        """What a checkpoint must hold, as JSON can."""
        return {}

    def load(self, numbers: Mapping[str, Any]) -> None:  # noqa: B027
        """Restore what `numbers` returned.

        Raises:
            UserError: the state is that of other norms.
        """

    def forget_momentum(self) -> None:  # noqa: B027
        """Called when the optimizer's buffers are emptied."""

    def _all_norms(self) -> Tensor:
        """Of all channels of all weights: (channels,)."""
        return torch.cat([weight.norms() for weight in self.weights])

    def _by_weight(self, values: Tensor) -> dict[str, tuple[ChannelWeight, Tensor]]:
        """Values of all channels as they broadcast against each weight, by parameter."""
        return {
            weight.parameter: (weight, weight.layout.spread(part, weight.layout.split(weight.tensor.detach())))
            for weight, part in zip(self.weights, values.split(self._channels), strict=True)
        }


class RecordedReplay(Replay):
    """One that follows recorded norms.

    Args:
        norms: checked to have what is needed.
    """

    def __init__(self, form: InsteadOfDecay, weights: Mapping[str, ChannelWeight], norms: RecordedNorms) -> None:
        super().__init__(form, weights)
        self._norms = norms
        self._epoch = 0
        self._table = torch.empty(0)
        self._target = torch.empty(0)

    def _follow(self, clock: Clock, *, every_step: bool) -> None:
        """Set `_target`, the recorded norms (channels,) for the step that follows `clock`."""
        if self._epoch != clock.epoch + 1:
            self._epoch = clock.epoch + 1
            self._table = self._norms.table(self.weights, self._epoch)
        self._target = self._table[clock.step % clock.steps_per_epoch if every_step else -1]

    def numbers(self) -> dict[str, Any]:
        """See the base class."""
        return {"epochs": self._epoch, "norms": self._norms.digest(self._epoch)}

    def load(self, numbers: Mapping[str, Any]) -> None:
        """See the base class."""
        if numbers["norms"] != self._norms.digest(int(numbers["epochs"])):
            raise UserError(f"regime.norms: the norms of '{self._norms.source}' are not those that the run began with")


class CorrectedLr(RecordedReplay):
    """`lr-correction`: the buffer is multiplied at the update, by channel."""

    form: LrCorrection

    def __init__(self, form: LrCorrection, weights: Mapping[str, ChannelWeight], norms: RecordedNorms) -> None:
        super().__init__(form, weights, norms)
        self._factors = torch.empty(0)
        self._order: Tensor | None = None
        if form.shuffle is not None:
            self._order = shuffled_channels(self.weights, form.shuffle).to(self.weights[0].tensor.device)

    def prepare(self, clock: Clock, groups: Sequence[Group]) -> None:
        """See the base class."""
        self._follow(clock, every_step=self.form.every == "step")
        if self._order is not None:
            self._target = self._target.index_select(0, self._order)

    @torch.no_grad()
    def step(
        self, take: Callable[[], None], groups: Sequence[Group], states: Mapping[Tensor, Any], leave_out: Tensor | None
    ) -> None:
        """See the base class."""
        # A channel that has died in the recorded run has no direction to follow.
        alive = self._target > SHORTEST
        self._factors = torch.where(alive, self._all_norms() / torch.where(alive, self._target, 1.0), 1.0).square()
        rates = [float(group["lr"]) for group in groups]
        kept = [
            [None if tensor.grad is None else tensor.grad.clone() for tensor in group["params"]]
            if group["nesterov"]
            else [tensor.grad for tensor in group["params"]]
            for group in groups
        ]
        try:
            # With a rate of 0 the optimizer renews its buffers and moves nothing.
            for group in groups:
                group["lr"] = 0.0
            take()
        finally:
            for group, rate in zip(groups, rates, strict=True):
                group["lr"] = rate
        found = self._by_weight(self._factors)
        for group, rate, gradients in zip(groups, rates, kept, strict=True):
            rate /= 1 - rate * self.form.decay
            for tensor, gradient in zip(group["params"], gradients, strict=True):
                moved = _direction(tensor, group, states, gradient)
                if moved is None:
                    continue
                weight, factor = found[self._names[id(tensor)]]
                split, factor = weight.layout.split(tensor), factor.to(tensor.dtype)
                if leave_out is None:
                    split.addcmul_(weight.layout.split(moved), factor, value=-rate)
                else:
                    change = weight.layout.split(moved) * factor
                    split.add_(torch.where(leave_out, torch.zeros_like(change), change), alpha=-rate)

    def factors(self) -> dict[str, Tensor]:
        """See the base class."""
        if not len(self._factors):
            return {}
        parts = self._factors.split(self._channels)
        return {weight.layer: part for weight, part in zip(self.weights, parts, strict=True)}


class ScheduledNorm(RecordedReplay):
    """`norm-schedule`: a constant rate, and each channel is put to a norm after the step."""

    form: NormSchedule
    _lengthened: list[float]

    def prepare(self, clock: Clock, groups: Sequence[Group]) -> None:
        """See the base class."""
        self._follow(clock, every_step=False)
        self._lengthened = [_lengthening(self.form.lr, float(group["lr"]), clock) for group in groups]
        for group in groups:
            group["lr"] = self.form.lr

    @torch.no_grad()
    def step(
        self, take: Callable[[], None], groups: Sequence[Group], states: Mapping[Tensor, Any], leave_out: Tensor | None
    ) -> None:
        """See the base class."""
        take()
        norms = self._all_norms()
        # One of length 0 has no direction, and one that died in the recorded run no length to be put to.
        alive = (norms > SHORTEST) & (self._target > SHORTEST)
        found = self._by_weight(torch.where(alive, self._target / torch.where(alive, norms, 1.0), 0.0))
        for group, longer in zip(groups, self._lengthened, strict=True):
            for tensor in group["params"]:
                if tensor.grad is not None:
                    weight, factor = found[self._names[id(tensor)]]
                    change = torch.where(factor > 0, factor * longer, 1.0)
                    weight.layout.split(tensor).mul_(change.to(tensor.dtype))
