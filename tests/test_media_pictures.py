"""Pictures from outside: upright, opaque, 8 bits, never larger than allowed, never by a decoder that is not listed."""

import io
import tracemalloc

import numpy as np
import pytest
from PIL import Image, ImageCms

from entprog.media import frames, pictures
from entprog.media.limits import Limits
from entprog.media.video import VideoError

UPRIGHT = np.repeat(np.arange(24, dtype=np.uint8).reshape(4, 6, 1) * 10, 3, -1)
STORED = {  # EXIF orientation: the upright picture as such a camera stores it
    1: UPRIGHT,
    2: UPRIGHT[:, ::-1],
    3: UPRIGHT[::-1, ::-1],
    4: UPRIGHT[::-1],
    5: UPRIGHT.transpose(1, 0, 2),
    6: np.rot90(UPRIGHT),
    7: UPRIGHT.transpose(1, 0, 2)[::-1, ::-1],
    8: np.rot90(UPRIGHT, -1),
}


def saved(image: Image.Image, kind: str, **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", STORED)
def test_every_orientation_is_turned_upright(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    exact = {"JPEG": {"quality": 100}, "WEBP": {"lossless": True}}.get(kind, {})
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation]))
    got = pictures.read(saved(stored, kind, exif=exif, **exact)).astype(int)
    assert got.shape == UPRIGHT.shape and np.abs(got - UPRIGHT).max() <= (2 if kind == "JPEG" else 0)


@pytest.mark.parametrize("direction", [(0, 1), (1, 0)])
def test_a_picture_is_written_as_it_is_and_small(direction):
    """By differences to the pixel that it resembles."""
    lines = np.random.default_rng(0).integers(0, 256, (61, 1, 3), dtype=np.uint8).repeat(61, 1).transpose(*direction, 2)
    written = pictures.png(lines)
    assert np.array_equal(Image.open(io.BytesIO(written), formats=["PNG"]), lines)
    assert written == pictures.png(lines.copy()) and len(written) < 1000


def test_numbered_pictures_are_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    for i in range(2):
        stored = Image.fromarray(np.ascontiguousarray(STORED[6]))
        (tmp_path / f"{i}.jpg").write_bytes(saved(stored, "JPEG", exif=exif, quality=100))
    info = frames.probe(tmp_path, 10, Limits())
    assert (info.height, info.width) == (4, 6)
    (_, image), _ = frames.iter_frames(tmp_path, 10, 10, Limits())
    assert np.abs(image.astype(int) - UPRIGHT).max() <= 2


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
def test_colours_hidden_by_transparency_do_not_show(kind):
    image = np.zeros((4, 6, 4), np.uint8)
    image[:, :3] = 200, 10, 10, 255
    image[:, 3:] = 10, 200, 10, 0
    got = pictures.read(saved(Image.fromarray(image), kind, **({"lossless": True} if kind == "WEBP" else {})))
    assert (got[:, :3] == (200, 10, 10)).all() and (got[:, 3:] == pictures.BACKGROUND).all()


@pytest.mark.parametrize("mode", ["P", "L", "LA", "RGB", "I;16"])
def test_transparency_of_every_kind_of_png_is_laid_over_the_background(mode):
    if mode == "LA":
        image, options = Image.merge("LA", (Image.new("L", (2, 1), 9), Image.new("L", (2, 1), 0))), {}
    elif mode == "I;16":
        image, options = Image.fromarray(np.full((1, 2), 9, np.uint16)), {"transparency": 9}
    else:
        image = Image.new(mode, (2, 1), (9, 9, 9) if mode == "RGB" else 9)
        options = {"transparency": (9, 9, 9) if mode == "RGB" else 9}
        if mode == "P":
            image.putpalette(bytes(768))
    assert (pictures.read(saved(image, "PNG", **options)) == pictures.BACKGROUND).all()


def of_swapped_colours() -> bytes:
    """A profile in which red and blue have changed places, as no screen's have."""
    made = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    made = made.replace("sRGB".encode("utf-16-be"), "none".encode("utf-16-be"))
    return made.replace(b"rXYZ", b"????", 1).replace(b"bXYZ", b"rXYZ", 1).replace(b"????", b"bXYZ", 1)


