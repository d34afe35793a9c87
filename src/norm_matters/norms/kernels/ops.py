"""The kernels as operations of torch: differentiable, and known to `torch.compile`, `torch.export` and dispatch modes.

Eager code calls a backend from an `autograd.Function`, which costs a third of an operation's dispatch in Python. Where
somebody looks on (a compiler, a dispatch mode, a tensor that is fake), the same functions are called through
`torch.ops.norm_matters.normalise`.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import is_functorch_wrapped_tensor
from torch.autograd import Function

from norm_matters.norms.base import activate
from norm_matters.norms.constants import constant_to_compiler
from norm_matters.norms.kernels import reference
from norm_matters.norms.kernels.dispatch import Backend, fast_backend, total_backend
from norm_matters.norms.kernels.estimator import Estimator
from norm_matters.norms.memory import fetch, is_saving, keep, offer

_SETTINGS = "str kind, float constant, int k, float eps, bool relu"
torch.library.define(
    "norm_matters::normalise",
    f"(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, {_SETTINGS}) -> (Tensor, Tensor)",
)
torch.library.define(
    "norm_matters::normalise_backward",
    f"(Tensor grad, Tensor x, Tensor? out, Tensor? weight, Tensor? bias, Tensor stats, {_SETTINGS}, "
    "bool has_residual) -> (Tensor, Tensor, Tensor, Tensor)",
)


def kernel_for(x: Tensor, estimator: Estimator | None) -> bool:
    """Whether a backend is faster than plain torch for this input."""
    if estimator is None:
        return False
    if torch.compiler.is_compiling():
        return _kernel_for_such(x.device.type, x.dtype, x.dim(), x.is_contiguous(), estimator.kind)
    # Transforms of torch.func (vmap, jvp) hand in wrappers that no kernel can read.
    return not is_functorch_wrapped_tensor(x) and fast_backend(x, estimator) is not None


@constant_to_compiler
def _kernel_for_such(device: str, dtype: torch.dtype, dim: int, contiguous: bool, kind: Any) -> bool:
    """`kernel_for` an input of that kind: what a compiler can ask without looking into the backends."""
    x = torch.empty([2] * dim, device=device, dtype=dtype)
    if not contiguous and dim in (4, 5):
        x = x.contiguous(memory_format=torch.channels_last if dim == 4 else torch.channels_last_3d)
    return fast_backend(x, Estimator(kind, k=1)) is not None


def normalise(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    estimator: Estimator,
    *,
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor]:
    """Normalise by a kernel; see `reference.forward`, whose arguments and results are the same.

    The gradients reach x, weight, bias and residual; the statistics carry none. Only x, and with `relu` and a residual
    the output, are kept for the backward pass.
    """
    weight, bias = _readable(weight, x), _readable(bias, x)
    if residual is not None:
        if residual.shape != x.shape or residual.dtype != x.dtype or residual.device != x.device:
            # Broadcast and promoted as torch does: the kernels read a residual that is as x.
            y, stats = normalise(x, weight, bias, None, estimator, eps=eps, relu=False)
            return activate(y, residual, relu=relu), stats
        if residual.stride() != x.stride():
            residual = torch.empty_like(x).copy_(residual)
    if _watched(x):
        return torch.ops.norm_matters.normalise(
            x, weight, bias, residual, estimator.kind, estimator.constant, estimator.k, eps, relu
        )
    return _Normalise.apply(x, weight, bias, residual, estimator, eps, relu)  # type: ignore[return-value]


def _readable(values: Tensor | None, x: Tensor) -> Tensor | None:
    """A weight or bias as the kernels, who are given addresses, read it: (C,) without gaps, on the device of x."""
    if values is None:
        return None
    if values.shape != x.shape[1:2] or values.device != x.device:
        raise ValueError(
            f"weight and bias must be {tuple(x.shape[1:2])} on {x.device}, got {tuple(values.shape)} on {values.device}"
        )
    return values.contiguous()


def _watched(x: Tensor) -> bool:
    """Whether somebody needs to see the operation as one of torch's."""
    return (
        torch.compiler.is_compiling()
        or type(x) not in (Tensor, nn.Parameter)
        or torch._C._len_torch_dispatch_stack() > 0  # pyright: ignore[reportAttributeAccessIssue]
    )


def _save(
    ctx: Any,
    inputs: tuple[Tensor, Tensor | None, Tensor | None, Tensor | None],
    output: tuple[Tensor, Tensor],
    *,
    estimator: Estimator,
    eps: float,
    relu: bool,
) -> None:
    x, weight, bias, residual = inputs
    y, stats = output
    # Grad mode is off in here, whatever it is outside.
    if any(ctx.needs_input_grad) and is_saving(recorded=True):
        _offer_again(inputs, y, stats, estimator, eps=eps, relu=relu)
    masked_by_output = relu and residual is not None
    ctx.mark_non_differentiable(stats)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, bias, stats, y if masked_by_output else None)
    ctx.estimator, ctx.eps, ctx.relu, ctx.has_residual = estimator, eps, relu, residual is not None


