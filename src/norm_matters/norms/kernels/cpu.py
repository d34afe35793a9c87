"""The kernels for CPUs: C, in `c/`, built when the package is installed and called through ctypes.

Plain functions on addresses: no headers of torch or Python, and the interpreter's lock is free while they run. They
work on torch's own pool of OpenMP threads, as many as `torch.get_num_threads()` says. The best instructions the machine
has are chosen at run time; the environment variable NORM_MATTERS_SIMD (`avx512`, `avx2`, `baseline`) asks for others.
"""

import ctypes
import functools
import os
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch
from torch import Tensor

from norm_matters.core.errors import UserError
from norm_matters.norms.kernels.estimator import Estimator

INTERFACE = 1  # of c/interface.h
SIMD_VARIABLE = "NORM_MATTERS_SIMD"
_STATISTICS = {"mean": 0, "l1": 1, "l2": 2}
_CHANNELS_LAST, _BFLOAT, _RELU = 1, 2, 4
_DTYPES = {torch.float32: 0, torch.bfloat16: _BFLOAT}
_STATS_ROWS = 5
_NO_MEMORY = "no memory for the sums of a norm"


def reason_against(x: Tensor, estimator: Estimator) -> str | None:
    """Say in words why these kernels cannot normalise x (N, C, *) by this estimator, or None where they can."""
    library = _library()
    if isinstance(library, str):
        return library
    if estimator.kind not in _STATISTICS:
        return f"the C kernels have no '{estimator.kind}'"
    if x.device.type != "cpu":
        return f"the C kernels run on CPU, not on {x.device.type}"
    if x.dtype not in _DTYPES:
        return f"the C kernels work in float32 and bfloat16, not in {str(x.dtype).removeprefix('torch.')}"
    if x.ndim < 2 or x.numel() == 0:
        return f"the C kernels want values in at least two dimensions, not a shape of {tuple(x.shape)}"
    if not x.is_contiguous() and not _is_channels_last(x):
        return "the C kernels want a contiguous or channels_last input"
    return None


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    estimator: Estimator,
    *,
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor]:
    """Normalise x by the batch, add the residual and apply ReLU, as far as they are asked for.

    Args:
        x: (N, C, *), float32 or bfloat16, contiguous or channels_last; nothing `reason_against` speaks of.
        weight, bias: (C,) float32; None for ones and zeros.
        residual: shape, dtype and layout of x.
        estimator: of sigma.
        eps: added to sigma squared.
        relu: whether max(., 0) comes last.

    Returns:
        y (shape, dtype and layout of x) and stats, float32 (5, C): mean, sigma, sum of sigma's slope, zeros, zeros.
    """
    y = torch.empty_like(x)
    stats = torch.empty(_STATS_ROWS, x.shape[1])
    failed = _loaded().nm_forward(
        x.data_ptr(),
        _address(residual),
        y.data_ptr(),
        _address(weight),
        _address(bias),
        stats.data_ptr(),
        *_geometry(x, relu),
        _STATISTICS[estimator.kind],
        estimator.constant,
        eps,
        torch.get_num_threads(),
    )
    if failed:
        raise MemoryError(_NO_MEMORY)
    return y, stats


def apply(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    stats: Tensor,
    *,
    eps: float,
    relu: bool,
) -> Tensor:
    """The y of `forward`, by statistics taken before: the same to the bit."""
    y = torch.empty_like(x)
    failed = _loaded().nm_apply(
        x.data_ptr(),
        _address(residual),
        y.data_ptr(),
        _address(weight),
        _address(bias),
        stats.data_ptr(),
        *_geometry(x, relu),
        eps,
        torch.get_num_threads(),
    )
    if failed:
        raise MemoryError(_NO_MEMORY)
    return y


