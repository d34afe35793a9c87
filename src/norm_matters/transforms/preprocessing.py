"""What is done to an image between its file and the network, as plain data that a checkpoint can hold."""

from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from math import isfinite
from typing import Any, Literal, get_args

from norm_matters.core.errors import UserError

Crop = Literal["none", "pad", "inception"]
MAX_SIZE = 2**14
"""Pixels of the largest side that anything has here."""


@dataclass(frozen=True)
class Preprocessing:
    """The transforms of a run and their numbers.

    Attributes:
        channels: 3 (RGB) or 1 (gray).
        input_size: side of the square that the network sees, in pixels.
        mean: per channel, of pixels in [0, 1]; subtracted.
        std: per channel, of pixels in [0, 1]; divided by.
        crop: in training: `pad` (zeros around the image, random crop of the batch), `inception` (random part of
            each image, resized), or `none`.
        pad: pixels added on each side by `crop="pad"`.
        flip: whether training mirrors half of the images.
        resize: what the shorter side of an encoded image is resized to before the centre crop, in pixels.
        cutout: side of the square that training sets to the mean in each image, in pixels; 0 for none.
        draft: whether training decodes a large JPEG at 1/2, 1/4 or 1/8 of its size where that is all it needs.

    Raises:
        ValueError: for numbers that do not fit together.
    """

    channels: int
    input_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop: Crop
    pad: int
    flip: bool
    resize: int
    cutout: int = 0
    draft: bool = False

    def __post_init__(self) -> None:
        if self.channels not in (1, 3):
            raise ValueError(f"{self.channels} channels; images have 1 or 3")
        sizes = (self.input_size, self.pad, self.resize, self.cutout)
        if not all(type(size) is int and 0 <= size <= MAX_SIZE for size in sizes) or not self.input_size:
            raise ValueError(f"input_size, pad, resize and cutout {sizes} are no numbers of pixels up to {MAX_SIZE}")
        if not all(isinstance(value, int | float) and isfinite(value) for value in (*self.mean, *self.std)):
            raise ValueError(f"mean {self.mean} and std {self.std} are no numbers")
        if not (self.channels == len(self.mean) == len(self.std)):
            raise ValueError(f"{self.channels} channels, but mean {self.mean} and std {self.std}")
        if self.crop not in get_args(Crop):
            raise ValueError(f"crop '{self.crop}' is none of {', '.join(get_args(Crop))}")
        if self.resize < self.input_size:
            raise ValueError(f"resize {self.resize} is smaller than the centre crop of {self.input_size}")
        if not 0 <= self.cutout <= self.input_size:
            raise ValueError(f"cutout {self.cutout} does not fit into images of {self.input_size} pixels")

    def to_json(self) -> dict[str, Any]:
        """The fields as a dict that `json` can write; `from_json` reads it back equal."""
        return asdict(self) | {"mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Preprocessing":
        """Read what `to_json` wrote, now or before there were the fields with a default.

        Raises:
            UserError: for a missing or an extra key.
        """
        names = {field.name for field in fields(cls)}
        needed = {field.name for field in fields(cls) if field.default is MISSING}
        if wrong := (needed - set(value)) | (set(value) - names):
            raise UserError(f"preprocessing: missing or unknown keys: {', '.join(sorted(wrong))}")
        return cls(**{**value, "mean": tuple(value["mean"]), "std": tuple(value["std"])})
