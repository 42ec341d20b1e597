"""Image files to pixels: the same picture in every kind of file, and what is refused because its meaning is uncertain."""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from ebjdat.data import decode as decoding
from ebjdat.data.decode import decode
from ebjdat.errors import DataError

from .conftest import refusal, saved

Array = NDArray[Any]
GREY = np.random.default_rng(0).integers(0, 256, (8, 8), np.uint8)
GREY[0, :2] = 0, 255
BINARY = (GREY > 127).astype(np.uint8) * 255
ALPHA = np.full((8, 8), 255, np.uint8)
ALPHA[:4] = 0
ALPHA[4] = 51  # a fifth


def grey_as(kind: str, mode: str = "L", **how: Any) -> bytes:
    return saved(Image.fromarray(GREY).convert(mode), kind, **how)


def png(array: Array, colour: int, depth: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of rows of bytes, written here: Pillow writes neither 16-bit colour nor a transparent value of few bits."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    rows = zlib.compress(b"".join(b"\0" + row.tobytes() for row in array))
    head = struct.pack(">IIBBBBB", 8, 8, depth, colour, 0, 0, 0)
    parts = [chunk(b"IHDR", head), *(chunk(*c) for c in chunks), chunk(b"IDAT", rows), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def tiff(planes: list[bytes], bits: int, samples: int = 1, **tags: int) -> bytes:
    """An uncompressed 8x8 TIFF with a strip for each plane. tags: t262=0 and so on."""
    offsets = [8 + sum(map(len, planes[:i])) for i in range(len(planes))]
    values = {256: [8], 257: [8], 258: [bits] * samples, 259: [1], 262: [1 if samples == 1 else 2], 273: offsets, 277: [samples]}
    values |= {278: [8], 279: [len(p) for p in planes]} | {int(k[1:]): [v] * (samples if k == "t339" else 1) for k, v in tags.items()}
    at = offsets[-1] + len(planes[-1])
    beyond, entries, extra = at + 2 + 12 * len(values) + 4, b"", b""
    for tag, items in sorted(values.items()):
        packed = struct.pack(f"<{len(items)}I", *items)
        entries += struct.pack("<HHI", tag, 4, len(items)) + (packed if len(items) == 1 else struct.pack("<I", beyond + len(extra)))
        extra += b"" if len(items) == 1 else packed
    return struct.pack("<2sHI", b"II", 42, at) + b"".join(planes) + struct.pack("<H", len(values)) + entries + bytes(4) + extra


DEEP = GREY.astype(np.uint16) * 257
LOW = DEEP - np.minimum(GREY, 200)  # their high bytes are GREY - 1 or GREY: v >> 8 and rounding differ
PAIR = np.stack([DEEP, np.full_like(DEEP, 65535)], -1).astype(">u2").reshape(8, -1)

SAME: dict[str, tuple[bytes, int]] = {  # file, channels
    "png": (grey_as("PNG"), 1),
    "16-bit png": (saved(Image.fromarray(DEEP), "PNG"), 1),
    "16-bit tiff": (saved(Image.fromarray(DEEP), "TIFF"), 1),
    "16-bit tiff, big-endian": (saved(Image.fromarray(DEEP.astype(">u2")), "TIFF"), 1),
    "16-bit tiff, deflated": (saved(Image.fromarray(DEEP), "TIFF", compression="tiff_deflate"), 1),
    "16-bit pgm": (saved(Image.fromarray(DEEP), "PPM"), 1),
    "16-bit rgb png": (png(np.repeat(DEEP[..., None], 3, 2).astype(">u2").reshape(8, -1), 2, 16), 3),
    "16-bit rgb tiff": (tiff([np.repeat(DEEP[..., None], 3, 2).tobytes()], 16, 3), 3),
    "16-bit grey and alpha png": (png(PAIR, 4, 16), 1),
    "plain pgm": (b"P2 8 8 255 " + " ".join(map(str, GREY.flatten())).encode(), 1),
    "ppm": (grey_as("PPM", "RGB"), 3),
    "bmp": (grey_as("BMP"), 1),
    "gif": (grey_as("GIF"), 1),
    "palette png": (saved(Image.fromarray(GREY).convert("P"), "PNG"), 1),
    "grey and alpha png": (grey_as("PNG", "LA"), 1),
    "palette and alpha tiff": (grey_as("TIFF", "PA"), 1),
    "rgb png": (grey_as("PNG", "RGB"), 3),
    "rgba png": (grey_as("PNG", "RGBA"), 3),
    "rgbx tiff": (grey_as("TIFF", "RGBX"), 3),
    "lossless webp": (grey_as("WEBP", lossless=True), 3),
    "cmyk tiff": (saved(Image.fromarray(GREY).convert("RGB").convert("CMYK"), "TIFF"), 3),
    "white is zero": (tiff([(255 - GREY).tobytes()], 8, t262=0), 1),
}


@pytest.mark.parametrize("kind", SAME)
def test_a_grey_picture_is_the_same_in_every_kind_of_file(kind: str) -> None:
    content, channels = SAME[kind]
    found = decode(content, kind).array
    assert found.shape == (channels, 8, 8)
    assert (found == GREY).all()
    assert (decode(content, kind, channels=1).array == GREY).all()
    assert decode(content, kind, channels=3).array.shape == (3, 8, 8)


def deep_colours(values: Array) -> dict[str, bytes]:
    """8x8 files of 16-bit values in every mode that Pillow reads as 8 bits."""
    full = np.full_like(values, 65535)

    def rows(*bands: Array, order: str = ">u2") -> Array:
        return np.stack(bands, -1).astype(order).reshape(8, -1)

    return {
        "rgb png": png(rows(values, values, values), 2, 16),
        "rgba png": png(rows(values, values, values, full), 6, 16),
        "grey and alpha png": png(rows(values, full), 4, 16),
        "rgb tiff": tiff([rows(values, values, values, order="<u2").tobytes()], 16, 3),
        "rgba tiff": tiff([rows(values, values, values, full, order="<u2").tobytes()], 16, 4, t338=2),
        "cmyk tiff": tiff([rows(*[values] * 4, order="<u2").tobytes()], 16, 4, t262=5),
        "ppm": b"P6 8 8 65535\n" + rows(values, values, values).tobytes(),
        "plain ppm": b"P3 8 8 65535\n" + b" ".join(b"%d" % v for v in rows(values, values, values).flatten()),
    }


@pytest.mark.parametrize("kind", deep_colours(DEEP))
def test_the_depth_of_16_bit_colour_is_seen(kind: str) -> None:
    found = decode(deep_colours(DEEP)[kind], kind)
    assert found.highest == 65535
    assert f"16-bit {'grey' if kind.startswith('grey') else 'colour'} to 8 bits (v >> 8)" in found.rules
    if not kind.startswith("cmyk"):
        assert (found.array == GREY).all()
    low = decode(deep_colours(np.full_like(DEEP, 3000))[kind], kind)
    assert 3000 <= low.highest < 3500
    shallow = decode(grey_as("PNG", "RGBA"), kind)
    assert (shallow.highest, shallow.rules) == (0, ())


def test_deep_grey_keeps_its_high_byte_and_colour_does_as_well() -> None:
    assert (decode(saved(Image.fromarray(LOW), "PNG"), "x").array == LOW >> 8).all()
    assert (decode(png(np.repeat(LOW[..., None], 3, 2).astype(">u2").reshape(8, -1), 2, 16), "x").array == LOW >> 8).all()
    assert decode(saved(Image.fromarray(LOW), "PNG"), "x").highest == LOW.max()


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM", "BMP", "GIF"])
def test_one_bit_becomes_black_and_white(kind: str) -> None:
    assert (decode(saved(Image.fromarray(BINARY).convert("1"), kind), kind).array == BINARY).all()


def rgba(colour: Array = GREY) -> Image.Image:
    return Image.fromarray(np.dstack([colour, colour, colour, ALPHA]))


def with_value(bits: int, value: int) -> bytes:
    """A grey PNG of few bits, values 0, 1, 2, ... in a row, one of them transparent."""
    row = np.packbits(np.unpackbits(np.arange(8, dtype=np.uint8)[:, None] % 2**bits, axis=1)[:, -bits:].reshape(-1))
    return png(np.tile(row, (8, 1)), 0, bits, (b"tRNS", struct.pack(">H", value)))


def palette(transparency: int | bytes) -> bytes:
    image = Image.fromarray(np.tile(np.arange(8, dtype=np.uint8), (8, 1))).convert("P")
    image.putpalette([v for i in range(8) for v in (i * 30, 5, 250 - i)])
    return saved(image, "PNG", transparency=transparency)


def over(colour: Array, alpha: Array, background: int) -> Array:
    return np.rint(colour + (background - colour.astype(float)) * (1 - alpha / 255))


STEPS = np.tile(np.arange(8), (8, 1))
COLOURS = np.stack([STEPS * 30, np.full((8, 8), 5), 250 - STEPS])
ONE_CLEAR = {v: 255 * (v != STEPS) for v in (0, 2)}
CLEAR: dict[str, tuple[bytes, Array, Array]] = {  # file, colour, alpha
    "rgba": (saved(rgba(), "PNG"), GREY, ALPHA),
    "grey and alpha": (saved(rgba().convert("LA"), "PNG"), GREY, ALPHA),
    "webp": (saved(rgba(), "WEBP", lossless=True, exact=True), GREY, ALPHA),
    "palette, one index": (palette(2), COLOURS, ONE_CLEAR[2]),
    "palette, an alpha for each": (palette(bytes(range(0, 240, 30))), COLOURS, STEPS * 30),
    "grey, one value": (png(GREY, 0, 8, (b"tRNS", struct.pack(">H", GREY[3, 3]))), GREY, 255 * (GREY[3, 3] != GREY)),
    "grey of 4 bits, one value": (with_value(4, 2), STEPS * 17, ONE_CLEAR[2]),
    "grey of 2 bits, one value": (with_value(2, 2), STEPS % 4 * 85, 255 * (STEPS % 4 != 2)),
    "1 bit, one value": (with_value(1, 1), STEPS % 2 * 255, 255 * (STEPS % 2 != 1)),
    "16-bit grey, one value": (
        png(LOW.astype(">u2"), 0, 16, (b"tRNS", struct.pack(">H", LOW[3, 3]))),
        LOW >> 8,
        255 * (LOW[3, 3] != LOW),
    ),
}


@pytest.mark.parametrize("background", [255, 128, 0])
@pytest.mark.parametrize("kind", CLEAR)
def test_transparent_pixels_lie_on_the_background(kind: str, background: int) -> None:
    content, colour, alpha = CLEAR[kind]
    if kind == "1 bit, one value" and background == 0:  # white is clear, black is left: nothing to be seen
        assert "is invisible on background 0" in refusal(lambda: decode(content, "x", background=background))
        return
    found = decode(content, "x", background=background)
    assert np.abs(found.array - over(colour, alpha, background)).max() <= 1  # rounding
    assert f"alpha on background {background}" in found.rules


def test_a_shape_in_the_alpha_channel_is_kept_or_refused() -> None:
    icon = saved(rgba(np.zeros_like(GREY)), "PNG")
    assert np.abs(decode(icon, "x").array - (255 - ALPHA.astype(int))).max() == 0
    message = refusal(lambda: decode(icon, "icon", background=0))
    assert message == "icon is invisible on background 0 (0 grey levels of contrast); set data.background"
    for level, contrast in ((250, 5), (254, 1), (240, 15)):
        pale = saved(rgba(np.full_like(GREY, level)), "PNG")
        assert f"icon is invisible on background 255 ({contrast} grey levels" in refusal(lambda pale=pale: decode(pale, "icon"))
        assert np.ptp(decode(pale, "icon", background=0).array) == level
    assert np.ptp(decode(saved(rgba(np.full_like(GREY, 239)), "PNG"), "icon").array) == 16
    nearly_opaque = Image.fromarray(np.dstack([np.full_like(GREY, 200)] * 3 + [250 + GREY // 52]))
    assert np.ptp(decode(saved(nearly_opaque, "PNG"), "icon").array) <= 2  # a plain picture, whatever it lies on
    clear = Image.new("RGBA", (8, 8), (9, 9, 9, 0))
    assert "icon is fully transparent" in refusal(lambda: decode(saved(clear, "PNG"), "icon"))


TURNS: dict[int, Callable[[Array], Array]] = {  # EXIF 2.3, tag 274: how stored rows and columns are shown
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.T,
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).T,
    8: lambda a: np.rot90(a, 1),
}


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "JPEG"])
def test_all_orientations_are_applied(kind: str) -> None:
    stored = np.kron(np.array([[0, 90, 180], [60, 250, 120]], np.uint8), np.ones((8, 8), np.uint8))  # JPEG's blocks: nearly exact
    for orientation, turn in TURNS.items():
        exif = Image.Exif()
        exif[274] = orientation
        how = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100}}.get(kind, {})
        found = decode(saved(Image.fromarray(stored), kind, exif=exif, **how), "x")
        assert np.abs(found.array - turn(stored).astype(int)[None]).max() <= 2
        assert ("orientation of EXIF applied" in found.rules) == (orientation > 1)


