"""All that changes while a network trains, in one place: what a checkpoint must hold, and nothing else."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from norm_matters.core.clock import Clock
from norm_matters.core.errors import UserError
from norm_matters.engine.precision import PRECISIONS, LossScale, input_dtype
from norm_matters.engine.rng import restore_rng, rng_state
from norm_matters.regimes import Regime, RegimeOptimizer


class TrainingState:
    """A network in training: weights, optimizer, loss scale, position.

    Args:
        module: the network, float32 (or float64) as built; it is moved to `device` and into the formats of `precision`.
        regime: optimizer settings as a function of the clock.
        clock: where the run starts.
        precision: a key of `PRECISIONS`.
    """

    def __init__(
        self,
        module: nn.Module,
        regime: Regime,
        clock: Clock,
        *,
        device: torch.device,
        precision: str = "fp32",
        memory_format: torch.memory_format = torch.channels_last,
    ) -> None:
        self.device = device
        self.clock = clock
        self.skipped_steps = 0
        self.precision = PRECISIONS[precision]
        self.scale = LossScale() if self.precision.scaled else None
        self.module = module.to(device=device, memory_format=memory_format)  # type: ignore[call-overload]
        self.masters: dict[str, Tensor] = {}
        if self.precision.weights is not None:
            originals = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
            self.precision.convert(module)
            self.masters = {
                name: originals[name].requires_grad_()
                for name, parameter in module.named_parameters()
                if parameter.requires_grad and parameter.dtype != originals[name].dtype
            }
        trained = {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}
        self.optimizer = RegimeOptimizer(module, regime, trained | self.masters)
        self.input_dtype = input_dtype(module)
        # Bound once: a named_parameters() walk at every step costs more than a small network's arithmetic.
        self._pairs = [(self.masters[name], parameter) for name, parameter in trained.items() if name in self.masters]

    def gradients_to_masters(self) -> None:
        """Move the gradients of low-precision weights to their float32 masters."""
        for master, parameter in self._pairs:
            master.grad = None if parameter.grad is None else parameter.grad.to(master.dtype)
            parameter.grad = None

    def masters_to_weights(self) -> None:
        """Round the masters into the network's weights."""
        with torch.no_grad():
            for master, parameter in self._pairs:
                parameter.copy_(master)

    def model_tensors(self) -> dict[str, Tensor]:
        """The network as a state_dict of full-precision tensors: masters stand in for the weights rounded from them."""
        weights: dict[str, Tensor] = self.module.state_dict() | self.masters
        return {name: tensor.detach() for name, tensor in weights.items()}

    def training_tensors(self) -> dict[str, Tensor]:
        """Optimizer and random state, by `optimizer/...` and `rng/...`."""
        optimizer = {f"optimizer/{name}": tensor for name, tensor in self.optimizer.tensors().items()}
        return optimizer | {f"rng/{name}": tensor for name, tensor in rng_state()[0].items()}

    def numbers(self) -> dict[str, Any]:
        """The rest of the state, as JSON can hold it."""
        return {
            "step": self.clock.step,
            "skipped_steps": self.skipped_steps,
            "optimizer": self.optimizer.numbers(),
            "scale": self.scale.state() if self.scale else None,
            "rng": rng_state()[1],
        }

    def load(self, model: Mapping[str, Tensor], training: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Restore a saved state exactly; the random streams come last, so that nothing draws after them.

        Raises:
            UserError: the checkpoint is of another network, or part of the state is missing.
        """
        load_weights(self.module, model)
        with torch.no_grad():
            for name, master in self.masters.items():
                master.copy_(model[name])
        self.clock = self.clock.at_step(int(numbers["step"]))
        self.skipped_steps = int(numbers["skipped_steps"])
        if (self.scale is None) != (numbers["scale"] is None):
            raise UserError("the checkpoint was written in another precision: only one of the two has a loss scale")
        if self.scale is not None:
            self.scale.load(numbers["scale"])
        self.optimizer.load(_part(training, "optimizer/"), numbers["optimizer"], self.clock)
        restore_rng(_part(training, "rng/"), numbers["rng"])


def load_weights(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy a state_dict into a network whose names and shapes must be the same.

    Raises:
        UserError: naming the first five entries that are missing, unexpected or of another shape.
    """
    own = module.state_dict()
    problems = [f"{name} is missing" for name in own if name not in tensors]
    problems += [f"{name} is unexpected" for name in tensors if name not in own]
    problems += [
        f"{name} has shape {tuple(tensors[name].shape)}, not {tuple(own[name].shape)}"
        for name in own
        if name in tensors and tensors[name].shape != own[name].shape
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise UserError(f"the weights are of another network: {', '.join(problems[:5])}{more}")
    module.load_state_dict(dict(tensors))


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
