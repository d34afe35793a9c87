"""Who in a network is moved by what stands in for weight decay, and by which form at the moment."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from norm_matters.core.clock import Clock
from norm_matters.core.errors import UserError
from norm_matters.regimes.exponential import GrowingLr, exponential_root
from norm_matters.regimes.instead_of_decay import KEY, ExponentialLr, InsteadOfDecay, LrCorrection
from norm_matters.regimes.regime import Regime
from norm_matters.regimes.replay import CorrectedLr, Group, Replay, ScheduledNorm
from norm_matters.weights import last_layer
from norm_matters.weights.recorded import ChannelWeight, RecordedNorms, channel_weights


class Replaying:
    """The weights that a regime moves by something other than decay, in one phase or another.

    Args:
        module: the network.
        regime: it has `replacements`.
        parameters: what is optimised, by the names in `module`.
        norms: of the run that `regime.norms` names.

    Raises:
        UserError: there are no norms and the regime needs them, or no layer for it.
    """

    def __init__(
        self, module: nn.Module, regime: Regime, parameters: Mapping[str, Tensor], norms: RecordedNorms | None
    ) -> None:
        self._regime = regime
        self._norms = norms
        forms = regime.replacements
        if norms is None and any(form.needs_norms for form in forms):
            name = next(form.name for form in forms if form.needs_norms)
            raise UserError(f"regime.norms: missing; {name} follows the norms of a recorded run: give its folder")
        if norms is not None and not any(form.needs_norms for form in forms):
            raise UserError(f"regime.norms: {norms.source!r} is given, but nothing in the regime follows its norms")
        self._weights = chosen_weights(module, parameters, forms[0].layers if forms else None)
        if forms and not self._weights:
            raise UserError(f"{KEY}: no convolution and no linear layer is there for it (layers: {forms[0].layers!r})")
        self._replay: Replay | None = None

    def owns(self, parameter: str) -> bool:
        """Whether the parameter of that name is in the groups that `prepare` and `step` are given."""
        return parameter in self._weights

    def check(self, clock: Clock, groups_at: Callable[[Clock], Sequence[Group]]) -> None:
        """See before training that all will be there.

        Args:
            clock: the run's, where it starts.
            groups_at: settings of the groups at a point of the run.

        Raises:
            UserError: norms of an epoch are missing or of another network; or settings that do not go together.
        """
        first, steps = clock.epoch, clock.steps_per_epoch
        starts = {start for start in self._regime.starts(clock) if start >= first * steps}
        places = {epoch * steps for epoch in range(first, clock.epochs)} | starts
        # Within the first epoch of a phase the learning rate may rise, too.
        rising = {step for start in starts for step in range(start, min(start + steps, clock.total_steps))}
        for place in sorted(places | rising):
            at = clock.at_step(place)
            form = self._regime.at(at).get(KEY)
            if form is None:
                continue
            for group in groups_at(at):
                _check_group(form, group, at)
                if isinstance(form, ExponentialLr):
                    exponential_root(float(group["lr"]), float(group["momentum"]), form.decay)
            if form.needs_norms and place in places:
                assert self._norms is not None
                every_step = isinstance(form, LrCorrection) and form.every == "step"
                self._norms.check(list(self._weights.values()), at.epoch + 1, steps=steps if every_step else None)

    def prepare(self, form: InsteadOfDecay | None, clock: Clock, groups: Sequence[Group]) -> None:
        """Set the groups for the step that follows `clock`; they stand as the regime has them."""
        self._change(form)
        if self._replay is not None:
            for group in groups:
                _check_group(self._replay.form, group, clock)
            self._replay.prepare(clock, groups)

    def step(
        self, take: Callable[[], None], groups: Sequence[Group], states: Mapping[Tensor, Any], leave_out: Tensor | None
    ) -> None:
        """Move the weights: see `Replay.step`."""
        if self._replay is None:
            take()
        else:
            self._replay.step(take, groups, states, leave_out)

    def forget_momentum(self) -> None:
        """Called when the optimizer's buffers are emptied."""
        if self._replay is not None:
            self._replay.forget_momentum()

    def factors(self) -> dict[str, Tensor]:
        """By layer, what the learning rate of each output channel was multiplied by in the last step."""
        return {} if self._replay is None else self._replay.factors()

    def numbers(self) -> dict[str, Any] | None:
        """What a checkpoint must hold, as JSON can; None at a place where decay has no replacement."""
        return None if self._replay is None else self._replay.numbers()

    def load(self, numbers: Mapping[str, Any] | None, form: InsteadOfDecay | None) -> None:
        """Restore what `numbers` returned.

        Args:
            form: of the last step that was made.

        Raises:
            UserError: the state is that of other norms.
        """
        self._replay = None
        self._change(form)
        if self._replay is not None and numbers is not None:
            self._replay.load(numbers)

    def _change(self, form: InsteadOfDecay | None) -> None:
        """Put a form to work, unless it is."""
        if form is None:
            self._replay = None
        elif self._replay is not None and isinstance(self._replay.form, ExponentialLr):
            # Only by its like, which goes on from its state.
            self._replay.form = form
        elif self._replay is None or self._replay.form != form:
            self._replay = _at_work(form, self._weights, self._norms)


def chosen_weights(module: nn.Module, parameters: Mapping[str, Tensor], layers: str | None) -> dict[str, ChannelWeight]:
    """The weights of convolutions and linear layers that are trained, by the names of their parameters.

    Args:
        parameters: what is optimised, by the names in `module`.
        layers: a regular expression for names of layers; None: all but the last layer.
    """
    last = last_layer(module)
    return {
        weight.parameter: weight
        for weight in channel_weights(module, parameters)
        if weight.parameter in parameters
        and (weight.layer != last if layers is None else re.search(layers, weight.layer) is not None)
    }


def _check_group(form: InsteadOfDecay, group: Group, clock: Clock) -> None:
    """Refuse settings of SGD under which a form is not what it says."""
    wrong = {"weight_decay": 0, "maximize": False}
    if isinstance(form, ExponentialLr):
        wrong |= {"nesterov": False, "dampening": 0}
    for key, needed in wrong.items():
        if group[key] != needed:
            raise UserError(
                f"{key}: {group[key]!r} in epoch {clock.epoch + 1} for weights that have {KEY} ({form.name}); it takes "
                f"{needed!r} there (what is for other parameters goes into `groups`)"
            )
    rate = float(group["lr"])
    if isinstance(form, LrCorrection) and rate * form.decay >= 1:
        raise UserError(
            f"{KEY}.decay: {form.decay:g} with a learning rate of {rate:g} in epoch {clock.epoch + 1} takes away the "
            f"whole weight in one step; lr-correction is for a decay below {1 / rate:.3g} there"
        )


def _at_work(form: InsteadOfDecay, weights: Mapping[str, ChannelWeight], norms: RecordedNorms | None) -> Replay:
    """The form at work on these weights."""
    if isinstance(form, ExponentialLr):
        return GrowingLr(form, weights)
    assert norms is not None, "checked before"
    return CorrectedLr(form, weights, norms) if isinstance(form, LrCorrection) else ScheduledNorm(form, weights, norms)
