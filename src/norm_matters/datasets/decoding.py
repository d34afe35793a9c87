"""What a worker does: the images of one batch, decoded and transformed.

What it returns are bytes in arrays, which travel through a pipe: tensors would go through /dev/shm, which is small in
containers, and need the worker's help to be opened, for which torch waits without a limit.
"""

import traceback
from collections.abc import Callable, MutableSequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset as MapDataset
from torch.utils.data import get_worker_info

from norm_matters.core import stopping
from norm_matters.core.errors import UserError
from norm_matters.core.faults import fault_point
from norm_matters.datasets.images import Images
from norm_matters.datasets.standing_in import UnreadableImageError, check_unreadable, stand_ins
from norm_matters.transforms.image import apply_own, evaluation_pixels, training_pixels
from norm_matters.transforms.preprocessing import Preprocessing

Transform = Callable[[Image.Image], Tensor]
Item = tuple[int, np.ndarray]


@dataclass(frozen=True)
class Failure:
    """A UserError on its way out of a worker: torch would wrap the exception itself in a page of traceback."""

    problems: tuple[str, ...]


@dataclass(frozen=True)
class Mended:
    """A batch in which others stand in for images that could not be read: name -> why."""

    batch: np.ndarray
    unreadable: dict[str, str]


class Reader(MapDataset[Any]):
    """Reads the images of one batch; nothing it returns depends on what it did before, or in which process."""

    def __init__(
        self,
        images: Images,
        preprocessing: Preprocessing,
        places: MutableSequence[int],
        *,
        train: bool,
        seed: int,
        transform: Transform | None,
        to_skip: int,
        interruptible: bool,
    ) -> None:
        self.images = images
        self.preprocessing = preprocessing
        self.places = places
        self.train = train
        self.seed = seed
        self.transform = transform
        self.to_skip = to_skip
        self.interruptible = interruptible

    def __getitem__(self, item: Item) -> np.ndarray | Mended | Failure:
        epoch, indices = item
        info = get_worker_info()
        worker = info.id if info else 0
        unreadable: dict[str, str] = {}
        try:
            tensors = []
            for index in map(int, indices):
                if info is None:
                    stop_if_asked(self.interruptible)
                self.places[worker] = index
                tensors.append(self._readable(epoch, index, unreadable))
            batch = self._stack(tensors)
            return Mended(batch, unreadable) if unreadable else batch
        except UserError as error:
            return Failure(error.problems)
        finally:
            self.places[worker] = -1

    def _readable(self, epoch: int, index: int, unreadable: dict[str, str]) -> Tensor:
        """The image, or the first that can be read of those that may stand in for it; what cannot is noted."""
        try:
            return self._tensor(epoch, index, index)
        except UnreadableImageError as error:
            if not self.to_skip:
                raise
            unreadable[self.images.name(index)] = str(error)
            for other in stand_ins(self.images.labels, index, seed=self.seed, epoch=epoch, count=self.to_skip):
                try:
                    return self._tensor(epoch, index, other)
                except UnreadableImageError as another:
                    unreadable[self.images.name(other)] = str(another)
            check_unreadable(unreadable, self.to_skip)
            raise

    def _tensor(self, epoch: int, index: int, source: int) -> Tensor:
        """An image as the network sees it, or another one treated as if it were that."""
        if self.transform is not None:
            return self._own(self._image(source)[0], self.transform, epoch, index)
        if not self.train:
            return evaluation_pixels(self._image(source)[0], self.preprocessing)

        def read(reduction: Callable[[int, int], int]) -> tuple[Image.Image, tuple[int, int]]:
            return self._image(source, reduction if self.preprocessing.draft else None)

        return training_pixels(read, self.preprocessing, seed=self.seed, epoch=epoch, index=index)

    def _image(
        self, index: int, reduction: Callable[[int, int], int] | None = None
    ) -> tuple[Image.Image, tuple[int, int]]:
        """An image and its full width and height."""
        try:
            fault_point("data", step=index)
            if reduction is not None:
                return self.images.reduced(index, reduction)
            image = self.images.image(index)
        except UserError as error:
            raise UnreadableImageError(*error.problems) from None
        except OSError as error:
            raise UnreadableImageError(f"{self.images.name(index)}: it cannot be read: {error.strerror}") from None
        return image, image.size

    def _own(self, image: Image.Image, transform: Transform, epoch: int, index: int) -> Tensor:
        # Evaluation is the same at every epoch, also where a transform draws.
        try:
            return apply_own(transform, image, seed=self.seed, epoch=epoch if self.train else 0, index=index)
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise UserError(
                f"input_transform failed on {self.images.name(index)}: {reason} ({place.filename}:{place.lineno})"
            ) from error

    def _stack(self, tensors: list[Tensor]) -> np.ndarray:
        if self.transform is None:
            return torch.stack([tensor.permute(1, 2, 0) for tensor in tensors]).numpy()
        shapes = {tuple(tensor.shape) for tensor in tensors}
        if len(shapes) > 1:
            shown = ", ".join(map(str, sorted(shapes)[:3]))
            raise UserError(f"input_transform returns images of different shapes ({shown}); a batch needs one")
        return torch.stack(tensors).numpy()


def stop_if_asked(interruptible: bool) -> None:
    """Raise StopRequestedError between two images where the run has been asked to stop.

    Args:
        interruptible: whether the caller can be stopped there.
    """
    if interruptible and stopping.requested():
        raise stopping.StopRequestedError
