"""Bytes of an image file -> uint8 pixels. Every mode that Pillow reads has a rule here, or is refused by name."""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from ebjdat.errors import DataError

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # none that runs another program
PIXEL_LIMIT = 50_000_000  # of an image before scaling; decoding takes up to 16 bytes per pixel
SIDE_LIMIT = 1024  # pixels, of images that are not scaled
FAINT = 16  # grey levels of 255; with less contrast than this, where alpha has as much, the background hides a picture
DEEP = ("I;16", "I;16L", "I;16B", "I;16N")

BITS, PHOTOMETRIC, PLANAR, SAMPLE_FORMAT = 258, 262, 284, 339  # tags of TIFF


@dataclass(frozen=True)
class Pixels:
    """array: uint8 (C, H, W), C = 1 for images stored as grey; rules: the conversions that were applied.

    highest: an upper bound of the 16-bit values before conversion to 8 bits (for grey, their maximum); 0 for other images.
    """

    array: NDArray[np.uint8]
    rules: tuple[str, ...]
    highest: int


def decode(content: bytes, where: str, size: int | None = None, background: int = 255, channels: int | None = None) -> Pixels:
    """Decode an image file. size: scale the shorter side to it and crop the centre (Pillow's ImageOps.fit, bicubic); background: grey
    level under transparent pixels; channels: 1 or 3, None: as stored. Raises DataError that begins with `where`.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # limits and modes are checked here
            with Image.open(io.BytesIO(content), formats=FORMATS) as image:
                _check_size(image, where, size)
                if problem := _problem(image, content):
                    raise DataError(f"{where} {problem}")
                return _pixels(image, content, where, size, background, channels)
    except DataError:
        raise
    except Image.DecompressionBombError as error:
        raise DataError(f"{where} is too large: {error}") from error
    except Exception as error:  # decoders raise anything on malformed bytes
        raise DataError(f"{where} is not a readable image ({_one_line(error)}); supported formats: {', '.join(FORMATS)}") from error


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return "unknown format" if "cannot identify image" in text else text[:200]


def _check_size(image: Image.Image, where: str, size: int | None) -> None:
    width, height = image.size
    if width * height > PIXEL_LIMIT:
        raise DataError(f"{where} has {width}x{height} pixels; at most {PIXEL_LIMIT:,} are allowed")
    if size is None and max(width, height) > SIDE_LIMIT:
        raise DataError(f"{where} has {width}x{height} pixels; without data.size at most {SIDE_LIMIT}x{SIDE_LIMIT} are allowed")


def _problem(image: Image.Image, content: bytes) -> str | None:
    """Why an image of this kind is refused, or None: no rule is certain to preserve its content."""
    mode, tags = image.mode, getattr(image, "tag_v2", {})
    if image.format != "MPO" and getattr(image, "is_animated", False):  # MPO: a photo with views for other screens
        return f"has several frames or pages ({image.format}); only one picture per file is allowed"
    if mode == "F":
        return "has floating-point pixels of unknown range; scale them and store 8 or 16 bits"
    if mode == "I" and image.format not in ("PNG", "PPM"):  # those have 16 bits there
        return "has signed or 32-bit pixels of unknown range; scale them and store 8 or 16 bits"
    if mode not in ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "I", *DEEP):
        return f"has pixels of mode {mode}; store grey, RGB, palette or CMYK, with or without alpha"
    if mode == "CMYK" and image.format == "JPEG" and "adobe" not in image.info:
        return "is a CMYK JPEG without Adobe's marker, so its inks may or may not be inverted; store RGB"
    if image.format == "TIFF":
        bits = max(tags.get(BITS, (1,)))
        if bits not in (1, 2, 4, 8, 16):
            return f"has {bits} bits per pixel; store 8 or 16"
        if set(tags.get(SAMPLE_FORMAT, (1,))) - {1}:
            return "has signed pixels; store unsigned ones"
        if mode in DEEP and tags.get(PHOTOMETRIC) == 0:
            return "has 16-bit pixels with white as 0; store black as 0"
        if bits == 16 and tags.get(PLANAR, 1) != 1:
            return "has 16-bit pixels in separate planes; store them interleaved"
    if image.format == "PNG" and content[12:16] != b"IHDR":
        return "does not begin with the IHDR chunk"
    transparent = image.info.get("transparency")
    if image.format == "PNG" and mode == "RGB" and isinstance(transparent, tuple) and content[24] == 16:
        return "has 16-bit RGB pixels and a transparent colour; store alpha"
    return None


def _is_deep(image: Image.Image, content: bytes) -> bool:
    """Whether a file has 16 bits per value. To be called before loading."""
    if image.format == "PNG":
        return content[24] == 16
    tiles, tags = getattr(image, "tile", []), getattr(image, "tag_v2", {})
    if image.format == "PPM":
        return bool(tiles) and tiles[0].args[-1:] == (65535,)
    return image.format == "TIFF" and max(tags.get(BITS, (1,))) == 16


def _pixels(image: Image.Image, content: bytes, where: str, size: int | None, background: int, channels: int | None) -> Pixels:
    rules, highest, png = [], 0, image.format == "PNG"
    is_deep = _is_deep(image, content)
    stored_grey = png and content[25] in (0, 4)  # PNG colour types grey and grey + alpha; Pillow reads 16-bit grey + alpha as RGBA
    turned = image.getexif().get(0x0112, 1) in range(2, 9)  # read before loading, which rotates a TIFF
    image.load()
    if turned:
        image = ImageOps.exif_transpose(image)
        rules.append("orientation of EXIF applied")

    mode, transparent = image.mode, image.info.get("transparency")
    alpha = None
    if is_deep and mode not in (*DEEP, "I"):  # Pillow has already converted to 8 bits
        colours = [band for name, band in zip(image.getbands(), image.split(), strict=True) if name not in ("A", "a", "X")]
        highest = max(int(np.asarray(band).max()) for band in colours) << 8 | 255
        rules.append(f"16-bit {'grey' if stored_grey else 'colour'} to 8 bits (v >> 8)")
    if mode in (*DEEP, "I"):
        values = np.asarray(image).astype(np.uint16)
        highest = int(values.max())
        rules.append("16-bit grey to 8 bits (v >> 8)")
        if isinstance(transparent, int):
            alpha = Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8))
        flat = Image.fromarray((values >> 8).astype(np.uint8))
    elif mode in ("1", "L"):
        flat = image.convert("L")
        if isinstance(transparent, int):
            highest_stored = 2 ** content[24] - 1 if png and mode == "L" else 255  # values of 2 or 4 bits are given as stored
            shown = transparent * 255 // highest_stored
            alpha = flat.point([0 if v == shown else 255 for v in range(256)])
    elif mode in ("LA", "La"):
        image = image.convert("LA")
        flat, alpha = image.getchannel("L"), image.getchannel("A")
    elif mode in ("RGBA", "RGBa", "PA") or transparent is not None:
        image = image.convert("RGBA")
        flat, alpha = image.convert("RGB"), image.getchannel("A")
    else:
        flat = image.convert("RGB")
        if mode == "CMYK":
            rules.append("CMYK to RGB, without colour profiles")

    if alpha is not None and alpha.getextrema() != (255, 255):
        flat = _composed(flat, alpha, where, background)
        rules.append(f"alpha on background {background}")
    if flat.mode == "RGB" and (stored_grey or mode in ("P", "PA")) and _is_grey(flat):
        flat = flat.getchannel(0)
    if channels is not None:
        flat = flat.convert("L" if channels == 1 else "RGB")
    if size is not None:
        flat = ImageOps.fit(flat, (size, size), Image.Resampling.BICUBIC)
    array = np.asarray(flat, dtype=np.uint8)
    return Pixels(array[None] if array.ndim == 2 else array.transpose(2, 0, 1), tuple(rules), highest)


def _composed(flat: Image.Image, alpha: Image.Image, where: str, background: int) -> Image.Image:
    """The picture over a grey level. Raises DataError where (nearly) nothing of it is visible there but would be on another level."""
    shades = np.asarray(alpha)
    if not shades.any():
        raise DataError(f"{where} is fully transparent")
    canvas = Image.new(flat.mode, flat.size, background if flat.mode == "L" else (background,) * 3)
    canvas.paste(flat, mask=alpha)
    contrast = max(int(np.ptp(np.asarray(channel))) for channel in canvas.split())
    if np.ptp(shades) and (contrast == 0 or contrast < FAINT <= np.ptp(shades)):
        raise DataError(f"{where} is invisible on background {background} ({contrast} grey levels of contrast); set data.background")
    return canvas


def _is_grey(image: Image.Image) -> bool:
    red, green, blue = (channel.tobytes() for channel in image.split())
    return red == green == blue
