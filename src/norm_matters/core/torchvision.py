"""The only import of torchvision.

Its wheel is built for CUDA; on a CPU build of torch its import fails because two compiled operators are missing.
Nothing here needs them, so their schemas are declared and the import is tried again; never before it failed,
or an install that has them would break.
"""

import torch

try:
    import torchvision
except RuntimeError as error:
    if "torchvision::nms does not exist" not in str(error):
        raise
    torch.library.define("torchvision::nms", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    torch.library.define("torchvision::qnms", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import torchvision

__all__ = ["torchvision"]
