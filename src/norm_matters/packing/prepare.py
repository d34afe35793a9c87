"""One image on its way into a shard: looked at, and resized where that is asked for."""

import io
import re
from collections.abc import Sequence
from pathlib import PurePath
from typing import NamedTuple, final

import numpy as np
from PIL import Image

from norm_matters.core.errors import UserError
from norm_matters.datasets.images import FORMATS, Images, decode_image
from norm_matters.packing.settings import PackSettings

# Images that a process prepares at a time.
CHUNK = 16
ENDING = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "BMP": "bmp", "GIF": "gif", "PPM": "ppm", "TIFF": "tiff"}


class Prepared(NamedTuple):
    """An image as it is to be stored, or what is wrong with it.

    Attributes:
        key: number in the source, and the beginning of the name there.
        ending: of a file's name, for its format.
        problem: empty where there is none.
    """

    key: str
    ending: str
    content: bytes
    label: int
    problem: str


@final
class Preparing:
    """The task of a worker: prepares the images of one chunk of an order.

    Args:
        order: numbers of the images.
    """

    def __init__(self, images: Images, order: np.ndarray, settings: PackSettings) -> None:
        self.images, self.order, self.settings = images, order, settings

    def __len__(self) -> int:
        """How many chunks there are."""
        return -(-len(self.order) // CHUNK)

    def __call__(self, chunk: int) -> Sequence[Prepared]:
        """The images of a chunk."""
        return [self._one(int(index)) for index in self.order[chunk * CHUNK : (chunk + 1) * CHUNK]]

    def _one(self, index: int) -> Prepared:
        name = self.images.name(index)
        stem = re.sub(r"[^A-Za-z0-9_-]", "_", PurePath(name).name.partition(".")[0])[:48]
        key, label = f"{index:08}-{stem}", int(self.images.labels[index])
        try:
            content = self.images.content(index)
            if not content:
                raise UserError(f"{name}: the file is empty")
            if self.settings.bad_images == "keep":
                return Prepared(key, _ending(content), content, label, "")
            image = decode_image(content, 3, name=name)
            resize = self.settings.resize
            if resize and min(image.size) > resize:
                return Prepared(key, "jpg", _resized(image, resize, self.settings.quality), label, "")
            return Prepared(key, _ending(content), content, label, "")
        except UserError as error:
            return Prepared(key, "", b"", label, "; ".join(error.problems))


def _resized(image: Image.Image, side: int, quality: int) -> bytes:
    width, height = image.size
    scale = side / min(width, height)
    size = max(side, round(width * scale)), max(side, round(height * scale))
    buffer = io.BytesIO()
    image.resize(size, Image.Resampling.LANCZOS).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def _ending(content: bytes) -> str:
    """The ending for an image's format; one that cannot be told is called a JPEG."""
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            return ENDING.get(image.format or "", "jpg")
    except Exception:  # Pillow raises nearly anything on damaged input
        return "jpg"
