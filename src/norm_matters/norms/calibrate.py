"""Running statistics taken anew from batches: after averaging weights, converting norms, or changing the data."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from norm_matters.norms.batchwise import BatchwiseNorm
from norm_matters.norms.l2 import L2Norm
from norm_matters.norms.selection import Patterns, Report, Row, norms_with

Variance = Literal["batch", "population"]


@dataclass(frozen=True)
class CalibrationReport(Report):
    """What `calibrate_norm` did.

    Attributes:
        batches: how many batches it was given.
        rejected: how many times a layer rejected a batch, because its statistics there were not finite.
    """

    batches: int
    rejected: int


@dataclass
class _Average:
    """The average over batches of a layer's mean and sigma squared, weighted by values, in float64 (C,).

    Attributes:
        batches: how many are in it.
        rejected: how many are not, since a statistic was not finite.
        values: values per channel in it.
        between: sum over values of the squared distance of their batch's mean from the average.
    """

    population: bool
    batches: int = 0
    rejected: int = 0
    values: int = 0
    mean: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    var: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    between: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))

    def add(self, mean: Tensor, var: Tensor, values: int) -> None:
        """Take in a batch with that mean and sigma squared (C,), of `values` values per channel."""
        # float64 is not on every device; the numbers are few.
        mean, var = mean.detach().cpu().double(), var.detach().cpu().double()
        if not (mean.isfinite().all() and var.isfinite().all()):
            self.rejected += 1
            return
        if self.population:
            # `l2` gives the unbiased estimate.
            var = var * ((values - 1) / values)
        total = self.values + values
        share, distance = values / total, mean - self.mean
        self.mean = self.mean + share * distance
        self.var = self.var + share * (var - self.var)
        self.between = self.between + self.values * share * distance.square()
        self.values, self.batches = total, self.batches + 1

    def result(self) -> tuple[Tensor, Tensor]:
        """Mean and sigma squared for evaluation."""
        return self.mean, self.var + self.between / self.values if self.population else self.var


def calibrate_norm(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    variance: Variance = "batch",
    include: Patterns = None,
    exclude: Patterns = None,
) -> CalibrationReport:
    """Take the running statistics of norms anew from batches, in place.

    The norms normalise by their batch, as in training, so that each layer sees what it saw there; all else is as in
    evaluation (no dropout). Running means and estimates of sigma squared become the averages over the batches, each
    weighted by its number of values per channel, accumulated in float64; `num_batches_tracked` becomes their number.
    Take batches of the training's size: what Linf or Top(k) estimate depends on it a little.

    Args:
        model: changed when all batches have been seen: an error or an interruption leaves it as it was.
        batches: images (N, ...), or tuples that begin with them, or objects with an attribute `images`; they are
            moved to the model's device.
        variance: "batch": average sigma squared; "population", for `l2` only: the variance of all values around their
            common mean, the variance between the batches included. It is n / (n - 1) smaller than an unbiased one.
        include, exclude: glob patterns of dotted names; other norms stay in evaluation mode.

    Returns:
        A row for each norm; `left` has those without running statistics, with frozen ones, or that saw no batch.

    Raises:
        ValueError: there is no batch, no norm to calibrate, none that saw a finite batch, or `variance` is unknown or
            not defined for a norm.
    """
    if variance not in ("batch", "population"):
        raise ValueError(f"variance={variance!r} must be 'batch' or 'population'")
    able, left = norms_with(model, "running_stats", "calibrate_norm", include, exclude)
    norms: dict[str, BatchwiseNorm] = {}
    for name, norm in able.items():
        assert isinstance(norm, BatchwiseNorm)
        if norm.stats_frozen:
            left.append(Row(name, norm.spec, norm.spec, "its statistics are frozen"))
        elif variance == "population" and not isinstance(norm, L2Norm):
            raise ValueError(f"layer '{name}' ({norm.spec}): variance='population' is defined for l2 only")
        else:
            norms[name] = norm
    averages = {name: _Average(variance == "population") for name in norms}
    count = _observe(model, norms, averages, batches)
    if count == 0:
        raise ValueError("calibrate_norm was given no batch")
    rows = []
    for name, norm in norms.items():
        average = averages[name]
        note = f"{average.batches} batches" + (f", {average.rejected} rejected" if average.rejected else "")
        if average.batches:
            rows.append(Row(name, norm.spec, norm.spec, note))
        else:
            note = f"all of its {average.rejected} batches were rejected" if average.rejected else "it saw no batch"
            left.append(Row(name, norm.spec, norm.spec, note))
    if not rows:
        raise ValueError(
            "calibrate_norm: " + "; ".join(f"layer '{row.name}' ({row.before}): {row.note}" for row in left[:3])
        )
    _store({norms[row.name]: averages[row.name] for row in rows})
    return CalibrationReport(rows, left, count, sum(average.rejected for average in averages.values()))


def _observe(
    model: nn.Module, norms: Mapping[str, BatchwiseNorm], averages: Mapping[str, _Average], batches: Iterable[Any]
) -> int:
    """Show the batches to the model and the norms' statistics to the averages; how many batches there were."""
    device = next((tensor.device for tensor in (*model.parameters(), *model.buffers())), torch.device("cpu"))
    count = 0
    with _calibration_mode(model, norms, averages), _without_compiled_code(model), torch.no_grad():
        for batch in batches:
            model(images_of(batch).to(device))
            count += 1
    return count


def images_of(batch: Any) -> Tensor:
    """The images of a batch: itself, its attribute `images`, or its first item.

    Raises:
        ValueError: none of them is a tensor.
    """
    images = getattr(batch, "images", batch)
    images = images[0] if isinstance(images, (tuple, list)) and images else images
    if not isinstance(images, Tensor):
        raise ValueError(f"a batch must be images, or begin with them, or have the attribute images; got {type(batch)}")
    return images


@contextlib.contextmanager
def _calibration_mode(
    model: nn.Module, norms: Mapping[str, BatchwiseNorm], averages: Mapping[str, _Average]
) -> Iterator[None]:
    """The given norms in training mode and observed, all else in evaluation mode; and all as it was at the end."""
    flags = {layer: layer.training for layer in model.modules()}
    cuda = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    # A norm may draw noise, and a DataLoader draws a seed.
    with torch.random.fork_rng(devices=cuda):
        try:
            model.eval()
            for name, norm in norms.items():
                # Not .train(): what is fused to the norm stays in evaluation mode.
                norm.training = True
                norm.observer = averages[name].add
            yield
        finally:
            for norm in norms.values():
                norm.observer = None
            for layer, training in flags.items():
                layer.training = training


def _without_compiled_code(model: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """Run a compiled model as it was written: its compiled code knows no observers."""
    compiled = any(hasattr(module, "_orig_mod") or module._compiled_call_impl is not None for module in model.modules())
    return torch.compiler.set_stance("force_eager") if compiled else contextlib.nullcontext()


@torch.no_grad()
def _store(averages: Mapping[BatchwiseNorm, _Average]) -> None:
    for norm, average in averages.items():
        assert norm.running_mean is not None
        assert norm.running_var is not None
        assert norm.num_batches_tracked is not None
        mean, var = average.result()
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(var)
        norm.num_batches_tracked.fill_(average.batches)
