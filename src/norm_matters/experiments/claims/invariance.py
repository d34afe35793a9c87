"""The identities behind the paper, in float64: nothing here is statistical but the last."""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from norm_matters.experiments.claims.decide import identity, together
from norm_matters.experiments.claims.recipe import Claim, Evidence, Recipe, Scale, Table, Verdict

if TYPE_CHECKING:
    from torch import Tensor

EXACT = 1e-10
_NORMS = ("l2", "l1", "linf", "topk:k=10", "lp:p=3")
_IMAGES, _INPUTS, _CHANNELS, _STEPS = 96, 12, 5, 200
_LRS, _DECAYS, _MOMENTA = (0.05, 0.2), (5e-4, 5e-3), (0.5, 0.9)


def _gradient(norm: str) -> "Callable[[Tensor], tuple[float, Tensor]]":
    """A loss of weights (C, inputs) that a norm without eps follows: its value and gradient, in float64."""
    import torch

    from norm_matters.norms import create_norm

    draw = torch.Generator().manual_seed(0)
    x = torch.randn(_IMAGES, _INPUTS, generator=draw, dtype=torch.float64)
    target = torch.randn(_IMAGES, generator=draw, dtype=torch.float64)
    readout = torch.randn(_CHANNELS, generator=draw, dtype=torch.float64)
    layer = create_norm(norm, _CHANNELS, eps=0.0, affine=False, track_running_stats=False)

    def of(weight: "Tensor") -> "tuple[float, Tensor]":
        weight = weight.detach().requires_grad_()
        out = torch.relu(layer(x @ weight.t())) @ readout
        loss = (out - target).square().mean()
        (gradient,) = torch.autograd.grad(loss, weight)
        return float(loss.detach()), gradient

    return of


