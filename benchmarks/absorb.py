"""What inference gains when its norms are absorbed.

    OMP_NUM_THREADS=1 python benchmarks/absorb.py

A forward pass of a network with its norms and one without are taken in turn, 41 times. Times are the thread's own CPU
time, which other processes disturb least; the ratio is the median over the pairs, with its quartiles.

Measured 2026-11-22 on one of two cores of an Intel Xeon at 2.50 GHz with AVX-512, the other one busy, torch 2.13.0
CPU, one thread, l1 norms:

    network   layout               with (ms)  without (ms)  speed-up (quartiles)  norms  output difference
    resnet20  contiguous_format        269.8         244.7  1.11 (1.08 to 1.15)      21            4.3e-07
    resnet20  channels_last            195.6         173.5  1.15 (1.09 to 1.23)      21            8.0e-07
    resnet18  contiguous_format        538.2         518.0  1.04 (1.00 to 1.06)      20            3.1e-07
    resnet18  channels_last            429.6         407.4  1.06 (0.98 to 1.13)      20            5.8e-07

resnet20 has 128 images of 28 x 28 (norms are 8% of the time contiguous and 15% channels last, says torch's profiler),
resnet18 8 images of 224 x 224, whose convolutions have more to do per value.
"""

import copy
import statistics
import time

import torch
from torch import Tensor, nn

import norm_matters as nm
from norm_matters.core.torchvision import torchvision

ROUNDS = 41


def resnet20() -> tuple[nn.Module, Tensor]:
    """Ours, on a batch of 128 images as large as those of Fashion-MNIST."""
    return nm.create_model("resnet20", num_classes=10, norm="l1"), torch.randn(128, 3, 28, 28)


def resnet18() -> tuple[nn.Module, Tensor]:
    """torchvision's, converted, on a batch of 8 images of 224 x 224."""
    model = torchvision.models.resnet18()
    nm.convert_norm(model, "l1")
    return model, torch.randn(8, 3, 224, 224)


def forward_seconds(model: nn.Module, images: Tensor) -> float:
    """CPU seconds of one forward pass."""
    start = time.process_time()
    with torch.inference_mode():
        model(images)
    return time.process_time() - start


def main() -> None:
    """Measure and print."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    print("network   layout               with (ms)  without (ms)  speed-up (quartiles)  norms  output difference")
    for build in (resnet20, resnet18):
        for layout in (torch.contiguous_format, torch.channels_last):
            model, images = build()
            model, images = model.to(memory_format=layout), images.to(memory_format=layout)
            with torch.no_grad():
                model(images)
            absorbed = copy.deepcopy(model.eval())
            report = nm.absorb_norm(absorbed, images)
            pairs = [(forward_seconds(model, images), forward_seconds(absorbed, images)) for _ in range(ROUNDS + 2)]
            pairs = pairs[2:]  # the first ones also allocate
            low, middle, high = statistics.quantiles([before / after for before, after in pairs], n=4)
            before, after = (1000 * statistics.median(times) for times in zip(*pairs, strict=True))
            print(
                f"{build.__name__}  {str(layout).removeprefix('torch.'):18} {before:10.1f} {after:13.1f}  "
                f"{middle:.2f} ({low:.2f} to {high:.2f}) {report.count:7} {report.relative:18.1e}"
            )


if __name__ == "__main__":
    main()
