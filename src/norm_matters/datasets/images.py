"""Images with labels: pixels held in memory, or encoded files that are decoded on demand."""

import hashlib
import io
import os
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import final

import numpy as np
import torch
from PIL import Image
from PIL.JpegImagePlugin import JpegImageFile
from torch import Tensor

from norm_matters.core.errors import UserError
from norm_matters.datasets.names import Names
from norm_matters.datasets.order import Layout

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "PPM", "TIFF")
MAX_PIXELS = 50_000_000
# Images that are hashed at a time: few enough to stay in the cache.
CHUNK = 256
EXIF_ORIENTATION = 0x0112
# How the camera was held (EXIF 2.32, table 6) -> what puts the image upright.
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Of these, the ones that make width out of height.
TURNED = (5, 6, 7, 8)


def decode_image(source: str | Path | bytes, channels: int, *, name: str | None = None) -> Image.Image:
    """Decode one image, upright, as RGB or gray.

    The EXIF orientation is applied; of an animation the first frame is taken; 16-bit gray is scaled to 8 bits;
    what is transparent becomes white.

    Args:
        source: path of a file, or the bytes of one.
        channels: 3 for RGB, 1 for gray.
        name: what to call the image in messages; the path when not given.

    Returns:
        A PIL image of mode RGB or L.

    Raises:
        UserError: naming the image, where it is missing, damaged, of a format not in `FORMATS`, or has more than
            50 megapixels.
    """
    return decode_reduced(source, channels, lambda width, height: 1, name=name)[0]


