"""ImageRef: one image of a record, as a file or as bytes, opened only when asked.

All that is dangerous about a user's image file is handled here: paths that leave the data folder, decoders
that are no image decoders, decompression bombs, truncated files, modes that would be clipped.
"""

from __future__ import annotations

import io
import os
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PureWindowsPath

from PIL import Image, ImageOps, UnidentifiedImageError

from rl_lvr.errors import UserError

MAX_PIXELS = 50_000_000
"""Above this an image is refused before it is decoded: 150 MB as RGB, and more than any backbone looks at."""

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
"""Pillow knows some 40 more; one of them (EPS) starts an interpreter."""

_LONGEST = 1024  # characters of a path
_ORIENTATION = 0x0112  # EXIF
_TURNED = (5, 6, 7, 8)  # orientations that swap width and height
_DECODER_ERRORS = (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error, zlib.error)


class ImageError(UserError):
    """An image that cannot be used: `what` is wrong with it, and the `cure`."""

    def __init__(self, what: str, cure: str) -> None:
        super().__init__(f"{what}; {cure}.")
        self.what, self.cure = what, cure


def path_error(text: str) -> ImageError | None:
    """What is wrong with a path by its text alone (no look at the disk)."""
    if not text:
        return ImageError("the image path is empty", "name the file, relative to the data file's folder")
    if text.startswith("data:") or len(text) > _LONGEST or any(len(p.encode()) > 255 for p in text.split("/")):
        return ImageError(
            f"{text[:24]!r}... is too long for a path, or is image data",
            "write the image to a file and name it, or embed its bytes in a Parquet file",
        )
    if "\0" in text:
        return ImageError(f"the image path {text!r} holds a NUL byte", "name an ordinary file")
    if "://" in text:
        return ImageError(
            f"{text!r} is an address, and nothing is fetched from the network",
            "download the image and give its path relative to the data file",
        )
    if os.path.isabs(text) or PureWindowsPath(text).is_absolute():
        return ImageError(f"{text!r} is an absolute path", "give the path relative to the folder of the data file")
    if os.path.normpath(text).split(os.sep)[0] == os.pardir:
        return ImageError(f"{text!r} leaves the folder of the data file", "put the image below the data file's folder")
    return None


SOURCE = "source"
"""Key of the name of an image in the `info` of what `ImageRef.open` decoded."""


@dataclass(frozen=True)
class ImageRef:
    """An image: `data` if the bytes are at hand, else the file `name` below `root`.

    With `root=None` the name is any path: only for data sets that the calling program itself has built.
    """

    name: str
    root: Path | None = None
    data: bytes | None = field(default=None, repr=False)

    @property
    def path(self) -> Path:
        """The file, checked to lie inside `root` after symbolic links are followed."""
        if self.root is None:
            return Path(self.name)
        error = path_error(self.name)
        if error is not None:
            raise error
        try:
            full = (self.root / self.name).resolve()
        except (OSError, RuntimeError) as loop:  # RuntimeError: links in a circle
            raise ImageError(f"image path {self.name!r} cannot be followed", "mend the link") from loop
        if not full.is_relative_to(self.root.resolve()):
            raise ImageError(
                f"{self.name!r} is a link that leaves the folder of the data file",
                "copy the image into the folder instead of linking it",
            )
        return full

    def read_bytes(self) -> bytes:
        """The encoded image."""
        if self.data is not None:
            return self.data
        path = self.path
        if not path.exists():
            raise ImageError(f"image file {self.name!r} does not exist", "add the file or mend the path")
        if not path.is_file():
            raise ImageError(f"{self.name!r} is not a file", "name an image file")
        try:
            return path.read_bytes()
        except OSError as error:
            raise ImageError(
                f"image file {self.name!r} cannot be read ({error.strerror})", "correct its permissions"
            ) from error

    @contextmanager
    def _header(self, max_pixels: int) -> Iterator[Image.Image]:
        """The image with only its header read, its size and mode checked."""
        label = repr(self.name) if self.name else "the embedded image"
        with warnings.catch_warnings():
            # Pillow warns above a limit of its own; ours is lower or chosen by the caller, and is an error.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            try:
                image = Image.open(io.BytesIO(self.read_bytes()), formats=FORMATS)
            except UnidentifiedImageError as error:
                raise ImageError(
                    f"{label} is not an image in one of the formats {', '.join(FORMATS)}",
                    "convert it to PNG or JPEG, or remove the record",
                ) from error
            except Image.DecompressionBombError as error:
                raise ImageError(f"{label} is huge ({error})", f"scale it below {max_pixels:,} pixels") from error
            except _DECODER_ERRORS as error:
                raise ImageError(f"{label} has a broken header ({error})", "write or download it again") from error
        width, height = image.size
        if width * height > max_pixels:
            raise ImageError(
                f"{label} is huge: {width} x {height} is more than {max_pixels:,} pixels",
                "scale it down, or raise the limit if it is meant",
            )
        if image.mode in ("I", "F") or image.mode.startswith("I;16"):
            raise ImageError(
                f"{label} has more than 8 bits per channel (mode {image.mode}), which RGB would clip",
                "convert it to 8 bits per channel",
            )
        yield image

    def size(self, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
        """Width and height as a viewer shows the image (EXIF orientation applied), from the header alone."""
        with self._header(max_pixels) as image:
            return _shown_size(image)

    def open(self, max_pixels: int = MAX_PIXELS) -> Image.Image:
        """The decoded image: RGB, EXIF orientation applied, transparency laid on white."""
        with self._header(max_pixels) as image:
            try:
                image.load()
                turned = ImageOps.exif_transpose(image)
            except _DECODER_ERRORS as error:
                label = repr(self.name) if self.name else "the embedded image"
                raise ImageError(f"{label} is truncated or damaged ({error})", "write or download it again") from error
        if turned.has_transparency_data:
            layer = turned.convert("RGBA")
            turned = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
        shown = turned.convert("RGB")
        shown.info[SOURCE] = self.name  # no `filename`: `datasets` would store that path in place of the picture
        return shown


def _shown_size(image: Image.Image) -> tuple[int, int]:
    width, height = image.size
    return (height, width) if image.getexif().get(_ORIENTATION) in _TURNED else (width, height)


def encode_png(image: Image.Image) -> bytes:
    """PNG bytes; the same picture gives the same bytes."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=6)
    return buffer.getvalue()
