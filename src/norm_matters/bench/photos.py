"""Made-up photographs: smooth on every scale, with a camera's noise, to cost what real ones cost to decode."""

from pathlib import Path

import numpy as np
from PIL import Image

from norm_matters.core.seeding import derive_seed
from norm_matters.record.files import make_folder

# Cells across the image, and how far the brightness of each strays from the mean: large shapes strongly, detail less.
OCTAVES = ((3, 60), (8, 35), (24, 22), (70, 14), (160, 10))
COLOUR = 0.4
NOISE = 10
QUALITY = 90


def make_photo(width: int, height: int, *, seed: int) -> Image.Image:
    """One RGB image: noise on several scales, each made smooth by enlarging it, mostly gray, and fine noise on top."""
    draw = np.random.default_rng(derive_seed(seed, "photo"))
    pixels = np.full((height, width, 3), 128, np.float32)
    for cells, strength in OCTAVES:
        rows = max(2, cells * height // width)
        values = draw.normal(size=(rows, cells, 1)) + COLOUR * draw.normal(size=(rows, cells, 3))
        for channel in range(3):
            small = Image.fromarray(values[..., channel].astype(np.float32))
            pixels[..., channel] += strength * np.asarray(small.resize((width, height), Image.Resampling.BICUBIC))
    pixels += draw.normal(scale=NOISE, size=(height, width, 1))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def write_photos(folder: Path, count: int, *, width: int = 500, height: int = 375, classes: int = 2) -> None:
    """Write `count` JPEG files into `FOLDER/CLASS/`, for `imagefolder:FOLDER`; about 80 kB each at 500x375."""
    for number in range(count):
        path = folder / f"class{number % classes}" / f"{number:05}.jpg"
        make_folder(path.parent)
        make_photo(width, height, seed=number).save(path, "JPEG", quality=QUALITY)