def test_cmyk_jpegs_are_read_as_adobe_means_them() -> None:
    red = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    content = saved(red, "JPEG", quality=100)
    found = decode(content, "x").array
    assert np.abs(found[:, 4, 4].astype(int) - (255, 0, 0)).max() <= 3
    at = content.index(b"Adobe") - 4  # its marker and length
    assert "is a CMYK JPEG without Adobe's marker" in refusal(lambda: decode(content[:at] + content[at + 16 :], "x"))


def frames(kind: str) -> bytes:
    first, second = Image.fromarray(GREY), Image.fromarray(255 - GREY)
    return saved(first, kind, save_all=True, append_images=[second])


REFUSED: dict[str, tuple[bytes, str]] = {
    "float tiff": (saved(Image.fromarray(GREY.astype(np.float32)), "TIFF"), "floating-point"),
    "float pfm": (saved(Image.fromarray(GREY.astype(np.float32)), "PPM"), "floating-point"),
    "32-bit tiff": (saved(Image.fromarray(GREY.astype(np.int32)), "TIFF"), "32-bit"),
    "signed 16-bit tiff": (tiff([DEEP.tobytes()], 16, t339=2), "signed"),
    "signed 8-bit tiff": (tiff([GREY.tobytes()], 8, t339=2), "signed"),
    "12-bit tiff": (tiff([bytes(96)], 12), "12 bits"),
    "16-bit tiff, white is 0": (tiff([DEEP.tobytes()], 16, t262=0), "white as 0"),
    "16-bit tiff by planes": (tiff([DEEP.tobytes()] * 3, 16, 3, t284=2), "separate planes"),
    "ycbcr tiff": (saved(Image.new("YCbCr", (8, 8)), "TIFF"), "mode YCbCr"),
    "lab tiff": (saved(Image.new("LAB", (8, 8)), "TIFF"), "mode LAB"),
    "16-bit rgb png, one colour clear": (
        png(np.zeros((8, 48), np.uint8), 2, 16, (b"tRNS", struct.pack(">HHH", 999, 0, 0))),
        "transparent colour",
    ),
    "png with its header later": (
        (whole := grey_as("PNG"))[:8] + struct.pack(">I4sI", 0, b"tEXt", zlib.crc32(b"tEXt")) + whole[8:],
        "begin with the IHDR chunk|not a readable image",
    ),
    "animated gif": (frames("GIF"), "several frames or pages .GIF"),
    "animated webp": (frames("WEBP"), "several frames"),
    "animated png": (frames("PNG"), "several frames"),
    "tiff of two pages": (frames("TIFF"), "several frames"),
    "eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF", "unknown format"),
    "ico": (grey_as("ICO", "RGBA"), "unknown format"),
    "tga": (grey_as("TGA"), "unknown format"),
    "text": (b"these are no pixels", "unknown format"),
    "nothing": (b"", "unknown format"),
    "cut": (grey_as("PNG")[:90], "not a readable image"),
    "huge": (b"P5 8000 8000 255 ", "8000x8000 pixels"),
    "enormous": (struct.pack("<2sIHHIIiiHHIIiiII", b"BM", 90, 0, 0, 54, 40, 60000, 60000, 1, 24, 0, 0, 1, 1, 0, 0), "is too large"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_images_of_uncertain_meaning_are_refused_by_name(kind: str, capfd: pytest.CaptureFixture[str]) -> None:
    content, expected = REFUSED[kind]
    message = refusal(lambda: decode(content, "folder: 'a.png'", size=8))
    assert re.match(rf"folder: 'a\.png' .*({expected})", message)
    assert len(message) < 300
    assert capfd.readouterr() == ("", "")


def test_images_are_as_large_as_networks_take_or_have_a_size() -> None:
    wide = saved(Image.new("L", (decoding.SIDE_LIMIT + 1, 8)), "PNG")
    assert "1025x8 pixels; without data.size at most 1024x1024" in refusal(lambda: decode(wide, "x"))
    assert decode(wide, "x", size=8).array.shape == (1, 8, 8)


@pytest.mark.parametrize("kind", ["PNG", "GIF", "TIFF", "BMP", "PPM", "JPEG", "WEBP"])
def test_strange_bytes_are_refused_whatever_the_decoder_makes_of_them(kind: str) -> None:
    """Bytes of a real file are set at random: pixels of the right shape, or one line that says no."""
    content, rng = grey_as(kind, "RGB"), np.random.default_rng(1)
    said = []
    for _ in range(150):
        changed = bytearray(content)
        for at in rng.integers(0, min(len(content), 200), 3):
            changed[at] = rng.integers(256)
        try:
            assert decode(bytes(changed), "x", size=8).array.shape[1:] == (8, 8)
        except DataError as error:
            said.append(str(error))
    assert said
    assert not [line for line in said if "\n" in line or not line.startswith("x ")]
