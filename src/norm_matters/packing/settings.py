"""What a packed dataset is to be like."""

import re
from dataclasses import dataclass
from typing import Literal

from norm_matters.core.errors import UserError

Format = Literal["webdataset", "parquet"]
BadImages = Literal["refuse", "skip", "keep"]

FORMATS: tuple[Format, ...] = ("webdataset", "parquet")
BAD_IMAGES: tuple[BadImages, ...] = ("refuse", "skip", "keep")
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class PackSettings:
    """How a dataset is packed.

    Attributes:
        format: webdataset (tar) or parquet.
        resize: images whose shorter side is longer than so many pixels are resized to it, and stored as JPEG; None:
            every image is copied as it is, byte for byte.
        quality: of those JPEGs, 1 to 100.
        shard_bytes: a shard ends before its images take more than this; one image at least is in each.
        shard_images: a shard has no more images than this; None: no limit.
        seed: of the order of the training images.
        bad_images: of images that cannot be decoded: refuse to pack, skip them, or keep all without decoding any.
    """

    format: Format = "webdataset"
    resize: int | None = None
    quality: int = 90
    shard_bytes: int = 256 * 10**6
    shard_images: int | None = None
    seed: int = 0
    bad_images: BadImages = "refuse"

    def __post_init__(self) -> None:
        problems = []
        if self.format not in FORMATS:
            problems.append(f"--format: value '{self.format}' is not valid; it takes {' or '.join(FORMATS)}")
        if self.resize is not None and not 1 <= self.resize <= 65_500:
            problems.append(f"--resize: value {self.resize} is not valid; it takes a number of pixels from 1 to 65500")
        if not 1 <= self.quality <= 100:
            problems.append(f"--quality: value {self.quality} is not valid; it takes a whole number from 1 to 100")
        if self.shard_bytes < 1:
            problems.append(f"--shard-size: value {self.shard_bytes} is not valid; it takes a size such as 256MB")
        if self.shard_images is not None and self.shard_images < 1:
            problems.append(f"--images-per-shard: value {self.shard_images} is not valid; it takes a number from 1")
        if self.bad_images not in BAD_IMAGES:
            problems.append(f"--bad-images: value '{self.bad_images}' is not valid; it takes {', '.join(BAD_IMAGES)}")
        if self.resize and self.bad_images == "keep":
            problems.append("--bad-images: value 'keep' is not valid with --resize, which decodes every image")
        if problems:
            raise UserError(*problems)


def parse_bytes(text: str) -> int:
    """A number of bytes, such as 256MB (10^6) or 1GiB (2^30).

    Raises:
        UserError: it is none.
    """
    match = re.fullmatch(r"\s*(\d{1,12}(?:\.\d{1,6})?)\s*([A-Za-z]*)\s*", text)
    if not match or match[2].upper() not in _UNITS:
        raise UserError(f"--shard-size: value '{text}' is not valid; it takes a size such as 256MB or 1GiB")
    return int(float(match[1]) * _UNITS[match[2].upper()])
