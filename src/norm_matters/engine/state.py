"""All that changes while a network trains, in one place: what a checkpoint must hold, and nothing else."""

import contextlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from norm_matters.core.clock import Clock
from norm_matters.core.distributed import ALONE, Group
from norm_matters.core.errors import NumericalError, UserError
from norm_matters.core.shares import chunk_sizes, share_sizes
from norm_matters.engine.compiled import Forward, compiled_forward
from norm_matters.engine.epoch import EpochSoFar
from norm_matters.engine.nonfinite import PATIENCE, DeferredVerdicts, Policy, all_finite, describe_range
from norm_matters.engine.precision import PRECISIONS, LossScale, input_dtype
from norm_matters.engine.replicas import Replicas, Shards, gather_rng, restore_own_rng, seed_rank
from norm_matters.engine.tensors import lay_out, load_weights, part, with_prefix
from norm_matters.norms import RunningStatistics, norms_of
from norm_matters.regimes import Regime, RegimeOptimizer
from norm_matters.weights import project, projected_weights
from norm_matters.weights.recorded import RecordedNorms


class TrainingState:
    """A network in training: weights, optimizer, loss scale, position.

    Args:
        module: the network, float32 (or float64) as built; it is moved to `device` and into the formats of `precision`.
        regime: optimizer settings as a function of the clock.
        clock: where the run starts.
        precision: a key of `PRECISIONS`.
        memory_format: of weights of four dimensions, as of images; channels_last is what convolutions are fastest in.
        compiled: train with compiled code; evaluation and instruments run the network as it is written.
        cuda_graphs: record the compiled code's kernels once and replay them.
        deferred: decide on the device, without waiting for it, whether a step is finite; on a GPU by default.
        norms: of a recorded run, for what stands in for weight decay in the regime.

    Attributes:
        forward: what a training step calls: the network, or its compiled form with the same weights.
        so_far: of the epoch that is under way; None between two epochs.
        pieces: in which this rank takes its part of each chunk, for there is no memory for it at once.
        rehearsed: whether ranks have tried how much they have memory for.
        group: the ranks that train it together; `join` says so.
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
        compiled: bool = False,
        cuda_graphs: bool = False,
        deferred: bool | None = None,
        norms: RecordedNorms | None = None,
    ) -> None:
        self.device = device
        self.clock = clock
        self.skipped_steps = 0
        self.given_up_in_a_row = 0
        self.so_far: EpochSoFar | None = None
        self.pieces = 1
        self.rehearsed = False
        # What happened since the last row was recorded, for the log.
        self.incidents: list[str] = []
        self.notes: list[str] = []
        self.precision = PRECISIONS[precision]
        self.scale = LossScale(device=device) if self.precision.scaled else None
        self.module = lay_out(module.to(device), memory_format)
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
        self.optimizer = RegimeOptimizer(module, regime, trained | self.masters, norms=norms, clock=clock)
        self.input_dtype = input_dtype(module)
        # Bound once: a named_parameters() walk at every step costs more than a small network's arithmetic.
        self._pairs = [(self.masters[name], parameter) for name, parameter in trained.items() if name in self.masters]
        self._projections = projected_weights(module, self.masters)
        self.statistics = RunningStatistics(module)
        self._rejected_before = 0
        self._remembered: _Remembered | None = None
        self._deferred = device.type == "cuda" if deferred is None else deferred
        self._verdicts: DeferredVerdicts | None = None
        self.forward: Forward = compiled_forward(module, cuda_graphs=cuda_graphs) if compiled else module
        self.group = ALONE
        self._replicas: Replicas | None = None
        self._shards: Shards | None = None

    def join(self, group: Group, *, seed: int, shard_optimizer: bool = False) -> None:
        """Train together with other ranks from here on: each with its share of every batch, all with the same weights.

        Args:
            group: the ranks; all of them call this, and from then on train alike.
            seed: of the run; every rank but the first goes on with random streams of its own.
            shard_optimizer: each tensor's optimizer state lies on one rank only.
        """
        self.group = group
        if group.world == 1:
            return
        assert isinstance(self.forward, nn.Module), "CUDA graphs are refused with ranks"
        self._replicas = Replicas(self.module, self.forward, group)
        self.forward = self._replicas.forward
        group.copy_from(0, list(self.masters.values()))
        if shard_optimizer:
            self._shards = Shards(self.optimizer.named_parameters(), group)
        seed_rank(group, seed)

    def parts(self, images: int, accumulate: int) -> list[tuple[int, float]]:
        """How a step takes this rank's share of a batch: images in each chunk, and the weight of its mean loss.

        The gradients of the chunks of all ranks, so weighted, have the gradient of the whole batch's mean for their
        mean over the ranks.

        Args:
            images: this rank's share of the batch.
            accumulate: chunks of the batch.
        """
        group = self.group
        whole = images if group.world == 1 else self.clock.batch_size
        sizes = share_sizes(whole, accumulate, rank=group.rank, world=group.world)
        assert sum(sizes) == images, f"{images} images are no share of {whole}"
        if self.pieces > 1:
            sizes = [piece for size in sizes for piece in chunk_sizes(size, self.pieces)]
        return [(size, size / whole * group.world) for size in sizes]

    def exchanging(self, wanted: bool) -> contextlib.AbstractContextManager:
        """The context of a backward pass after which the gradients are averaged over the ranks, or not yet."""
        return contextlib.nullcontext() if self._replicas is None else self._replicas.exchanging(wanted)

    def agree_on_pieces(self) -> None:
        """Take as many pieces as the rank that has least memory; the same work on all, and the first can tell of it."""
        most = int(self.group.largest(self.pieces))
        if most > self.pieces:
            self.pieces = most
            self.notes.append(f"a rank has less memory than this one: all take chunks in {most} pieces from here on")

    def share_statistics(self) -> float | None:
        """Make the first rank's running statistics those of all, before they are used or saved.

        Returns:
            The largest relative difference there was; None for a process alone.
        """
        return None if self._replicas is None else self._replicas.share_statistics()

    def update(self, leave_out: Tensor | None = None) -> None:
        """Move the weights by their gradients.

        Args:
            leave_out: flag (no dimension) on the device; where it is true nothing changes.
        """
        if self._shards is not None:
            self._shards.forget_foreign_gradients()
        self.optimizer.step(leave_out)
        if self._shards is not None:
            self._shards.share_results()

    def verdicts(self, policy: Policy) -> DeferredVerdicts | None:
        """What decides on the device about the step that comes; None where the host has to wait for the outcome.

        It has to for rolling back, for optimizers that have no fused form, and for weights that are bounded by
        projection.
        """
        if not self._deferred or policy == "rollback" or self._projections or not self.optimizer.takes_flag:
            self.settle()
            self._verdicts = None
        elif self._verdicts is None or self._verdicts.policy != policy:
            self.settle()
            self._verdicts = DeferredVerdicts(self.device, policy, self.given_up_in_a_row)
        return self._verdicts

    def settle(self) -> None:
        """Learn what the device has decided since the last call; waits for it.

        Raises:
            NumericalError: a step was not finite and the policy is to stop, or was so too often in a row; or gradients
                overflow at every loss scale.
        """
        if self._verdicts is None:
            return
        found = self._verdicts.read()
        self.skipped_steps += found.overflowed
        self.given_up_in_a_row = found.in_a_row
        if found.given_up:
            epoch = (found.first - 1) // self.clock.steps_per_epoch + 1
            message = f"the training loss or a gradient is not finite in epoch {epoch}, step {found.first}"
            if self._verdicts.policy == "stop":
                raise NumericalError(f"{message}; no step was taken since, this is seen after step {self.clock.step}")
            if found.longest > PATIENCE:
                raise NumericalError(f"{message}; more than {PATIENCE} steps were given up in a row (nonfinite=skip)")
            self.skipped_steps += found.given_up
            self.incidents.append(f"{message}; {found.given_up} skipped by step {self.clock.step}")
        if self.scale is not None:
            self.scale.check()

    def gradients_to_masters(self) -> None:
        """Move the gradients of low-precision weights to their float32 masters."""
        for master, parameter in self._pairs:
            master.grad = None if parameter.grad is None else parameter.grad.to(master.dtype)
            parameter.grad = None

    def project_weights(self) -> None:
        """Put weights that are bounded by projection back to their norm."""
        project(self._projections)

    def masters_to_weights(self) -> None:
        """Round the masters into the network's weights."""
        with torch.no_grad():
            for master, parameter in self._pairs:
                parameter.copy_(master)

    def rejected_updates(self) -> int:
        """How many batches the norms have left out of their running statistics since the run began.

        With ranks: those of the rank that left out most; every rank calls this.
        """
        return int(self.group.largest(self._rejected_before + self.statistics.rejected()))

    def remember(self) -> None:
        """Keep the weights, the statistics and the optimizer as they are now, for `roll_back`."""
        model = {name: tensor.clone() for name, tensor in self.model_tensors().items()}
        optimizer = {name: tensor.clone() for name, tensor in self.optimizer.tensors().items()}
        self._remembered = _Remembered(model, optimizer, self.optimizer.numbers(), self.clock)

    def roll_back(self) -> None:
        """Return to what was remembered; the clock, the loss scale and the random streams go on."""
        assert self._remembered is not None
        model, optimizer, numbers, clock = self._remembered
        self._load_weights(model)
        self.optimizer.load(optimizer, numbers, clock)
        self.optimizer.prepare(self.clock)

    def model_tensors(self) -> dict[str, Tensor]:
        """The network as a state_dict of full-precision tensors: masters stand in for the weights rounded from them."""
        weights: dict[str, Tensor] = self.module.state_dict() | self.masters
        return {name: tensor.detach() for name, tensor in weights.items()}

    def first_not_finite(self) -> str | None:
        """The first weight, or running statistic of a norm, that is not finite, and its range; None for none.

        A statistic may be so although every loss was finite: training does not look at it.
        """
        tensors = {name: parameter.detach() for name, parameter in self.module.named_parameters()}
        tensors |= {
            f"{name}.{own}": buffer for name, norm in norms_of(self.module) for own, buffer in norm.named_buffers()
        }
        floating = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
        if all_finite(list(floating.values())):
            return None
        name = next(name for name, tensor in floating.items() if not all_finite([tensor]))
        return f"'{name}': {describe_range(floating[name])}"

    def checkpoint_bytes(self) -> int:
        """About how large a checkpoint is: weights, buffers, and two numbers for each weight that is trained."""
        trained = sum(parameter.nbytes for parameter in self.optimizer.parameters())
        return sum(tensor.nbytes for tensor in self.model_tensors().values()) + 2 * trained

    def training_tensors(self) -> dict[str, Tensor]:
        """All tensors but the network's: `optimizer/...`, `rng/...`, and in the middle of an epoch what else counts.

        On the first rank, but all ranks call this.
        """
        tensors = with_prefix("optimizer/", self._of_all_ranks(self.optimizer.tensors()))
        tensors |= gather_rng(self.group)[0]
        if self.so_far is not None and self._replicas is not None:
            tensors |= self._replicas.gather_statistics()
        if self.so_far is not None and self._remembered is not None:
            tensors |= with_prefix("remembered/model/", self._remembered.model)
            tensors |= with_prefix("remembered/optimizer/", self._of_all_ranks(self._remembered.optimizer))
        return tensors

    def numbers(self) -> dict[str, Any]:
        """The rest of the state, as JSON can hold it; all ranks call this."""
        self.settle()
        so_far, remembered = self.so_far, None
        if so_far is not None and self._remembered is not None:
            _, _, optimizer, clock = self._remembered
            remembered = {"step": clock.step, "optimizer": self._numbers_of_all_ranks(optimizer)}
        return {
            "step": self.clock.step,
            "epoch": None if so_far is None else so_far.numbers(self.group),
            "remembered": remembered,
            "skipped_steps": self.skipped_steps,
            "given_up_in_a_row": self.given_up_in_a_row,
            "rejected_updates": self.group.gather(self._rejected_before + self.statistics.rejected()),
            "optimizer": self._numbers_of_all_ranks(self.optimizer.numbers()),
            "scale": self.scale.state() if self.scale else None,
            "pieces": self.group.gather(self.pieces),
            "world": self.group.world,
            **gather_rng(self.group)[1],
        }

    def load(
        self, model: Mapping[str, Tensor], training: Mapping[str, Tensor], numbers: Mapping[str, Any], *, seed: int = 0
    ) -> None:
        """Restore a saved state exactly; the random streams come last, so that nothing draws after them.

        Args:
            seed: of the run, for ranks that were not there when it was saved.

        Raises:
            UserError: the checkpoint is of another network, or part of the state is missing.
        """
        self._load_weights(model)
        if self._replicas is not None:
            self._replicas.load_statistics(training)
        self.clock = self.clock.at_step(int(numbers["step"]))
        self.skipped_steps = int(numbers["skipped_steps"])
        self.given_up_in_a_row = int(numbers["given_up_in_a_row"])
        self._verdicts = None
        rejected = numbers["rejected_updates"]
        # One number in checkpoints of version 1: that of the rank that left out most.
        ranks = rejected if isinstance(rejected, list) else [rejected] * self.group.world
        self._rejected_before = int(ranks[self.group.rank] if len(ranks) == self.group.world else max(ranks))
        if (self.scale is None) != (numbers["scale"] is None):
            raise UserError("the checkpoint was written in another precision: only one of the two has a loss scale")
        if self.scale is not None:
            self.scale.load(numbers["scale"])
        self.optimizer.load(*self._own_part(part(training, "optimizer/"), numbers["optimizer"]), self.clock)
        # Checkpoints of version 1 have none.
        pieces = numbers.get("pieces", [1])
        self.pieces = int(pieces[self.group.rank] if len(pieces) == self.group.world else max(pieces))
        epoch = numbers.get("epoch")
        self.so_far = None if epoch is None else EpochSoFar.load(epoch, self.device, self.group)
        self._remembered = self._load_remembered(training, numbers.get("remembered"))
        restore_own_rng(self.group, training, numbers, seed=seed, step=self.clock.step)

    def _load_remembered(
        self, training: Mapping[str, Tensor], numbers: Mapping[str, Any] | None
    ) -> "_Remembered | None":
        if numbers is None:
            return None
        model = part(training, "remembered/model/")
        if model.keys() != self.module.state_dict().keys():
            raise UserError("the checkpoint lacks tensors of the state that it would roll back to")
        optimizer = self._own_part(part(training, "remembered/optimizer/"), numbers["optimizer"])
        return _Remembered(model, *optimizer, self.clock.at_step(int(numbers["step"])))

    def _of_all_ranks(self, optimizer: dict[str, Tensor]) -> dict[str, Tensor]:
        """The optimizer's tensors, where each rank has a part, of all of them; on the first."""
        return optimizer if self._shards is None else self._shards.gather_tensors(optimizer)

    def _numbers_of_all_ranks(self, optimizer: dict[str, Any]) -> dict[str, Any]:
        return optimizer if self._shards is None else self._shards.gather_numbers(optimizer)

    def _own_part(
        self, tensors: dict[str, Tensor], numbers: dict[str, Any]
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Of an optimizer's state what this rank keeps."""
        return (tensors, numbers) if self._shards is None else self._shards.own_part(tensors, numbers)

    def _load_weights(self, model: Mapping[str, Tensor]) -> None:
        load_weights(self.module, model)
        with torch.no_grad():
            for name, master in self.masters.items():
                master.copy_(model[name])


class _Remembered(NamedTuple):
    """A state to roll back to: weights and statistics, the optimizer's tensors and numbers, and when that was."""

    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    numbers: dict[str, Any]
    clock: Clock
