"""One image: its bytes before, its bytes after. The same bytes on every run and in any process."""

from __future__ import annotations

import math
from dataclasses import dataclass

import cv2
import numpy as np
import simplejpeg

from dermfm.records.measure.hair import remove_hair
from dermfm.records.preprocess.config import PreprocessConfig
from dermfm.records.preprocess.crop import Box, centre_square, frame_box, padded_square, without_margin
from dermfm.records.preprocess.decode import Decoded, decode

VERSION = 2  # raise it when the same settings give other bytes: older images are written again
FRAMED = "images with a black frame or round view, cut"
HAIRY = "images with hair removed"
SMALL = "images smaller than preprocess.size, not enlarged"
SAME = "images that needed no change, kept byte for byte"
FRAME_ROOM = 1.5  # how much larger than needed a JPEG is decoded where a frame may be cut off


@dataclass(frozen=True)
class Prepared:
    """jpeg: bytes to write, None where the file itself is the result; width, height: of the result; kinds: what was
    odd or done, as counted in the summary."""

    jpeg: bytes | None
    width: int
    height: int
    kinds: tuple[str, ...]


def prepare(data: bytes, config: PreprocessConfig) -> Prepared:
    """Preprocess the bytes of an image file. ImageError where it cannot be used.

    Order: decode, turn upright, cut the frame, square, margin, resize, hair, encode. Hair is removed at the final
    size: a kernel that follows the size then costs the same for every image.
    """
    decoded, frame = _decode_enough(data, config)
    kinds = [*decoded.kinds, *([FRAMED] if frame else [])]
    height, width = decoded.pixels.shape[:2]
    box = kept_box(frame or (0, 0, width, height), config)
    pixels = decoded.pixels[box[1] : box[3], box[0] : box[2]]
    if config.square == "pad" and pixels.shape[0] != pixels.shape[1]:
        pixels = padded_square(pixels)
    if config.size and min(pixels.shape[:2]) < config.size and not decoded.is_reduced:
        kinds.append(SMALL)
    pixels = resized(pixels, config.size)
    if config.hair:
        before, pixels = pixels, remove_hair(pixels)
        kinds.extend([HAIRY] if pixels is not before else [])
    unchanged = decoded.plain and pixels.shape[:2] == decoded.full_size[::-1] and HAIRY not in kinds
    jpeg = None if unchanged else encode(pixels, config.quality)
    return Prepared(jpeg, pixels.shape[1], pixels.shape[0], (*kinds, *([SAME] if unchanged else [])))


def kept_box(box: Box, config: PreprocessConfig) -> Box:
    """What square and margin leave of a rectangle."""
    if config.square == "crop":
        left, top, right, bottom = centre_square(box[2] - box[0], box[3] - box[1])
        box = (box[0] + left, box[1] + top, box[0] + right, box[1] + bottom)
    return without_margin(box, config.margin)


def resized(pixels: np.ndarray, size: int) -> np.ndarray:
    """The picture with its shorter side reduced to `size`; as it is where it is smaller or `size` is 0."""
    height, width = pixels.shape[:2]
    shorter = min(height, width)
    if not size or shorter <= size:
        return np.ascontiguousarray(pixels)
    new = (max(1, round(width * size / shorter)), max(1, round(height * size / shorter)))
    return cv2.resize(pixels, new, interpolation=cv2.INTER_AREA)


def encode(pixels: np.ndarray, quality: int) -> bytes:
    """JPEG bytes of RGB uint8; full colour resolution, since colour is what is looked at."""
    return simplejpeg.encode_jpeg(pixels, quality, "RGB", "444", False)


def _decode_enough(data: bytes, config: PreprocessConfig) -> tuple[Decoded, Box | None]:
    """The picture, reduced while decoding only as far as no step after it has to enlarge; and the rectangle in its
    frame."""
    need = math.ceil(config.size / (1 - 2 * config.margin)) if config.size and config.square != "pad" else 0
    decoded = decode(data, config.max_pixels, math.ceil(need * FRAME_ROOM) if config.frame else need)
    frame = frame_box(decoded.pixels) if config.frame else None
    if frame and decoded.is_reduced and min(frame[2] - frame[0], frame[3] - frame[1]) < need:
        decoded = decode(data, config.max_pixels)
        frame = frame_box(decoded.pixels)
    return decoded, frame