def _start() -> "Tensor":
    import torch

    return torch.randn(_CHANNELS, _INPUTS, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def _direction(weight: "Tensor") -> "Tensor":
    return weight / weight.norm(dim=1, keepdim=True)


def _gap(a: "Tensor", b: "Tensor") -> float:
    """The largest difference of two sets of directions."""
    return float((_direction(a) - _direction(b)).abs().max())


def scale_invariance(norm: str) -> float:
    """Largest error of `L(s w) = L(w)`, `grad(s w) = grad(w) / s` and `w . grad = 0`, per channel."""
    import torch

    gradient, weight = _gradient(norm), _start()
    loss, slope = gradient(weight)
    scales = torch.tensor([0.01, 0.3, 1.0, 7.0, 100.0], dtype=torch.float64)[:, None]
    scaled_loss, scaled_slope = gradient(weight * scales)
    errors = [abs(scaled_loss - loss), float((scaled_slope * scales - slope).abs().max())]
    errors.append(float((weight * slope).sum(1).abs().max()))
    return max(errors)


def direction_step(norm: str, lr: float) -> float:
    """Largest error of: a step from `s w` with LR `s^2 lr` turns the direction as a step from w with LR lr does."""
    gradient, weight = _gradient(norm), _start()
    plain = weight - lr * gradient(weight)[1]
    return max(_gap(plain, scale * weight - scale**2 * lr * gradient(scale * weight)[1]) for scale in (0.1, 3.0, 50.0))


def lr_correction(norm: str, lr: float, decay: float, *, factor: bool = True) -> float:
    """Largest gap of directions between SGD with weight decay and SGD without, at the corrected LR of each channel.

    Args:
        factor: divide by `1 - lr * decay`, as the exact identity has it; the paper's formula does not.
    """
    gradient = _gradient(norm)
    decayed, plain, gap = _start(), _start(), 0.0
    for _ in range(_STEPS):
        ratio = plain.norm(dim=1, keepdim=True) ** 2 / decayed.norm(dim=1, keepdim=True) ** 2
        own = lr * ratio / ((1 - lr * decay) if factor else 1.0)
        plain = plain - own * gradient(plain)[1]
        decayed = decayed - lr * (gradient(decayed)[1] + decay * decayed)
        gap = max(gap, _gap(plain, decayed))
    return gap


def exponential_lr(norm: str, lr: float, decay: float, momentum: float) -> float:
    """Largest gap of directions between SGD with momentum and decay and Li and Arora's form without decay.

    With alpha the larger root of `x^2 - (1 + m - lr * decay) x + m = 0`:
    `W' = W + (m / alpha^2) (W - W_before) - lr alpha^(-2t-1) grad(W)`, and `W_before = alpha W` at first. Li and Arora
    2020, arXiv 1910.07454.
    """
    gradient = _gradient(norm)
    middle = (1 + momentum - lr * decay) / 2
    alpha = middle + math.sqrt(middle**2 - momentum)
    decayed, velocity = _start(), 0.0 * _start()
    form, gap = _start(), 0.0
    before = alpha * form
    for step in range(_STEPS):
        velocity = momentum * velocity + gradient(decayed)[1] + decay * decayed
        decayed = decayed - lr * velocity
        pull = momentum / alpha**2 * (form - before) - lr * alpha ** (-2 * step - 1) * gradient(form)[1]
        form, before = form + pull, form
        gap = max(gap, _gap(form, decayed))
    return gap


def equilibrium_angle(lr: float, decay: float, momentum: float, *, steps: int) -> tuple[float, float]:
    """The mean angle per step of a random walk with decay at its equilibrium, and `sqrt(2 lr decay / (1 + m))`.

    The gradient is noise at a right angle to the weights, of a length that goes as 1 / |w|, as behind a norm.
    """
    import torch

    draw = torch.Generator().manual_seed(2)
    size = 2048
    weight = torch.randn(size, generator=draw, dtype=torch.float64)
    velocity, angles = torch.zeros_like(weight), []
    burn_in = math.ceil(5 * (1 - momentum) / (2 * lr * decay))
    for step in range(burn_in + steps):
        noise = torch.randn(size, generator=draw, dtype=torch.float64)
        unit = weight / weight.norm()
        gradient = (noise - (noise @ unit) * unit) / weight.norm()
        velocity = momentum * velocity + gradient + decay * weight
        after = weight - lr * velocity
        if step >= burn_in:
            cosine = float(after @ weight / (after.norm() * weight.norm()))
            angles.append(math.acos(min(1.0, cosine)))
        weight = after
    return math.fsum(angles) / len(angles), math.sqrt(2 * lr * decay / (1 + momentum))


def _compute(scale: str, device: str) -> list[Table]:
    rows: list[dict[str, Any]] = []

    def add(name: str, error: float, **settings: Any) -> None:
        rows.append({"identity": name, **{key: settings.get(key, "") for key in _KEYS}, "error": error})

    for norm in _NORMS:
        add("scale invariance", scale_invariance(norm), norm=norm)
        for lr in _LRS:
            add("direction step", direction_step(norm, lr), norm=norm, lr=lr)
    for lr in _LRS:
        for decay in _DECAYS:
            add("LR correction", lr_correction("l2", lr, decay), norm="l2", lr=lr, decay=decay)
            without = lr_correction("l2", lr, decay, factor=False)
            add("LR correction without its factor", without, norm="l2", lr=lr, decay=decay)
            for momentum in _MOMENTA:
                error = exponential_lr("l2", lr, decay, momentum)
                add("exact form with momentum", error, norm="l2", lr=lr, decay=decay, momentum=momentum)
    for momentum in (0.0, 0.9):
        measured, predicted = equilibrium_angle(0.1, 1e-2, momentum, steps=1000)
        error = abs(measured / predicted - 1)
        add("equilibrium angle", error, lr=0.1, decay=1e-2, momentum=momentum)
    note = (
        "Largest absolute error over all steps and channels: of losses and gradients, or of the directions of the "
        "weights; for the angle the relative error of its mean."
    )
    return [Table("identities", "Identities", rows, note)]


_KEYS = ("norm", "lr", "decay", "momentum")


def _decide(claim: str, name: str, tolerance: float, *, contrast: str = "") -> Callable[[Evidence], Verdict]:
    def decide(evidence: Evidence) -> Verdict:
        rows: Sequence[Any] = evidence.tables["identities"].rows
        errors = [row["error"] for row in rows if row["identity"] == name]
        sentence = ""
        if contrast:
            others = [row["error"] for row in rows if row["identity"] == contrast]
            sentence = (
                f"Without the factor 1 / (1 - lr lambda) the directions part by {min(others):.1e} to {max(others):.1e}."
            )
        return together(claim, [identity(name, max(errors), tolerance, n=len(errors))], sentence=sentence)

    return decide


def _claim(id: str, statement: str, name: str, tolerance: float = EXACT, *, contrast: str = "") -> Claim:
    rule = f"the largest error of all cases is at most {tolerance:.0e}"
    return Claim(id, statement, "", rule, (), _decide(id, name, tolerance, contrast=contrast))


RECIPE = Recipe(
    id="invariance",
    question="Do the identities hold on which the paper's account of weight decay rests?",
    claims=(
        _claim(
            "ID-SCALE",
            "Behind a norm the scale of a weight changes neither output nor loss, and the gradient goes as 1 / |w|.",
            "scale invariance",
        ),
        _claim("ID-STEP", "The direction is turned by lr / |w|^2, the effective step size.", "direction step"),
        _claim(
            "ID-CORRECTION",
            "SGD without weight decay takes the directions of SGD with it, at lr |w|^2 / |w_wd|^2 / (1 - lr lambda).",
            "LR correction",
            contrast="LR correction without its factor",
        ),
        _claim(
            "ID-MOMENTUM",
            "With momentum, an exponentially growing learning rate does the same.",
            "exact form with momentum",
        ),
        _claim(
            "ID-ANGLE",
            "At equilibrium a step turns a weight by sqrt(2 lr lambda / (1 + m)).",
            "equilibrium angle",
            0.01,
        ),
    ),
    differs="Weights of one layer behind a norm without eps, in float64; the angle is that of a random walk.",
    compute=_compute,
    scales={
        scale: Scale({}, 0, "", "The same at every scale: seconds on one core.")
        for scale in ("smoke", "small", "paper")
    },
)
