"""Decode an image file of any kind that data sets ship to RGB uint8, or say in one line why it cannot be used.

Plain JPEGs go through libjpeg-turbo directly, reduced while decoding; everything else goes through Pillow.
"""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass

import cv2
import numpy as np
import simplejpeg
from PIL import Image, ImageCms, ImageSequence, UnidentifiedImageError

# What an image was like; every kind is counted and listed in the summary.
ROTATED = "images turned by their EXIF orientation"
CMYK = "CMYK images, converted to RGB"
DEEP = "images of more than 8 bits a channel, reduced to 8"
PALETTE = "palette images, converted to RGB"
TRANSPARENT = "images with transparency, laid on black"
ANIMATED = "animated images, first frame taken"

EXIF_SEARCH = 1 << 17  # bytes at the start of a JPEG in which an EXIF block may begin
ORIENTATION = 0x0112
BITS_PER_SAMPLE = 258
_TURNS = {3: cv2.ROTATE_180, 6: cv2.ROTATE_90_CLOCKWISE, 8: cv2.ROTATE_90_COUNTERCLOCKWISE}


class ImageError(ValueError):
    """An image that cannot be used. `kind` is the heading under which it is counted, the message the reason."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


TOO_LARGE, TRUNCATED, UNREADABLE = "images of too many pixels", "truncated images", "unreadable images"


@dataclass(frozen=True)
class Decoded:
    """pixels: RGB uint8 [H, W, 3], upright; full_size: (width, height) before any reduction while decoding, upright;
    kinds: what was odd; plain: a JPEG whose own bytes are this picture, if nothing else is changed."""

    pixels: np.ndarray
    full_size: tuple[int, int]
    kinds: tuple[str, ...]
    plain: bool

    @property
    def is_reduced(self) -> bool:
        """Whether there are more pixels in the file than here."""
        return self.pixels.shape[1] < self.full_size[0]


def decode(data: bytes, max_pixels: int, at_least: int = 0) -> Decoded:
    """The picture of an image file. A JPEG may be reduced by an eighth, a quarter … as long as its shorter side stays
    `at_least` pixels (0: not reduced). ImageError where it cannot be used."""
    if data[:2] == b"\xff\xd8":
        decoded = _decode_jpeg(data, max_pixels, at_least)
        if decoded is not None:
            return decoded
    return _decode_any(data, max_pixels)


def _decode_jpeg(data: bytes, max_pixels: int, at_least: int) -> Decoded | None:
    """A gray or YCbCr JPEG; None for one that Pillow has to read (CMYK)."""
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
    except ValueError as error:
        raise ImageError(UNREADABLE, str(error)) from error
    if colours in ("CMYK", "YCCK"):
        return None
    _check_pixels(width, height, max_pixels)
    least = min(at_least, height, width) if at_least else 0
    try:
        pixels = simplejpeg.decode_jpeg(data, "RGB", min_height=least, min_width=least)
    except ValueError as error:
        kind = TRUNCATED if "premature" in str(error).lower() or "end of" in str(error).lower() else UNREADABLE
        raise ImageError(kind, str(error)) from error
    orientation = _orientation(data)
    if orientation == 1:
        return Decoded(pixels, (width, height), (), True)
    size = (height, width) if orientation > 4 else (width, height)
    return Decoded(_upright(pixels, orientation), size, (ROTATED,), False)


def _orientation(data: bytes) -> int:
    """EXIF orientation 1…8 of a JPEG; 1 where there is none or it is broken."""
    if not _has_exif(data):
        return 1
    with Image.open(io.BytesIO(data)) as image:
        return _exif_orientation(image)


def _has_exif(data: bytes) -> bool:
    """Whether an EXIF block lies before a JPEG's picture: by its segments, since a search would read the picture."""
    place = 2
    while place < EXIF_SEARCH and data[place : place + 1] == b"\xff":
        marker, size = data[place + 1 : place + 2], int.from_bytes(data[place + 2 : place + 4], "big")
        if marker in (b"\xda", b"\xd9", b""):  # the picture begins, or the file ends
            return False
        if marker == b"\xff":  # a fill byte
            place += 1
            continue
        if marker == b"\xe1" and data[place + 4 : place + 10] == b"Exif\x00\x00":
            return True
        place += 2 + size
    return False


