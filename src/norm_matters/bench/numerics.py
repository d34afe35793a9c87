"""Where each norm breaks in few bits: its sigma, output and gradient in simulated formats against float64.

Every channel holds the same n standard normal values times a sigma of its own, and the output gradient is standard
normal too. What is compared with is the same norm on the same values in float64, so that what remains is the format's.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from norm_matters.core.errors import UserError, nearest
from norm_matters.norms import create_norm
from norm_matters.norms.batchwise import BATCH_OPTIONS, BatchwiseNorm
from norm_matters.norms.build import canonical_spec, resolve_spec
from norm_matters.norms.formats import Rounding, parse_format
from norm_matters.norms.reduce import Accumulator

NORMS = ("l2", "l1", "linf", "topk:k=10", "lp:p=3")
FORMATS = ("fp32", "fp16", "bf16", "e4m3", "e5m2")
ACCUMULATORS: tuple[Accumulator, ...] = ("fp32", "pairwise", "sequential")
SIGMAS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 1e1, 1e2, 1e3)

# An output or a gradient further off than this is called wrong: more than batches of a few thousand values differ by.
TOLERANCE = 0.05

Verdict = Literal["ok", "biased", "underflow", "overflow", "nan", "no gradient", "wrong gradient"]


class Measurement(NamedTuple):
    """One norm at one sigma.

    Attributes:
        norm: canonical spec.
        format, accumulator, rounding: how its statistics were taken.
        n: values per channel.
        sigma: of the values.
        ratio: the estimate of sigma over the one in float64.
        output_error, gradient_error: root of the mean squared error over that of what float64 gives; the gradient is
            that of the input.
        verdict: what broke, the worst first: "nan": the output is not finite; "overflow": sigma is infinite and the
            output 0; "no gradient": it is not finite; "underflow", "biased": the output is off by more than
            `TOLERANCE`, sigma being 0 or another; "wrong gradient": it is off by more, the output is not; else "ok"
            (also for a wrong sigma where eps is larger still).
    """

    norm: str
    format: str
    accumulator: str
    rounding: str
    n: int
    sigma: float
    ratio: float
    output_error: float
    gradient_error: float
    verdict: Verdict


class Outcome(NamedTuple):
    """What a norm makes of a batch: sigma (C,), the output and the input's gradient (n, C); float64."""

    sigma: Tensor
    output: Tensor
    gradient: Tensor


@dataclass(frozen=True)
class Case:
    """One norm in one arithmetic, to be measured at several sigmas.

    Attributes:
        norm, format, accumulator, rounding: as in `Measurement`.
        n: values per channel.
        sigmas: of the channels.
        device: where to compute.
    """

    norm: str
    format: str
    accumulator: Accumulator
    rounding: Rounding
    n: int
    sigmas: tuple[float, ...]
    device: str = "cpu"

    def measure(self, seed: int = 0) -> list[Measurement]:
        """Measure it at each sigma; stochastic rounding draws from torch's default generator.

        Args:
            seed: of the values and the output gradient.
        """
        draw = torch.Generator().manual_seed(seed)
        values, gradient = (torch.randn(self.n, generator=draw) for _ in range(2))
        x = (values[:, None] * torch.tensor(self.sigmas)).to(self.device)
        g = gradient.to(self.device)[:, None].expand_as(x)
        simulated = create_norm(
            self.norm,
            len(self.sigmas),
            stats_format=self.format,
            accumulator=self.accumulator,
            rounding=self.rounding,
            affine=False,
            track_running_stats=False,
        )
        exact = create_norm(self.norm, len(self.sigmas), affine=False, track_running_stats=False)
        got = _outcome(simulated, x, g)
        # On the host, for a device may have no float64.
        expected = _outcome(exact, x.cpu().double(), g.cpu().double())
        return [self._measurement(got, expected, channel) for channel in range(len(self.sigmas))]

    def _measurement(self, got: Outcome, expected: Outcome, channel: int) -> Measurement:
        ratio = float(got.sigma[channel] / expected.sigma[channel])
        output_error, gradient_error = (
            float((a[:, channel] - b[:, channel]).norm() / b[:, channel].norm())
            for a, b in zip(got[1:], expected[1:], strict=True)
        )
        verdict = judge(ratio, output_error, gradient_error)
        about = (self.norm, self.format, self.accumulator, self.rounding, self.n, self.sigmas[channel])
        return Measurement(*about, ratio, output_error, gradient_error, verdict)


def numerics_cases(
    norms: Sequence[str] = NORMS,
    formats: Sequence[str] = FORMATS,
    *,
    accumulators: Sequence[str] = ACCUMULATORS,
    sigmas: Sequence[float] = SIGMAS,
    n: int = 131_072,
    rounding: Rounding = "nearest",
    device: str = "cpu",
) -> list[Case]:
    """Every norm in every format with every accumulator.

    Args:
        norms: specs of batch norms that estimate sigma, without options of arithmetic.
        formats: names of number formats.
        accumulators: of "fp32", "pairwise" and "sequential".
        sigmas: of the values.
        n: values per channel.
        rounding: to the formats.
        device: where to compute.

    Raises:
        UserError: with a line for every argument that is not valid.
    """
    problems: list[str] = []
    chosen, named = [], []
    for spec in norms:
        try:
            chosen.append(_statistic(spec))
        except UserError as error:
            problems += [f"--norms: {problem}" for problem in error.problems]
    for name in formats:
        try:
            named.append(str(parse_format(name)))
        except UserError as error:
            problems += [f"--formats: {problem}" for problem in error.problems]
    for name in accumulators:
        if name not in ACCUMULATORS:
            problems.append(f"--accumulators: '{name}' is unknown{nearest(name, ACCUMULATORS)}")
    if n < 2:
        problems.append(f"--n: value '{n}' is not valid; it takes a whole number from 2")
    if problems:
        raise UserError(*problems)
    return [
        Case(norm, form, accumulator, rounding, n, tuple(sigmas), device)
        for norm in dict.fromkeys(chosen)
        for form in dict.fromkeys(named)
        for accumulator in ACCUMULATORS
        if accumulator in accumulators
    ]


def _statistic(spec: str) -> str:
    """The canonical spec of a batch norm that estimates sigma; UserError for any other."""
    norm, options = resolve_spec(spec)
    if not issubclass(norm, BatchwiseNorm) or norm.composite or not norm.estimates_sigma:
        raise UserError(f"'{spec}' has no sigma of its own over the batch; take one such as l1 or topk:k=10")
    shared = [key for key in options if key in BATCH_OPTIONS]
    if shared:
        raise UserError(f"'{spec}': {', '.join(shared)} cannot be given here")
    return canonical_spec(spec)


def judge(ratio: float, output_error: float, gradient_error: float) -> Verdict:
    """The verdict over what was measured; see `Measurement`."""
    if not math.isfinite(output_error) or math.isnan(ratio):
        return "nan"
    if math.isinf(ratio):
        return "overflow"
    if not math.isfinite(gradient_error):
        return "no gradient"
    if output_error > TOLERANCE:
        return "biased" if ratio else "underflow"
    return "ok" if gradient_error <= TOLERANCE else "wrong gradient"


def _outcome(norm: torch.nn.Module, x: Tensor, g: Tensor) -> Outcome:
    assert isinstance(norm, BatchwiseNorm)
    x = x.detach().requires_grad_()
    y, _, var = norm.normalise_batch(x)
    y.backward(g)
    assert x.grad is not None
    sigma, output, gradient = (value.detach().cpu().double() for value in (var.sqrt(), y, x.grad))
    return Outcome(sigma, output, gradient)