def backward(
    grad: Tensor,
    x: Tensor,
    out: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    stats: Tensor,
    estimator: Estimator,
    *,
    eps: float,
    relu: bool,
    has_residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Differentiate `forward`.

    Args:
        grad: of y; shape, dtype and layout of x.
        x, weight, bias, stats, estimator, eps, relu: of the forward pass.
        out: y, where there was a residual and ReLU; else ReLU's mask is made again from x.
        has_residual: whether there were both.

    Returns:
        The gradients of x, weight, bias and residual (None unless `has_residual`).
    """
    dx = torch.empty_like(x)
    dresidual = torch.empty_like(x) if has_residual else None
    dweight, dbias = torch.empty_like(stats[0]), torch.empty_like(stats[0])
    failed = _loaded().nm_backward(
        grad.data_ptr(),
        x.data_ptr(),
        _address(out) if has_residual else None,
        dx.data_ptr(),
        _address(dresidual),
        _address(weight),
        _address(bias),
        stats.data_ptr(),
        dweight.data_ptr(),
        dbias.data_ptr(),
        *_geometry(x, relu),
        _STATISTICS[estimator.kind],
        estimator.constant,
        eps,
        torch.get_num_threads(),
    )
    if failed:
        raise MemoryError(_NO_MEMORY)
    return dx, dweight, dbias, dresidual


def simd_names() -> list[str]:
    """The instruction sets that the kernels can use here, the best first; none where there are no kernels."""
    if isinstance(_library(), str):
        return []
    before = current_simd()
    names = [name for name in ("avx512", "avx2", "baseline") if _loaded().nm_use_simd(name.encode())]
    use_simd(before)
    return names


def current_simd() -> str:
    """The instruction set in use, one of `simd_names`."""
    return _loaded().nm_current_simd().decode()


def use_simd(name: str | None) -> str:
    """Use an instruction set from now on, in all threads: one of `simd_names`, or None for the best; returns its name.

    Raises:
        UserError: this machine or this build has not got it.
    """
    used = _loaded().nm_use_simd(None if name is None else name.encode())
    if used is None:
        raise UserError(f"{SIMD_VARIABLE}={name}: not on this machine, which has {', '.join(simd_names())}")
    return used.decode()


def _geometry(x: Tensor, relu: bool) -> tuple[int, int, int, int]:
    """Images, channels, pixels, flags."""
    images, channels = x.shape[:2]
    flags = _DTYPES[x.dtype] | (_RELU if relu else 0) | (0 if x.is_contiguous() else _CHANNELS_LAST)
    return images, channels, x.numel() // (images * channels), flags


def _is_channels_last(x: Tensor) -> bool:
    return (x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)) or (
        x.ndim == 5 and x.is_contiguous(memory_format=torch.channels_last_3d)
    )


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _loaded() -> ctypes.CDLL:
    library = _library()
    assert not isinstance(library, str), library
    return library


@functools.cache
def _library() -> ctypes.CDLL | str:
    """Load the kernels and hand them torch's threads; or say why not."""
    paths = [Path(__file__).with_name(f"cpu_kernels{suffix}") for suffix in EXTENSION_SUFFIXES]
    path = next((path for path in paths if path.exists()), None)
    if path is None:
        return "the C kernels were not built: no C compiler that works at install"
    try:
        library = ctypes.CDLL(str(path))
        interface = library.nm_interface()
    except (OSError, AttributeError) as error:
        return f"the C kernels do not load: {error}"
    if interface != INTERFACE:
        return "the C kernels were built from other sources than these: install the package anew"
    _declare(library)
    _share_threads(library)
    wanted = os.environ.get(SIMD_VARIABLE)
    if library.nm_use_simd(wanted.encode() if wanted else None) is None:
        return f"{SIMD_VARIABLE}={wanted}: the C kernels have no such instructions on this machine"
    return library


def _declare(library: ctypes.CDLL) -> None:
    pointer, size, integer, number = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_double
    geometry = [*[size] * 3, integer]
    library.nm_forward.argtypes = [*[pointer] * 6, *geometry, integer, number, number, integer]
    library.nm_apply.argtypes = [*[pointer] * 6, *geometry, number, integer]
    library.nm_backward.argtypes = [*[pointer] * 10, *geometry, integer, number, number, integer]
    library.nm_use_openmp.argtypes, library.nm_use_openmp.restype = [pointer] * 3, None
    library.nm_current_simd.argtypes, library.nm_current_simd.restype = [], ctypes.c_char_p
    library.nm_use_simd.argtypes, library.nm_use_simd.restype = [ctypes.c_char_p], ctypes.c_char_p


def _share_threads(library: ctypes.CDLL) -> None:
    """Hand over the OpenMP runtime that torch itself is linked with: other packages may have brought others."""
    names = "GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads"
    try:
        runtime = ctypes.CDLL(torch._C.__file__)  # looks through what torch is linked with, too
        functions = [ctypes.cast(getattr(runtime, name), ctypes.c_void_p) for name in names]
    except (OSError, AttributeError):
        return  # a torch without OpenMP: the kernels stay on the caller's thread
    library.nm_use_openmp(*functions)