def _exif_orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(ORIENTATION, 1)
    except (SyntaxError, ValueError, OSError):  # a broken EXIF block does not make the picture unusable
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Undo an EXIF orientation (CIPA DC-008: 2 mirrored, 3 half turn, 4 flipped, 5 transposed, 6 and 8 quarter turns, 7
    transverse)."""
    if orientation in (2, 4):
        return cv2.flip(pixels, 1 if orientation == 2 else 0)
    if orientation in (5, 7):
        turned = cv2.transpose(pixels)
        return turned if orientation == 5 else cv2.flip(turned, -1)
    return cv2.rotate(pixels, _TURNS[orientation]) if orientation in _TURNS else pixels


def _check_pixels(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise ImageError(TOO_LARGE, f"{width}x{height} pixels, more than {max_pixels}")


def _decode_any(data: bytes, max_pixels: int) -> Decoded:
    """Any file that Pillow opens."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # max_pixels is the limit here
            with Image.open(io.BytesIO(data)) as image:
                _check_pixels(*image.size, max_pixels)
                return _from_pillow(image, data)
    except ImageError:
        raise
    except Image.DecompressionBombError as error:
        raise ImageError(TOO_LARGE, str(error)) from error
    except UnidentifiedImageError as error:
        raise ImageError(UNREADABLE, "no image format that is known") from error
    except (OSError, ValueError, SyntaxError, EOFError) as error:
        kind = TRUNCATED if "truncated" in str(error) or isinstance(error, EOFError) else UNREADABLE
        raise ImageError(kind, f"{type(error).__name__}: {error}") from error


def _from_pillow(image: Image.Image, data: bytes) -> Decoded:
    kinds = []
    if getattr(image, "is_animated", False):
        kinds.append(ANIMATED)
        image = next(iter(ImageSequence.Iterator(image))).copy()
    image.load()
    orientation = _exif_orientation(image)
    if _is_deep(image, data):
        kinds.append(DEEP)
    rgb, more = _to_rgb(image)
    pixels = np.ascontiguousarray(rgb)
    if orientation != 1:
        kinds.append(ROTATED)
        pixels = _upright(pixels, orientation)
    return Decoded(pixels, (pixels.shape[1], pixels.shape[0]), (*kinds, *more), False)


def _is_deep(image: Image.Image, data: bytes) -> bool:
    """Whether the file has more than 8 bits a channel; Pillow itself hides that for colour PNGs."""
    if image.mode in ("I;16", "I;16B", "I;16L", "I", "F"):
        return True
    if image.format == "PNG" or data[:8] == b"\x89PNG\r\n\x1a\n":
        return data[24] == 16  # IHDR: bit depth
    bits = getattr(image, "tag_v2", {}).get(BITS_PER_SAMPLE, 8)
    return max(bits, default=8) > 8 if isinstance(bits, tuple) else int(bits) > 8


def _to_rgb(image: Image.Image) -> tuple[np.ndarray, list[str]]:
    """RGB uint8 [H, W, 3] of an image in any of Pillow's modes, and what was odd about it."""
    if image.mode == "CMYK":
        return np.asarray(_cmyk_to_rgb(image)), [CMYK]
    if image.mode in ("I;16", "I;16B", "I;16L", "I"):
        # 0…65535 is black to white; what lies above (32 bits) is scaled by its own maximum.
        values = np.asarray(image).astype(np.float64)
        grey = np.clip(values / max(65535.0, float(values.max())) * 255 + 0.5, 0, 255).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2), []
    if image.mode == "F":
        values = np.nan_to_num(np.asarray(image))
        top = max(float(values.max()), 1e-9)
        scale = 1.0 if top <= 1 else 255.0 if top <= 255 else top
        grey = np.clip(values / scale * 255 + 0.5, 0, 255).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2), []
    kinds = [PALETTE] if image.mode in ("P", "PA") else []
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        # Black, like the surround of a dermatoscope: the frame crop can cut it off.
        layer = image.convert("RGBA")
        if int(np.asarray(layer)[..., 3].min()) < 255:
            kinds.append(TRANSPARENT)
        return np.asarray(
            Image.alpha_composite(Image.new("RGBA", layer.size, (0, 0, 0, 255)), layer).convert("RGB")
        ), kinds
    return np.asarray(image.convert("RGB")), kinds


def _cmyk_to_rgb(image: Image.Image) -> Image.Image:
    """By the file's own colour profile where it has one that works, else by the plain formula."""
    profile = image.info.get("icc_profile")
    if profile:
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
            if converted is not None:
                return converted
        except (ImageCms.PyCMSError, OSError):  # a damaged profile: the plain formula is nearer than nothing
            pass
    return image.convert("RGB")