def decode_reduced(
    source: str | Path | bytes, channels: int, reduction: Callable[[int, int], int], *, name: str | None = None
) -> tuple[Image.Image, tuple[int, int]]:
    """Decode one image as `decode_image` does, a JPEG at a fraction of its size where that is enough.

    A JPEG's blocks of 8x8 pixels can be decoded to 4x4, 2x2 or 1 in a fraction of the time. What comes out is close to
    the mean over the pixels that are left out, not equal to it.

    Args:
        reduction: takes width and height of the upright image, and says what both may be divided by: 1, 2, 4 or 8.

    Returns:
        The image, of a JPEG with sides divided and rounded up, and the width and height that it has in full.
    """
    name = name or ("image" if isinstance(source, bytes) else str(source))
    try:
        with warnings.catch_warnings():
            # Pillow warns of odd metadata and of sizes that are refused below anyway.
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise UserError(f"{name}: {image.width}x{image.height} pixels; 50 megapixels are the limit")
                width, height = image.size
                if isinstance(image, JpegImageFile):
                    turned = _orientation(image) in TURNED
                    factor = reduction(height, width) if turned else reduction(width, height)
                    if factor > 1:
                        image.draft(None, (width // factor, height // factor))
                image.load()
                orientation = _orientation(image)
                upright = image.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else image
                decoded = _to_mode(upright, "RGB" if channels == 3 else "L", name)
                return decoded, (height, width) if orientation in TURNED else (width, height)
    except Image.UnidentifiedImageError:
        raise UserError(f"{name}: no image of a known format ({', '.join(FORMATS)})") from None
    except Image.DecompressionBombError:
        raise UserError(f"{name}: too many pixels; 50 megapixels are the limit") from None
    except (MemoryError, UserError):
        raise
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged input
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise UserError(f"{name}: the image cannot be read: {reason}") from None


def _orientation(image: Image.Image) -> int | None:
    try:
        return image.getexif().get(EXIF_ORIENTATION)
    except Exception:  # damaged metadata says nothing of the pixels
        return None


def _to_mode(image: Image.Image, mode: str, name: str) -> Image.Image:
    if image.mode.startswith("I"):
        # Pillow clips on this conversion; 16-bit files come as I;16 or as I.
        bytes_ = (np.asarray(image).astype(np.int64).clip(0, 65535) + 128) // 257
        image = Image.fromarray(bytes_.astype(np.uint8))
    elif image.mode == "F":
        raise UserError(f"{name}: pixels are floating-point numbers; save it with 8 or 16 bits per channel")
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    # Where there is nothing to convert, Pillow would make a copy.
    return image if image.mode == mode else image.convert(mode)


class Images(ABC):
    """Images with labels, numbered from 0.

    Attributes:
        labels: int64 (N,), class of each image.
        layout: how they lie in large files; None where it does not matter in which order they are read.
    """

    labels: np.ndarray
    layout: Layout | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def image(self, index: int) -> Image.Image:
        """One image as PIL sees it, mode RGB or L."""

    def reduced(self, index: int, reduction: Callable[[int, int], int]) -> tuple[Image.Image, tuple[int, int]]:
        """One image, reduced where that saves work, and its full width and height; see `decode_reduced`."""
        image = self.image(index)
        return image, image.size

    def content(self, index: int) -> bytes:
        """One image encoded: as it is stored, or pixels as PNG."""
        buffer = io.BytesIO()
        self.image(index).save(buffer, "PNG")
        return buffer.getvalue()

    @abstractmethod
    def name(self, index: int) -> str:
        """What to call an image in messages."""

    @abstractmethod
    def subset(self, indices: np.ndarray) -> "Images":
        """The images of those numbers, in that order."""

    @abstractmethod
    def digest(self) -> str:
        """SHA-256 that changes when any image or label does (of files: when a name or a size does)."""


@final
class ResidentImages(Images):
    """Pixels of one size, held in memory.

    Args:
        pixels: uint8 (N, C, H, W); kept as channels_last, without a copy where they are that already.
        labels: (N,) class of each image.
        title: what to call the set in messages.
        digest: what `digest` returns, where it is known.
    """

    def __init__(self, pixels: Tensor, labels: np.ndarray, *, title: str, digest: str | None = None) -> None:
        assert pixels.dtype == torch.uint8
        assert pixels.ndim == 4
        assert len(pixels) == len(labels)
        self.pixels = pixels.contiguous(memory_format=torch.channels_last)
        self.labels = np.asarray(labels, dtype=np.int64)
        self.title = title
        self._digest = digest

    def image(self, index: int) -> Image.Image:
        """One image, mode RGB or L."""
        pixels = self.pixels[index]
        return Image.fromarray(pixels[0].numpy() if len(pixels) == 1 else pixels.permute(1, 2, 0).numpy())

    def name(self, index: int) -> str:
        """The title and the number."""
        return f"{self.title}, image {index}"

    def subset(self, indices: np.ndarray) -> "ResidentImages":
        """The images of those numbers, in that order; a copy."""
        chosen = self.pixels.permute(0, 2, 3, 1).index_select(0, torch.from_numpy(indices)).permute(0, 3, 1, 2)
        return ResidentImages(chosen, self.labels[indices], title=self.title)

    def digest(self) -> str:
        """SHA-256 of shape, pixels and labels."""
        if self._digest is None:
            digest = hashlib.sha256(str(tuple(self.pixels.shape)).encode())
            for part in self.pixels.split(CHUNK):
                digest.update(part.contiguous().numpy().data)
            digest.update(self.labels.tobytes())
            self._digest = digest.hexdigest()
        return self._digest


@final
class EncodedImages(Images):
    """Image files, or the bytes of such, decoded when asked for.

    Args:
        names: of each image below `root`: the path of a file, or for bytes what to call them; unique.
        labels: (N,) class of each image.
        root: folder of the files, or what the bytes were read from.
        channels: 3 (RGB) or 1 (gray).
        contents: the bytes of each image; None where they are in files.
        sizes: bytes of each file, where they are known.
    """

    def __init__(
        self,
        names: Sequence[str],
        labels: np.ndarray,
        *,
        root: Path,
        channels: int = 3,
        contents: Sequence[bytes] | None = None,
        sizes: np.ndarray | None = None,
    ) -> None:
        assert len(names) == len(labels)
        assert contents is None or len(contents) == len(names)
        self.names = names
        self.labels = np.asarray(labels, dtype=np.int64)
        self.root = root
        self.channels = channels
        self.contents = contents
        self.sizes = sizes

    def image(self, index: int) -> Image.Image:
        """Decode one image, mode RGB or L; UserError naming it where that fails."""
        return self.reduced(index, lambda width, height: 1)[0]

    def reduced(self, index: int, reduction: Callable[[int, int], int]) -> tuple[Image.Image, tuple[int, int]]:
        """Decode one image, a JPEG at a fraction of its size where that is enough; see `decode_reduced`."""
        name = self.name(index)
        return decode_reduced(self.contents[index] if self.contents else name, self.channels, reduction, name=name)

    def content(self, index: int) -> bytes:
        """The bytes of the file."""
        if self.contents:
            return self.contents[index]
        name = self.name(index)
        try:
            return Path(name).read_bytes()
        except OSError as error:
            raise UserError(f"{name}: {error.strerror}") from None

    def name(self, index: int) -> str:
        """The path."""
        return os.path.join(self.root, self.names[index])

    def subset(self, indices: np.ndarray) -> "EncodedImages":
        """The images of those numbers, in that order."""
        names = self.names.take(indices) if isinstance(self.names, Names) else [self.names[int(i)] for i in indices]
        contents = [self.contents[int(i)] for i in indices] if self.contents else None
        sizes = self.sizes[indices] if self.sizes is not None else None
        return EncodedImages(
            names, self.labels[indices], root=self.root, channels=self.channels, contents=contents, sizes=sizes
        )

    def digest(self) -> str:
        """SHA-256 of names and labels, and of the sizes of the files or the contents of the bytes."""
        digest = hashlib.sha256(self.labels.tobytes())
        for index, name in enumerate(self.names):
            digest.update(name.encode(errors="surrogateescape") + b"\0")
            if self.contents:
                digest.update(hashlib.sha256(self.contents[index]).digest())
            else:
                size = file_size(self.name(index)) if self.sizes is None else self.sizes[index]
                digest.update(f"{size}\0".encode())
        return digest.hexdigest()


def file_size(path: str) -> int:
    """Bytes of a file; UserError naming it where it cannot be read."""
    try:
        return os.stat(path).st_size
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
