"""What the measurements on this machine depend on, besides the machine."""

import torch

from norm_matters.core.allocator import keep_pages
from norm_matters.norms.kernels import cpu
from norm_matters.norms.kernels.dispatch import available_backends


def machine_facts() -> dict[str, str]:
    """Kernel backends, the C kernels' instructions, torch's threads and the allocator, in words.

    malloc keeps its pages from here on, as it does in training and in all that is measured.
    """
    facts = {
        f"kernels: {backend.name}": f"yes, on {backend.device}" if backend.reason is None else f"no: {backend.reason}"
        for backend in available_backends()
    }
    names = cpu.simd_names()
    facts["instructions of the C kernels"] = f"{cpu.current_simd()}, of {', '.join(names)}" if names else "none"
    facts["torch"] = f"{torch.__version__}, {torch.get_num_threads()} threads"
    facts["allocator"] = keep_pages() or "left as it is: not glibc's malloc, or set up by the environment"
    return facts
