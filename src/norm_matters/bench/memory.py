"""Bytes: what a forward pass keeps, the most that is alive at once, the fewest a norm has to move, and how fast."""

import os
import time
from collections.abc import Callable, Iterable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

Form = Literal["plain", "relu", "add_relu"]
CACHE = 2**20
"""Bytes of a core's own cache, in which a channel of all images is taken to stay between two passes."""
_COPIED = 2**28  # bytes: more than any cache holds
_READS_FORWARD = {"l1": 3, "l2": 2, "linf": 2, "topk": 2, "mean": 2}


class Passes(NamedTuple):
    """How often tensors of the input's size are read and written."""

    forward_reads: int
    forward_writes: int
    backward_reads: int
    backward_writes: int


def fewest_passes(norm: str, form: Form, *, cached: bool) -> Passes | None:
    """The passes over memory that a norm cannot do without, forward and backward.

    Forward, the output depends on all values of the channel, so these are read for the statistics and again for the
    output. The mean comes in the same pass as the sum of the squares, the extremes, or the k largest and smallest
    values; the mean absolute deviation (l1) needs the mean first: one pass more. Backward, gradient and input are read
    for the sums and again for the input's gradient; without a sigma and a weight (mean) the input is not needed, but
    for the mask of a ReLU. That mask is made again from the input; with an addition it is taken from the output, which
    is read once, while the residual's gradient is written, and this is read then in place of the output's gradient.

    Args:
        norm: its name, without options.
        form: alone, with a ReLU, or with an addition and a ReLU.
        cached: whether a channel stays in the cache, where reading it again costs nothing.

    Returns:
        The passes; None for a norm that nobody has counted them for.
    """
    if norm not in _READS_FORWARD:
        return None
    added = int(form == "add_relu")
    inputs = 1 if norm == "mean" and form != "relu" else 2
    return Passes((1 if cached else _READS_FORWARD[norm]) + added, 1, inputs * (1 if cached else 2) + added, 1 + added)


def channel_is_cached(x: Tensor) -> bool:
    """Whether a channel of x (N, C, *) over all images is one that stays in a cache: rows of it, and few enough.

    In channels_last no channel lies by itself.
    """
    return x.is_contiguous() and x.numel() // x.shape[1] * x.itemsize <= CACHE


def copy_bandwidth(device: str = "cpu") -> float:
    """Bytes per second, read and written, of copying a large tensor: the best of three runs."""
    source = torch.zeros(_COPIED // 4, device=device)
    target = torch.empty_like(source)
    wait = synchroniser(device)
    seconds = []
    for _ in range(4):  # the first maps the pages
        wait()
        start = time.perf_counter()
        target.copy_(source)
        wait()
        seconds.append(time.perf_counter() - start)
    return 2 * _COPIED / min(seconds[1:])


def synchroniser(device: str) -> Callable[[], None]:
    """What waits until the device has done its work."""
    return torch.cuda.synchronize if device.startswith("cuda") else lambda: None


def kept_bytes(forward: Callable[[], Tensor], parameters: Iterable[Tensor] = ()) -> int:
    """The bytes that a forward pass keeps for its backward pass: those of all storages that autograd saves a tensor of.

    Each storage counts once and whole. The input counts if it is saved, as does the output; parameters do not.

    Args:
        forward: gives the output.
        parameters: left out.
    """
    left_out = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    sizes: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(note, lambda tensor: tensor):
        output = forward()
    del output
    return sum(size for address, size in sizes.items() if address not in left_out)


def peak_bytes(call: Callable[[], object], device: str = "cpu") -> int:
    """The largest sum of bytes that torch's allocator has handed out during a call and not got back.

    What was there before does not count. On CPU from the record of torch's profiler, which notes each allocation and
    each return, so that a temporary counts that lives inside one operation; memory that C code takes for itself does
    not count. On CUDA from the allocator's own peak, in its blocks of 512 bytes.

    Args:
        call: must return nothing to the allocator that it had before.
        device: where it allocates.
    """
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler writes to stderr when it starts and stops
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    assert profile.profiler is not None
    assert profile.profiler.kineto_results is not None
    events: list[Any] = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak
