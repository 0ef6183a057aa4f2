"""Opening pictures: what comes out upright and RGB, and what is refused with one sentence."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sightline.errors import InputError
from sightline.models.images import FORMATS, MAX_PIXELS, open_picture

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def corners() -> Image.Image:
    """3 wide, 2 high: red at the top left, green at the top right, blue at the bottom left."""
    image = Image.new("RGB", (3, 2), WHITE)
    image.putpixel((0, 0), RED)
    image.putpixel((2, 0), GREEN)
    image.putpixel((0, 1), BLUE)
    return image


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims to be of this size and breaks off where its pixels begin."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header)) + struct.pack(">I", 99) + b"IDAT"
    return b"\x89PNG\r\n\x1a\n" + chunks


@pytest.mark.parametrize("kind", [kind for kind in FORMATS if kind != "JPEG"])
def test_lossless_formats_come_back_as_they_were(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "picture"
    options = dict(lossless=True) if kind == "WEBP" else {}
    path.write_bytes(encoded(corners(), kind, **options))
    for source in (path, str(path), path.read_bytes()):
        picture = open_picture(source)
        assert picture.mode == "RGB"
        assert list(picture.get_flattened_data()) == list(corners().get_flattened_data())


@pytest.mark.parametrize(
    ("orientation", "red", "green", "blue"),
    [
        (1, (0, 0), (2, 0), (0, 1)),
        (2, (2, 0), (0, 0), (2, 1)),  # mirrored left to right
        (3, (2, 1), (0, 1), (2, 0)),  # upside down
        (6, (1, 0), (1, 2), (0, 0)),  # turned: stored lying on its left side
        (8, (0, 2), (0, 0), (1, 2)),
    ],
)
def test_exif_orientation_is_applied(orientation: int, red: Any, green: Any, blue: Any) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    picture = open_picture(encoded(corners(), "PNG", exif=exif))
    assert picture.size == ((2, 3) if orientation > 4 else (3, 2))
    assert (picture.getpixel(red), picture.getpixel(green), picture.getpixel(blue)) == (RED, GREEN, BLUE)


def test_an_unreadable_exif_block_does_not_spoil_the_picture() -> None:
    broken = encoded(corners(), "PNG", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xff")
    assert open_picture(broken).getpixel((0, 0)) == RED


def test_transparency_is_laid_on_white() -> None:
    image = Image.new("RGBA", (3, 1))
    image.putdata([(255, 0, 0, 255), (0, 0, 0, 0), (0, 0, 255, 51)])  # opaque, clear, a fifth
    assert list(open_picture(encoded(image)).get_flattened_data()) == [RED, WHITE, (204, 204, 255)]
    grey = Image.new("LA", (2, 1))
    grey.putdata([(100, 255), (100, 0)])
    assert list(open_picture(encoded(grey)).get_flattened_data()) == [(100, 100, 100), WHITE]


def test_palettes_with_and_without_a_transparent_entry() -> None:
    image = Image.new("P", (3, 1))
    image.putpalette([*RED, *GREEN, *BLUE])
    image.putdata([0, 1, 2])
    assert list(open_picture(encoded(image)).get_flattened_data()) == [RED, GREEN, BLUE]
    for kind in ("PNG", "GIF"):
        clear = open_picture(encoded(image, kind, transparency=1))
        assert list(clear.get_flattened_data()) == [RED, WHITE, BLUE]
    half = open_picture(encoded(image, "PNG", transparency=bytes([255, 0, 255])))
    assert list(half.get_flattened_data()) == [RED, WHITE, BLUE]


def test_a_transparent_colour_of_a_plain_png_is_white_too() -> None:
    assert open_picture(encoded(corners(), "PNG", transparency=GREEN)).getpixel((2, 0)) == WHITE


def test_cmyk_black_and_white_and_grey() -> None:
    cmyk = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    assert np.abs(np.asarray(open_picture(encoded(cmyk, "JPEG", quality=100))).astype(int) - RED).max() <= 4
    assert open_picture(encoded(Image.new("1", (2, 2), 1))).getpixel((0, 0)) == WHITE
    assert open_picture(encoded(Image.new("L", (2, 2), 7))).getpixel((1, 1)) == (7, 7, 7)


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_sixteen_bits_are_brought_to_eight_by_their_full_range(kind: str) -> None:
    levels = np.array([[0, 256, 257, 32768, 65278, 65535]], dtype=np.uint16)
    picture = open_picture(encoded(Image.fromarray(levels), kind))
    assert [pixel[0] for pixel in picture.get_flattened_data()] == [0, 1, 1, 128, 254, 255]


def test_real_numbers_are_stretched_to_their_own_range() -> None:
    values = np.array([[-2.0, 0.0, 2.0], [np.nan, 1.0, -1.0]], dtype=np.float32)
    picture = open_picture(encoded(Image.fromarray(values), "TIFF"))
    assert [pixel[0] for pixel in picture.get_flattened_data()] == [0, 128, 255, 128, 191, 64]
    assert open_picture(Image.fromarray(np.full((2, 2), 3.0, dtype=np.float32))).getpixel((0, 0)) == (0, 0, 0)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_an_animation_gives_its_first_frame(kind: str) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in (RED, GREEN, BLUE)]
    options = dict(lossless=True) if kind == "WEBP" else {}
    moving = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
    assert open_picture(moving).getpixel((0, 0)) == RED


def test_a_given_image_is_copied_and_not_changed() -> None:
    given = corners()
    picture = open_picture(given)
    picture.putpixel((0, 0), BLUE)
    assert given.getpixel((0, 0)) == RED
    see_through = Image.new("RGBA", (1, 1))
    assert open_picture(see_through).getpixel((0, 0)) == WHITE
    assert see_through.mode == "RGBA"


# --- What is refused ---


@pytest.mark.parametrize("size", [(10_000, 10_000), (100_000, 100_000)])
def test_too_large_a_picture_is_refused_by_its_header(size: tuple[int, int], tmp_path: Path) -> None:
    before = Image.MAX_IMAGE_PIXELS
    path = tmp_path / "bomb.png"
    path.write_bytes(png_header(*size))
    with pytest.raises(InputError, match=r"bomb\.png' is too large"):
        open_picture(path)
    assert before == Image.MAX_IMAGE_PIXELS
    assert size[0] * size[1] > MAX_PIXELS


def test_the_limit_can_be_chosen_and_holds_for_given_images() -> None:
    assert open_picture(corners(), max_pixels=6).size == (3, 2)
    for source in (corners(), encoded(corners())):
        with pytest.raises(InputError, match="3 x 2 pixels, at most 5"):
            open_picture(source, max_pixels=5)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM"])
def test_a_truncated_file_is_refused(kind: str, tmp_path: Path) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    whole = encoded(noise, kind)
    path = tmp_path / f"cut.{kind.lower()}"
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=rf"cut\.{kind.lower()}"):
        open_picture(path)


def test_what_is_no_picture_is_refused_by_name(tmp_path: Path) -> None:
    note = tmp_path / "note.png"
    note.write_text("not a picture")
    with pytest.raises(InputError, match=r"note\.png' is not a picture that can be read; known formats: PNG, JPEG"):
        open_picture(note)
    (tmp_path / "empty.png").write_bytes(b"")
    with pytest.raises(InputError, match=r"empty\.png' is empty"):
        open_picture(tmp_path / "empty.png")
    with pytest.raises(InputError, match="is a folder"):
        open_picture(tmp_path)
    with pytest.raises(InputError, match=r"gone\.png' does not exist"):
        open_picture(tmp_path / "gone.png")
    with pytest.raises(InputError, match=r"null byte|does not exist"):
        open_picture("a\0b.png")
    for nothing in (b"", b"abc"):
        with pytest.raises(InputError, match="the given bytes"):
            open_picture(nothing)


@pytest.mark.parametrize("kind", ["ICO", "TGA", "JPEG2000", "DDS"])
def test_formats_that_are_not_on_the_list_are_refused(kind: str) -> None:
    with pytest.raises(InputError, match="known formats"):
        open_picture(encoded(Image.new("RGB", (16, 16)), kind))