def _offer_again(
    inputs: tuple[Tensor, Tensor | None, Tensor | None, Tensor | None],
    y: Tensor,
    stats: Tensor,
    estimator: Estimator,
    *,
    eps: float,
    relu: bool,
) -> None:
    """Let the output be made again from the input and the statistics. (Before it is kept for its own mask.)"""
    x, weight, bias, residual = (None if tensor is None else tensor.detach() for tensor in inputs)
    assert x is not None
    held = keep(residual)
    backend = total_backend(x, estimator)
    offer(y, lambda: backend.apply(x, weight, bias, fetch(held), stats, eps=eps, relu=relu), x, weight, bias)


def _gradients(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of x, weight, bias and residual."""
    if grad is None:
        return None, None, None, None
    x, weight, bias, stats, out = ctx.saved_tensors
    estimator: Estimator = ctx.estimator
    masks_residual = ctx.relu and ctx.has_residual
    if grad.stride() != x.stride():
        grad = torch.empty_like(x).copy_(grad)
    arguments = (grad, x, out, weight, bias)
    if torch.is_grad_enabled():
        # Somebody wants second derivatives.
        options = {"eps": ctx.eps, "relu": ctx.relu, "has_residual": masks_residual}
        found = reference.backward(*arguments, reference.measure(x, estimator), estimator, **options)
        dx, dweight, dbias, dresidual = found
    elif _watched(x):
        dx, dweight, dbias, dresidual = torch.ops.norm_matters.normalise_backward(
            *arguments, stats, estimator.kind, estimator.constant, estimator.k, ctx.eps, ctx.relu, masks_residual
        )
    else:
        dx, dweight, dbias, dresidual = total_backend(x, estimator).backward(
            *arguments, stats, estimator, eps=ctx.eps, relu=ctx.relu, has_residual=masks_residual
        )
    return (
        dx,
        None if weight is None else dweight,
        None if bias is None else dbias,
        dresidual if masks_residual else grad if ctx.has_residual else None,
    )


class _Normalise(Function):
    # With a setup_context of its own, torch would look up the signature of `forward` at every call.
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        residual: Tensor | None,
        estimator: Estimator,
        eps: float,
        relu: bool,
    ) -> tuple[Tensor, Tensor]:
        output = total_backend(x, estimator).forward(x, weight, bias, residual, estimator, eps=eps, relu=relu)
        _save(ctx, (x, weight, bias, residual), output, estimator=estimator, eps=eps, relu=relu)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return *_gradients(ctx, grads[0]), None, None, None


@torch.library.impl("norm_matters::normalise", "CompositeExplicitAutograd")
def _normalise(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    kind: Any,
    constant: float,
    k: int,
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor]:
    estimator = Estimator(kind, constant, k)
    return total_backend(x, estimator).forward(x, weight, bias, residual, estimator, eps=eps, relu=relu)


@torch.library.register_fake("norm_matters::normalise")
def _normalise_fake(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    stats = x.new_empty((len(reference.STATS), x.shape[1]), dtype=torch.promote_types(x.dtype, torch.float32))
    return torch.empty_like(x), stats


def _setup_context(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, kind, constant, k, eps, relu = inputs
    _save(ctx, tuple(tensors), output, estimator=Estimator(kind, constant, k), eps=eps, relu=relu)


def _backward(ctx: Any, grad: Tensor | None, _: Any) -> Any:
    return *_gradients(ctx, grad), None, None, None, None, None


torch.library.register_autograd("norm_matters::normalise", _backward, setup_context=_setup_context)


@torch.library.impl("norm_matters::normalise_backward", "CompositeExplicitAutograd")
def _normalise_backward(
    grad: Tensor,
    x: Tensor,
    out: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    stats: Tensor,
    kind: Any,
    constant: float,
    k: int,
    eps: float,
    relu: bool,
    has_residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    estimator = Estimator(kind, constant, k)
    backend: Backend = total_backend(x, estimator)
    dx, dweight, dbias, dresidual = backend.backward(
        grad, x, out, weight, bias, stats, estimator, eps=eps, relu=relu, has_residual=has_residual
    )
    return dx, dweight, dbias, x.new_empty(0) if dresidual is None else dresidual


@torch.library.register_fake("norm_matters::normalise_backward")
def _normalise_backward_fake(
    grad: Tensor, x: Tensor, out: Any, weight: Any, bias: Any, stats: Tensor, *settings: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    has_residual = settings[-1]
    return (
        torch.empty_like(x),
        torch.empty_like(stats[0]),
        torch.empty_like(stats[0]),
        torch.empty_like(x) if has_residual else x.new_empty(0),
    )
