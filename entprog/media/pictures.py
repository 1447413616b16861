"""One way to open a picture from outside: measured before it is decoded, upright, opaque, 8 bits a channel."""

import io
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageCms, ImageOps

from entprog.masking import one_line
from entprog.media.errors import VideoError
from entprog.media.limits import LIMITS, Limits

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")
"""What Pillow may take a file for. Others of its plugins start programs (EPS) or are hardly tried by anyone."""
SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
Color = tuple[int, int, int]
"""RGB, 0..255."""
BACKGROUND: Color = (255, 255, 255)
"""What shows through where a picture is transparent."""
_BAND_ROWS = 128
_BYTES_PER_PIXEL = 16
"""No honest file is larger than its pixels at 4 channels of 32 bits."""


def read(source: Path | bytes, limits: Limits = LIMITS, background: Color = BACKGROUND) -> np.ndarray:
    """A picture as people see it: uint8 RGB [H, W, 3]; the first one of several.

    Turned as its EXIF orientation says, in the colours of sRGB where a profile says that they are others', laid over
    the background where it is transparent, 16-bit grey scaled to 8 bits.
    Raises VideoError: `unreadable` (no such file, not permitted), `too_large` (over the limits), `corrupt` (no picture
    of FORMATS, damaged, or of numbers whose white is not known).
    """
    name = f"{len(source)} bytes" if isinstance(source, bytes) else str(source)
    try:
        size = len(source) if isinstance(source, bytes) else source.stat().st_size
        if size > _BYTES_PER_PIXEL * limits.max_pixels:
            raise VideoError("too_large", f"{name}: {size} bytes, more than any picture has that is read")
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=FORMATS) as image:
            if image.width * image.height > limits.max_pixels:
                message = f"{image.width}x{image.height}, more than {limits.max_pixels} pixels are not decoded"
                raise VideoError("too_large", f"{name}: {message}")
            return np.asarray(opaque(_in_srgb(ImageOps.exif_transpose(_eight_bits(image))), background))
    except VideoError:
        raise
    except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
        raise VideoError("unreadable", f"{name}: {error.strerror}") from None
    except Image.UnidentifiedImageError:
        raise VideoError("corrupt", f"{name}: no picture of a kind that is read ({', '.join(FORMATS)})") from None
    except (MemoryError, Image.DecompressionBombError) as error:
        raise VideoError("too_large", f"{name}: {one_line(error)}") from None
    except Exception as error:  # Pillow's plugins raise almost anything on damaged input
        raise VideoError("corrupt", f"{name}: {one_line(error)}") from None


def _eight_bits(image: Image.Image) -> Image.Image:
    """16-bit grey scaled to 8 bits, where Pillow would cut off at 255; others as they are."""
    if not image.mode.startswith(("I", "F")):
        return image
    if not image.mode.startswith("I;16"):
        raise ValueError("its grey has 32 bits, and no known white: save it with 8 or 16 bits")
    deep = np.asarray(image).astype(np.uint32)
    grey = Image.fromarray(((deep * 255 + 32767) // 65535).astype(np.uint8))
    if isinstance(clear := image.info.get("transparency"), int):
        grey.putalpha(Image.fromarray(np.where(deep == clear, 0, 255).astype(np.uint8)))
    grey.info["exif"] = image.getexif().tobytes()
    return grey


def _in_srgb(image: Image.Image) -> Image.Image:
    """A picture whose colour profile is of another space (Display P3, Adobe RGB, a press's) in sRGB, relative
    colorimetric as videos are. A profile that cannot be used counts as none, as in browsers."""
    content = image.info.get("icc_profile")
    if not content:
        return image
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(content))
        if "sRGB" in (profile.profile.profile_description or ""):
            return image
        flat = image.convert({"1": "L", "L": "L", "LA": "L", "CMYK": "CMYK"}.get(image.mode, "RGB"))
        srgb, intent = ImageCms.createProfile("sRGB"), ImageCms.Intent.RELATIVE_COLORIMETRIC
        made = ImageCms.profileToProfile(flat, profile, srgb, renderingIntent=intent, outputMode="RGB")
    except (ImageCms.PyCMSError, OSError):
        return image
    if image.has_transparency_data:
        made.putalpha(image.convert("RGBA").getchannel("A"))
    return made


def opaque(image: Image.Image, background: Color = BACKGROUND) -> Image.Image:
    """RGB, over the background where it is transparent: the colours under full transparency are anything."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, background), image).convert("RGB")


def over_background(rgba: np.ndarray, background: Color = BACKGROUND) -> np.ndarray:
    """`opaque` of uint8 RGBA [H, W, 4]: uint8 RGB [H, W, 3]. Some rows at a time: no large copies are made."""
    out = np.empty((*rgba.shape[:2], 3), np.uint8)
    for top in range(0, len(rgba), _BAND_ROWS):
        band = np.ascontiguousarray(rgba[top : top + _BAND_ROWS])
        out[top : top + len(band)] = np.asarray(opaque(Image.fromarray(band), background))
    return out


def png(image: np.ndarray) -> bytes:
    """uint8 RGB [H, W, 3] as a PNG that is quick to read: the smaller one of two whose pixels are differences to the
    pixel on the left, or above. What writers choose as a rule, a guess from three neighbours, is of about the same size
    and takes longer to undo. Equal pictures give equal bytes."""
    return min((_png(image, differences) for differences in ("sub", "up")), key=len)


def _png(image: np.ndarray, differences: str) -> bytes:
    encoder = av.CodecContext.create("png", "w")
    encoder.height, encoder.width = image.shape[:2]
    encoder.pix_fmt, encoder.time_base, encoder.thread_count = "rgb24", Fraction(1), 1
    encoder.options = {"pred": differences, "compression_level": "6"}
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
    return b"".join(bytes(packet) for packet in [*encoder.encode(frame), *encoder.encode(None)])
