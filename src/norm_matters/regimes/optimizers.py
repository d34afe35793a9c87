"""The optimizer that follows a regime, and its state under the names of the parameters."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from norm_matters.core.clock import Clock
from norm_matters.core.errors import UserError
from norm_matters.regimes.groups import group_parameters
from norm_matters.regimes.implementation import build_optimizer, devices_of, fastest, take_step
from norm_matters.regimes.instead_of_decay import KEY as INSTEAD_OF_DECAY
from norm_matters.regimes.regime import Regime
from norm_matters.regimes.replaying import Replaying
from norm_matters.regimes.settings import (
    PROBE,
    check_settings,
    optimizer_class,
    setting_defaults,
    usable_settings,
)
from norm_matters.weights.recorded import RecordedNorms


class RegimeOptimizer:
    """A torch optimizer that is set anew for each step, as the regime says for that point of the run.

    Args:
        module: the network; it decides which parameter is of which kind.
        regime: the optimizer and its settings over the run.
        parameters: what is optimised, by the names in `module` (float32 masters, say); by default the module's own
            parameters that take a gradient.
        norms: of a recorded run, for what stands in for weight decay (`instead_of_decay.py`).
        clock: of the run, where it starts; given, settings and norms are checked for all of it.

    Raises:
        UserError: the regime names unknown settings or kinds, or there is nothing to train; or recorded norms are
            missing, do not fit, or are not asked for.
    """

    optimizer: torch.optim.Optimizer

    def __init__(
        self,
        module: nn.Module,
        regime: Regime,
        parameters: Mapping[str, Tensor] | None = None,
        *,
        norms: RecordedNorms | None = None,
        clock: Clock | None = None,
    ) -> None:
        check_settings(regime)
        if parameters is None:
            parameters = {name: tensor for name, tensor in module.named_parameters() if tensor.requires_grad}
        if not parameters:
            raise UserError("the network has no parameters to train")
        self.regime = regime
        self._parameters = dict(parameters)
        self._devices = devices_of(self._parameters.values())
        members = group_parameters(module, list(parameters), regime.kinds)
        self._replaying = None
        if regime.replacements or norms is not None:
            self._replaying = Replaying(module, regime, self._parameters, norms)
        self._members = _split(members, self._replaying)
        if self._replaying is not None and clock is not None:
            self._replaying.check(clock, lambda at: self._owned(self._group_settings(regime.at(at))))
        self._build(regime.at(PROBE), resets=regime.resets(PROBE))

    def prepare(self, clock: Clock) -> float:
        """Set everything for the step that follows `clock`.

        Returns:
            The learning rate of the first group.

        Raises:
            UserError: a function of the regime returned what the optimizer does not take.
        """
        settings, resets = self.regime.at(clock), self.regime.resets(clock)
        try:
            values = self._group_settings(settings)
        except UserError as error:
            raise UserError(*(f"{self.regime.name}, step {clock.step}: {text}" for text in error.problems)) from error
        if settings["optimizer"] != self._name or resets > self._resets or _layout(values) != self._layout:
            self._build(settings, resets=resets)
        for group, own in zip(self.optimizer.param_groups, values, strict=True):
            group.update(own)
        rate = float(self.optimizer.param_groups[0]["lr"])
        if self._replaying is not None:
            self._replaying.prepare(settings.get(INSTEAD_OF_DECAY), clock, self._owned(self.optimizer.param_groups))
        return rate

    @property
    def takes_flag(self) -> bool:
        """Whether `step` can be told on the device to change nothing."""
        return all(group.get("fused") for group in self.optimizer.param_groups)

    def step(self, leave_out: Tensor | None = None) -> None:
        """Change the parameters by their gradients.

        Args:
            leave_out: flag (no dimension) on their device; where it is true nothing changes.
        """
        if self._replaying is None:
            take_step(self.optimizer, leave_out)
            return
        owned, states = self._owned(self.optimizer.param_groups), self.optimizer.state
        self._replaying.step(lambda: take_step(self.optimizer, leave_out), owned, states, leave_out)

    def lr_factors(self) -> dict[str, Tensor]:
        """By layer, what the LR of each output channel was multiplied by in the last step; empty: by nothing."""
        return {} if self._replaying is None else self._replaying.factors()

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for parameter in self._parameters.values():
            parameter.grad = None

    def parameters(self) -> list[Tensor]:
        """What is optimised."""
        return list(self._parameters.values())

    def named_parameters(self) -> dict[str, Tensor]:
        """What is optimised, by its names in the network."""
        return dict(self._parameters)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of the optimizer's state, by `PARAMETER/ENTRY`; not copied."""
        return {
            f"{name}/{entry}": value
            for name, state in self._states().items()
            for entry, value in state.items()
            if isinstance(value, Tensor)
        }

    def numbers(self) -> dict[str, Any]:
        """The rest of the state, as JSON can hold it: per parameter its entries, null where `tensors` has them."""
        state = {
            name: {entry: None if isinstance(value, Tensor) else value for entry, value in entries.items()}
            for name, entries in self._states().items()
        }
        numbers = {"optimizer": self._name, "resets": self._resets, "state": state}
        return numbers if self._replaying is None else {**numbers, INSTEAD_OF_DECAY: self._replaying.numbers()}

    def load(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any], clock: Clock) -> None:
        """Restore a state exactly.

        Args:
            tensors: what `tensors()` returned when the state was saved; copied.
            numbers: what `numbers()` returned then.
            clock: the run's position then.

        Raises:
            UserError: entries are missing or left over, or are of another network.
        """
        state = numbers["state"]
        expected = {f"{name}/{entry}" for name in state for entry, value in state[name].items() if value is None}
        _check_names("parameters", state, self._parameters)
        _check_names("entries", tensors, expected)
        # The settings of the last step that was done: the state is of its optimizer, and is kept or dropped next.
        settings = self.regime.at(clock.at_step(max(0, clock.step - 1)))
        self._build({**settings, "optimizer": numbers["optimizer"]}, resets=int(numbers["resets"]))
        fused = bool(self.optimizer.param_groups[0].get("fused"))
        for name, parameter in self._parameters.items():
            entries = {
                entry: _restored(tensors[f"{name}/{entry}"], parameter, f"{name}/{entry}", fused=fused)
                if value is None
                else value
                for entry, value in state[name].items()
            }
            if entries:
                self.optimizer.state[parameter] = entries
        if self._replaying is not None:
            self._replaying.load(numbers.get(INSTEAD_OF_DECAY), settings.get(INSTEAD_OF_DECAY))

    def _states(self) -> dict[str, dict[str, Any]]:
        """Per parameter what the optimizer remembers; an entry that is None says no more than none."""
        return {
            name: {
                entry: value for entry, value in self.optimizer.state.get(parameter, {}).items() if value is not None
            }
            for name, parameter in self._parameters.items()
        }

    def _build(self, settings: Mapping[str, Any], *, resets: int) -> None:
        """Start an optimizer with an empty state."""
        values = self._group_settings(settings)
        groups = [
            {"params": [self._parameters[name] for name in members.names], **own}
            for members, own in zip(self._members, values, strict=True)
        ]
        if self._replaying is not None:
            self._replaying.forget_momentum()
        self._name, self._resets, self._layout = settings["optimizer"], resets, _layout(values)
        try:
            self.optimizer = build_optimizer(optimizer_class(self._name), groups, values[0])
        except (TypeError, ValueError, RuntimeError) as error:
            raise UserError(f"torch refuses to train this network with {self._name}: {error}") from error

    def _group_settings(self, settings: Mapping[str, Any]) -> list[dict[str, Any]]:
        """All settings of each group, in the order of the groups."""
        name = settings["optimizer"]
        defaults = setting_defaults(name)
        return [
            fastest(
                name,
                usable_settings({**settings, **settings["groups"].get(members.kind, {})}, defaults),
                self._devices,
            )
            for members in self._members
        ]

    def _owned(self, groups: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Those of all groups that hold weights for which something stands in for decay."""
        return [group for group, members in zip(groups, self._members, strict=True) if members.owned]


class _Members(NamedTuple):
    """The parameters of a group, by name: of which kind, and whether something stands in for their decay."""

    kind: str
    names: list[str]
    owned: bool


def _split(groups: Mapping[str, list[str]], replaying: Replaying | None) -> list[_Members]:
    """The groups of the optimizer: those by kind, parted where only some weights have something in place of decay."""
    parted = []
    for kind, names in groups.items():
        owned = [name for name in names if replaying is not None and replaying.owns(name)]
        others = [name for name in names if name not in owned]
        parted += [_Members(kind, part, part is owned) for part in (others, owned) if part]
    return parted


def _layout(values: Sequence[Mapping[str, Any]]) -> list[tuple[bool, ...]]:
    """What decides, beside its class, which tensors an optimizer's state has: when it changes, the state starts anew.

    Adam has one more with `amsgrad`, RMSprop with `centered` and with a momentum. (SGD makes its own when needed.)
    """
    keys = ("amsgrad", "centered") + (("momentum",) if any("centered" in own for own in values) else ())
    return [tuple(bool(own.get(key)) for key in keys) for own in values]


def _check_names(what: str, found: Iterable[str], expected: Iterable[str]) -> None:
    missing, unexpected = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    problems = [f"{name} is missing" for name in missing] + [f"{name} is unexpected" for name in unexpected]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise UserError(f"the optimizer's state does not fit, {what}: {', '.join(problems[:5])}{more}")


_LIKE_PARAMETERS = {
    *("momentum_buffer", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "square_avg", "grad_avg"),
    *("acc_delta", "sum", "ax", "prev", "step_size"),
}
"""Entries of torch's optimizers that have the parameter's shape."""


def _restored(value: Tensor, parameter: Tensor, name: str, *, fused: bool) -> Tensor:
    """A copy on the right device: counters (of no dimension) stay on the CPU unless the optimizer is fused.

    What has the parameter's shape gets its memory layout too: fused optimizers read them as they lie, side by side, and
    would read beyond the end of one that is shorter.

    Raises:
        UserError: it is of another shape or type than it must be.
    """
    entry = name.rpartition("/")[2]
    alike = value.shape == parameter.shape and (value.dtype == parameter.dtype or not fused)
    if not (alike if entry in _LIKE_PARAMETERS else not fused or value.numel() == 1) or not value.is_floating_point():
        raise UserError(
            f"the optimizer's state does not fit, entries: {name} is {value.dtype} {tuple(value.shape)}, and the "
            f"parameter {parameter.dtype} {tuple(parameter.shape)}"
        )
    if value.shape == parameter.shape and value.ndim:
        return torch.empty_like(parameter, dtype=value.dtype).copy_(value)
    device = parameter.device if value.ndim or fused else "cpu"
    return value.detach().to(device=device, copy=True)