@pytest.mark.parametrize(
    ("kind", "mode"),
    [
        ("JPEG", "RGB"),
        ("PNG", "RGB"),
        ("PNG", "RGBA"),
        ("PNG", "P"),
        ("TIFF", "RGBA"),
        ("WEBP", "RGB"),
        ("WEBP", "RGBA"),
    ],
)
def test_colours_are_those_of_the_pictures_profile(kind, mode):
    image = Image.new("RGB", (16, 16), (200, 40, 60)).convert(mode)
    if mode == "RGBA":
        image.putpixel((3, 3), (0, 0, 0, 0))
    profiles = {"none": None, "swapped": of_swapped_colours(), "broken": of_swapped_colours()[:200]}
    profiles["srgb"] = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    got = {}
    for name, profile in profiles.items():
        how = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100}}.get(kind, {})
        got[name] = pictures.read(saved(image, kind, icc_profile=profile, **how))
    assert np.array_equal(got["srgb"], got["none"]) and np.array_equal(got["broken"], got["none"])
    assert np.abs(got["swapped"].astype(int) - got["none"][..., ::-1]).max() <= 1
    assert (got["swapped"][3, 3] == 255).all() == (mode == "RGBA")


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_grey_of_16_bits_keeps_its_levels(kind):
    deep = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(16, 16)
    got = pictures.read(saved(Image.fromarray(deep), kind))
    assert (got[..., 0].ravel() == np.arange(256)).all() and (got[..., :1] == got).all()


def test_numbers_without_a_known_white_are_refused():
    for numbers in (np.ones((2, 2), np.float32), np.ones((2, 2), np.int32)):
        with pytest.raises(VideoError, match="no known white") as raised:
            pictures.read(saved(Image.fromarray(numbers), "TIFF"))
        assert raised.value.reason == "corrupt"


@pytest.mark.parametrize(
    "content",
    [
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n",
        b"\xc5\xd0\xd3\xc6" + bytes(60),
        b"P6 2 2 255\n" + bytes(12),
        b"/* XPM */ static char *x[] = {",
        b"",
        b"\x89PNG\r\n\x1a\n" + bytes(20),
        b"\xff\xd8\xff" + bytes(20),
        b"GIF89a",
    ],
)
def test_only_listed_kinds_are_opened_and_damage_is_one_line(content):
    with pytest.raises(VideoError) as raised:
        pictures.read(content)
    assert raised.value.reason == "corrupt" and "\n" not in str(raised.value)


@pytest.mark.filterwarnings("ignore")
def test_every_cut_and_flip_of_a_picture_is_a_picture_or_an_error():
    rng = np.random.default_rng(0)
    sound = Image.fromarray(rng.integers(0, 256, (12, 12, 3), np.uint8))
    for kind in pictures.FORMATS:
        whole = saved(sound, kind)
        for _ in range(40):
            content = bytearray(whole[: rng.integers(1, len(whole) + 1)])
            content[rng.integers(len(content))] ^= 1 << rng.integers(8)
            try:
                assert pictures.read(bytes(content)).dtype == np.uint8
            except VideoError as error:
                assert error.reason in ("corrupt", "too_large")


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "GIF", "BMP"])
def test_a_small_file_of_many_pixels_is_measured_before_it_is_decoded(kind):
    side = 1200
    content = saved(Image.new("1" if kind in ("BMP", "TIFF") else "P", (side, side)).convert("1"), kind)
    tracemalloc.start()
    with pytest.raises(VideoError, match=f"{side}x{side}, more than 1000000 pixels") as raised:
        pictures.read(content, Limits(max_pixels=10**6))
    assert raised.value.reason == "too_large" and tracemalloc.get_traced_memory()[1] < 10**7
    tracemalloc.stop()


def test_a_file_larger_than_any_picture_is_not_read(tmp_path):
    path = tmp_path / "a.webp"
    with path.open("wb") as file:
        file.truncate(10**9)
    with pytest.raises(VideoError, match="more than any picture") as raised:
        pictures.read(path)
    assert raised.value.reason == "too_large"


def test_what_is_not_there_is_unreadable(tmp_path):
    for path in (tmp_path / "none.png", tmp_path):
        with pytest.raises(VideoError) as raised:
            pictures.read(path)
        assert raised.value.reason == "unreadable"


def test_a_large_transparent_picture_is_laid_over_its_background_in_bands():
    rgba = np.random.default_rng(0).integers(0, 256, (300, 40, 4), np.uint8)
    rgba[::3, :, 3] = 0
    whole = np.asarray(pictures.opaque(Image.fromarray(rgba)))
    assert (pictures.over_background(rgba[:, 4:]) == whole[:, 4:]).all()
