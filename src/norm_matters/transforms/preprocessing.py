"""What is done to an image between its file and the network, as plain data that a checkpoint can hold."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

from norm_matters.core.errors import UserError

Crop = Literal["none", "pad", "inception"]


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

    def __post_init__(self) -> None:
        if not (self.channels == len(self.mean) == len(self.std)):
            raise ValueError(f"{self.channels} channels, but mean {self.mean} and std {self.std}")
        if self.crop not in get_args(Crop):
            raise ValueError(f"crop '{self.crop}' is none of {', '.join(get_args(Crop))}")
        if self.resize < self.input_size:
            raise ValueError(f"resize {self.resize} is smaller than the centre crop of {self.input_size}")

    def to_json(self) -> dict[str, Any]:
        """The fields as a dict that `json` can write; `from_json` reads it back equal."""
        return asdict(self) | {"mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Preprocessing":
        """Read what `to_json` wrote; UserError for a missing or an extra key."""
        names = {field.name for field in fields(cls)}
        if names != set(value):
            raise UserError(f"preprocessing: missing or unknown keys: {', '.join(sorted(names ^ set(value)))}")
        return cls(**{**value, "mean": tuple(value["mean"]), "std": tuple(value["std"])})
