# SPDX-License-Identifier: Apache-2.0
"""From an image file to an 8-bit RGB tensor: decoding, orientation, transparency, size."""

import warnings
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.WebPImagePlugin import WebPImageFile
from torch import Tensor

MAX_PIXELS = 178_956_970
"""Largest picture that is decoded, in pixels: Pillow's own limit, 512 MiB of RGB."""

# Other readers stay off: some run external programs. JPEG includes the multi-picture files of phones. Importing the
# readers registers them; Pillow by itself loads its WebP reader too late for a list of formats.
_FORMATS = (PngImageFile.format, JpegImageFile.format, WebPImageFile.format)


def to_float(images: UInt8[Tensor, "*B C H W"]) -> Float[Tensor, "*B C H W"]:
    """Map 8-bit images (0 to 255) to float32 in [-1, 1], the range the models read."""
    return images.to(torch.float32).div_(127.5).sub_(1.0)


def resize(image: UInt8[Tensor, "3 H W"], height: int, width: int) -> UInt8[Tensor, "3 height width"]:
    """Resize an 8-bit image with antialiased bicubic interpolation; the same size returns the image itself."""
    if image.shape[1:] == (height, width):
        return image
    return F.interpolate(image[None], size=(height, width), mode="bicubic", antialias=True)[0]


def decode_image(
    path: str | Path | BytesIO, min_side: int = 1, max_side: int | None = None, planes: bool = True
) -> UInt8[Tensor, "3 H W"]:
    """Decode one PNG, JPEG or WebP file of any mode to upright 8-bit RGB.

    The EXIF orientation is applied, transparency is laid over white, 16-bit greys are scaled to 8 bits, and an
    animation gives its first frame.

    Args:
        path: The file, or its bytes.
        min_side: Pictures whose shorter side is below this many pixels are enlarged to it.
        max_side: Pictures whose longer side is above this many pixels are shrunk to it, though never so far that the
            shorter side falls below ``min_side``. None keeps the size.
        planes: Each channel lies in memory for itself. If not, a picture that keeps its size is a view in which the
            channels of a pixel lie side by side, which saves a copy where only a part of it is wanted.

    Returns:
        The picture, values 0 to 255.

    Raises:
        ValueError: The file cannot be decoded, or is larger than ``MAX_PIXELS``; the message is the reason alone.
    """
    try:
        pixels = _decode(path)
    # Pillow's decoders raise more than a dozen types on damaged bytes (SyntaxError and struct.error among them), and
    # one bad file must never end a run over thousands.
    except Exception as error:
        raise ValueError(_reason(error)) from error
    image = torch.from_numpy(pixels).permute(2, 0, 1)
    target = _target_size(image.shape[1], image.shape[2], min_side, max_side)
    if not planes and target == image.shape[1:]:
        return image
    return resize(image.contiguous(), *target)


def load_image(path: str | Path, size: int) -> UInt8[Tensor, "3 size size"]:
    """Load one whole picture as a square: the shorter side is resized to ``size`` and the centre is kept.

    Args:
        path: A PNG, JPEG or WebP file.
        size: Side of the square in pixels.

    Raises:
        ValueError: The file is missing or cannot be decoded.
    """
    if not Path(path).is_file():
        raise ValueError(f"no image file at {str(path)!r}: give the path of a .png, .jpg or .webp file")
    try:
        image = decode_image(path)
    except ValueError as error:
        raise ValueError(f"cannot read the image {str(path)!r}: {error}") from error
    return centre_square(image, size)


def centre_square(image: UInt8[Tensor, "3 H W"], size: int) -> UInt8[Tensor, "3 size size"]:
    """Resize the shorter side to ``size`` pixels and cut the centre square."""
    height, width = image.shape[1:]
    # Cutting first keeps a very long strip from being enlarged along its whole length.
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    return resize(image[:, top : top + side, left : left + side].contiguous(), size, size)


def _decode(path: str | Path | BytesIO) -> np.ndarray:
    """Return the upright RGB pixels, (H, W, 3) uint8."""
    with warnings.catch_warnings():
        # Pillow warns at half of its limit; up to the limit the picture is wanted.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        with Image.open(path, formats=_FORMATS) as opened:
            if opened.width * opened.height > MAX_PIXELS:
                raise Image.DecompressionBombError
            ImageOps.exif_transpose(opened, in_place=True)
            return np.array(_as_rgb(opened))


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        # Pillow clips 16-bit greys at 255 when it converts them; 65,535 / 257 = 255.
        grey = np.clip(np.rint(np.asarray(image, dtype=np.float64) / 257.0), 0, 255).astype(np.uint8)
        return Image.fromarray(grey).convert("RGB")
    if "transparency" in image.info or image.mode in ("LA", "PA", "La", "RGBA", "RGBa"):
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    # Pillow would copy what is RGB already.
    return image if image.mode == "RGB" else image.convert("RGB")


def _target_size(height: int, width: int, min_side: int, max_side: int | None) -> tuple[int, int]:
    factor = 1.0 if max_side is None else min(1.0, max_side / max(height, width))
    factor = max(factor, min_side / min(height, width))
    target = max(min_side, round(height * factor)), max(min_side, round(width * factor))
    if target[0] * target[1] > MAX_PIXELS:
        raise ValueError(
            f"a strip of {width} x {height} pixels would need more than {MAX_PIXELS:,} pixels "
            f"to make its shorter side {min_side}"
        )
    return target


def _reason(error: Exception) -> str:
    if isinstance(error, Image.DecompressionBombError):
        return f"larger than {MAX_PIXELS:,} pixels (a decompression bomb?)"
    if isinstance(error, UnidentifiedImageError):
        return "not a PNG, JPEG or WebP image, or damaged at its start"
    return " ".join(str(error).split()) or type(error).__name__
