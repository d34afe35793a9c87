"""Runs the Triton kernels in a process of its own: whether they are interpreted is decided when Triton is imported.

python triton_worker.py run CASES RESULTS      computes the cases of a safetensors file by the interpreter
python triton_worker.py compile                 compiles what stands in its input, as JSON, for a GPU; needs none
"""

import json
import os
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

TYPES = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}


def arrange(x: Tensor, case: dict[str, Any]) -> Tensor:
    """In the case's dtype and layout."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return x.to(getattr(torch, case["dtype"])).contiguous(
        memory_format=formats[x.dim()] if case["channels_last"] else torch.contiguous_format
    )


def patch_once() -> None:
    """Have the interpreter take over Triton's language once, not at every call of a function: twice as fast."""
    import triton.language as tl
    from triton.runtime import interpreter

    scope, patch = getattr(interpreter, "_LangPatchScope", None), getattr(interpreter, "_patch_lang", None)
    if scope and patch:
        patch(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
        interpreter._patch_lang = lambda fn: scope()


def run(source: Path, target: Path) -> None:
    """Compute forward, apply and backward of each case, on tiles so small that every loop and edge is met."""
    os.environ["TRITON_INTERPRET"] = "1"
    from safetensors import safe_open
    from safetensors.torch import save_file

    from norm_matters.norms.kernels import triton as backend
    from norm_matters.norms.kernels.estimator import Estimator

    patch_once()
    warnings.simplefilter("ignore", RuntimeWarning)  # numpy's, of what is masked out and of NaN
    backend.TILE, backend.PROGRAMS_PER_SM, backend.BLOCK_PARTS, backend.BLOCK_CHANNELS = 32, 4, 2, 2
    found: dict[str, Tensor] = {}
    strides: dict[str, str] = {}
    with safe_open(source, "pt") as file:
        for name, case in json.loads(file.metadata()["cases"]).items():
            given = {key.split("/")[1]: file.get_tensor(key) for key in file.keys() if key.startswith(f"{name}/")}  # noqa: SIM118
            x, grad = arrange(given["x"], case), arrange(given["grad"], case)
            residual = arrange(given["residual"], case) if "residual" in given else None
            affine = (given.get("weight"), given.get("bias"))
            estimator = Estimator(case["kind"], case["constant"], case["k"])
            eps, relu = case["eps"], case["relu"]
            assert backend.reason_against(x, estimator) is None
            kept = [tensor.clone() for tensor in (x, grad) if tensor is not None]
            y, stats = backend.forward(x, *affine, residual, estimator, eps=eps, relu=relu)
            again = backend.apply(x, *affine, residual, stats, eps=eps, relu=relu)
            masked = relu and residual is not None
            dx, dweight, dbias, dresidual = backend.backward(
                grad, x, y if masked else None, *affine, stats, estimator, eps=eps, relu=relu, has_residual=masked
            )
            results = {"y": y, "stats": stats, "again": again, "dx": dx, "dweight": dweight, "dbias": dbias}
            if dresidual is not None:
                results["dresidual"] = dresidual
            for before, after in zip(kept, (x, grad), strict=True):
                assert torch.equal(before.nan_to_num(), after.nan_to_num()), f"{name}: an input was overwritten"
            for key, value in results.items():
                if key in ("y", "again", "dx", "dresidual"):
                    assert value.stride() == x.stride(), f"{name}: {key} has another layout"
                found[f"{name}/{key}"] = value.contiguous()
    save_file(found, target, strides)


def compile_for_gpu(cases: list[dict[str, Any]]) -> None:
    """Compile to machine code for an H100 every kernel that the cases would start."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler import compile as compile_kernel

    from norm_matters.norms.kernels import triton as backend
    from norm_matters.norms.kernels.estimator import Estimator

    compiled: dict[str, int] = {}

    def launch(kernel: Any, grid: Any, arguments: Any, constants: dict[str, Any], *, warps: int) -> None:
        signature: dict[str, str] = {}
        fixed: dict[tuple[int], Any] = {}
        aligned: dict[tuple[int], Any] = {}
        for place, (name, value) in enumerate(zip(kernel.arg_names, arguments, strict=False)):
            if value is None:
                signature[name], fixed[(place,)] = "constexpr", None
            elif isinstance(value, Tensor):
                signature[name], aligned[(place,)] = TYPES[value.dtype], [["tt.divisibility", 16]]
            else:
                signature[name] = "i32" if isinstance(value, int) else "fp32"
        for name, value in constants.items():
            signature[name], fixed[(kernel.arg_names.index(name),)] = "constexpr", value
        key = f"{kernel.fn.__name__} {signature} {fixed}"
        if key not in compiled:
            source = ASTSource(kernel, signature, fixed, aligned)
            binary = compile_kernel(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
            compiled[key] = len(binary.asm["cubin"])

    backend._launch = launch
    backend._multiprocessors = lambda device: 132
    for case in cases:
        x = arrange(torch.empty(case["shape"]), case)
        affine = torch.empty(x.shape[1])
        estimator = Estimator(case["kind"], case["constant"], case["k"])
        residual = x if case["residual"] else None
        _, stats = backend.forward(x, affine, affine, residual, estimator, eps=1e-5, relu=case["relu"])
        masked = case["relu"] and case["residual"]
        out = x if masked else None
        backend.backward(x, x, out, affine, affine, stats, estimator, eps=1e-5, relu=case["relu"], has_residual=masked)
    assert all(compiled.values())
    print(len(compiled))


if __name__ == "__main__":
    if sys.argv[1] == "run":
        run(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        compile_for_gpu(json.load(sys.stdin))
