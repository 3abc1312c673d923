"""From the bytes of an encoded image to pixels: decoded no larger than needed, cropped, turned, blurred, coloured."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass

import numpy as np
import simplejpeg
import torch
import torch.nn.functional as F
from PIL import Image

from dermfm.batch_memory import take
from dermfm.config import check_range, key

LUMA = (0.299, 0.587, 0.114)
_NUM_DRAWS = 16  # uniform numbers drawn for one image, used or not


@dataclass(kw_only=True)
class AugmentConfig:
    """How a training image is varied. Strengths are half-widths around 'unchanged'; 0 (or false) switches one off."""

    crop_area_min: float = key(0.4, "smallest area of the random crop, as a share of the image")
    crop_area_max: float = key(1.0, "largest area of the random crop, as a share of the image")
    crop_aspect: float = key(1.33, "the crop's width : height lies between 1/this and this")
    flip: bool = key(True, "mirror left-right and top-bottom, each for half of the images")
    rotate90: bool = key(True, "turn by 0, 90, 180 or 270 degrees")
    brightness: float = key(0.25, "factor on all channels within 1 ± this")
    contrast: float = key(0.25, "factor on the distance from the image's mean grey within 1 ± this")
    saturation: float = key(0.25, "factor on the distance from grey within 1 ± this")
    hue: float = key(0.03, "turn of the hue within ± this share of the full circle")
    white_balance: float = key(0.1, "factor on each colour channel by itself within 1 ± this: cameras differ")
    blur: float = key(0.2, "share of the images that are blurred")
    blur_sigma: float = key(1.5, "largest standard deviation of the Gaussian blur, in output pixels")

    def __post_init__(self) -> None:
        check_range("crop_area_min", self.crop_area_min, 0.01, 1)
        check_range("crop_area_max", self.crop_area_max, self.crop_area_min, 1)
        check_range("crop_aspect", self.crop_aspect, 1, 4)
        for name in ("brightness", "contrast", "saturation", "white_balance", "blur"):
            check_range(name, getattr(self, name), 0, 1)
        check_range("hue", self.hue, 0, 0.5)
        check_range("blur_sigma", self.blur_sigma, 0, 20)


def empty_images(count: int, size: int, augment: AugmentConfig | None = None) -> torch.Tensor:
    """Memory for a batch of images, uint8 [count, 3, size, size], in the order in which `decode_into` is fastest."""
    if augment is not None:
        return take(count, 3, size, size)
    return take(count, size, size, 3).permute(0, 3, 1, 2)  # as a JPEG decoder writes


def decode_image(
    data: bytes, size: int, rng: np.random.Generator | None = None, augment: AugmentConfig | None = None
) -> np.ndarray:
    """uint8 [3, size, size] of an encoded image, as `decode_into` makes it; it may have its channels last in memory."""
    pixels = empty_images(1, size, augment)[0]
    decode_into(pixels, data, rng, augment)
    return pixels.numpy()


def decode_into(
    pixels: torch.Tensor,
    data: bytes,
    rng: np.random.Generator | None = None,
    augment: AugmentConfig | None = None,
) -> None:
    """Fill `pixels`, uint8 [3, S, S], with an encoded image; JPEGs are decoded no larger than needed.

    Without `augment`: the shorter side is resized to S and the centre square taken. With it, `rng` gives a crop,
    flips, a turn, colours and blur. Raises ValueError or OSError for what cannot be decoded.
    """
    draws = rng.random(_NUM_DRAWS) if augment is not None and rng is not None else None
    height, width = image_shape(data)
    if augment is None or draws is None:
        _decode_box(data, height, width, _centre_square(height, width), pixels)
        return
    plain = torch.empty(*pixels.shape[1:], 3, dtype=torch.uint8).permute(2, 0, 1)
    _decode_box(data, height, width, _random_box(height, width, augment, draws[:4]), plain)
    _blur_and_colour(_orient(plain, augment, draws[4:7]), augment, draws[7:], pixels)


def image_shape(data: bytes) -> tuple[int, int]:
    """(height, width) of an encoded image, from its header."""
    if data[:2] == b"\xff\xd8":
        height, width, _, _ = simplejpeg.decode_jpeg_header(data)
        return height, width
    with Image.open(io.BytesIO(data)) as image:
        return image.height, image.width


def _centre_square(height: int, width: int) -> tuple[float, float, float, float]:
    side = min(height, width)
    top, left = (height - side) / 2, (width - side) / 2
    return top, left, top + side, left + side


def _random_box(
    height: int, width: int, augment: AugmentConfig | None, draws: np.ndarray
) -> tuple[float, float, float, float]:
    """(top, left, bottom, right): area and log aspect ratio uniform, cut to the image, placed uniformly."""
    assert augment is not None
    area = height * width * (augment.crop_area_min + draws[0] * (augment.crop_area_max - augment.crop_area_min))
    aspect = math.exp((2 * draws[1] - 1) * math.log(augment.crop_aspect))
    crop_height, crop_width = min(height, math.sqrt(area / aspect)), min(width, math.sqrt(area * aspect))
    top, left = draws[2] * (height - crop_height), draws[3] * (width - crop_width)
    return top, left, top + crop_height, left + crop_width


def _decode_box(
    data: bytes, height: int, width: int, box: tuple[float, float, float, float], out: torch.Tensor
) -> None:
    """Fill `out` with the box of the image, resized. A JPEG is decoded at the smallest scale that suffices."""
    size = out.shape[-1]
    top, left, bottom, right = box
    if data[:2] == b"\xff\xd8":
        min_height = min(height, math.ceil(size * height / max(bottom - top, 1)))
        min_width = min(width, math.ceil(size * width / max(right - left, 1)))
        array = simplejpeg.decode_jpeg(
            data, "RGB", fastdct=False, fastupsample=False, min_height=min_height, min_width=min_width
        )
    else:
        with Image.open(io.BytesIO(data)) as image:
            array = np.array(image.convert("RGB"))
    down, across = array.shape[0] / height, array.shape[1] / width
    rows = slice(round(top * down), max(round(bottom * down), round(top * down) + 1))
    columns = slice(round(left * across), max(round(right * across), round(left * across) + 1))
    part = torch.from_numpy(array)[None].permute(0, 3, 1, 2)[:, :, rows, columns]
    if part.shape[-2:] == (size, size):
        out.copy_(part[0])
    else:  # what F.interpolate(mode="bicubic", antialias=True) calls, which has no `out`: it would cost a copy
        torch.ops.aten._upsample_bicubic2d_aa.out(part, [size, size], False, None, None, out=out[None])


def _orient(pixels: torch.Tensor, augment: AugmentConfig, draws: np.ndarray) -> torch.Tensor:
    if augment.flip:
        mirrored = [dim for dim, draw in ((-1, draws[0]), (-2, draws[1])) if draw < 0.5]
        pixels = torch.flip(pixels, mirrored) if mirrored else pixels
    if augment.rotate90:
        pixels = torch.rot90(pixels, int(draws[2] * 4), (-2, -1))
    return pixels


def _blur_and_colour(pixels: torch.Tensor, augment: AugmentConfig, draws: np.ndarray, out: torch.Tensor) -> None:
    """Fill `out`. All colour changes are one affine map of RGB, so the pixels are touched once."""
    values = pixels.contiguous().float()
    if draws[0] < augment.blur and augment.blur_sigma > 0:
        values = gaussian_blur(values, 0.1 + draws[1] * max(augment.blur_sigma - 0.1, 0))
    grey = float(torch.tensor(LUMA) @ values[:, ::4, ::4].mean((1, 2)))
    matrix, offset = colour_map(augment, draws[2:9], grey)
    flat = torch.addmm(torch.from_numpy(offset)[:, None], torch.from_numpy(matrix), values.reshape(3, -1))
    out.copy_(flat.round_().clamp_(0, 255).reshape(values.shape))


def colour_map(augment: AugmentConfig, draws: np.ndarray, grey: float) -> tuple[np.ndarray, np.ndarray]:
    """(matrix [3, 3], offset [3]) float32 of the colour change that uniform `draws` [7] ask for.

    `grey` is the image's mean luma. In this order: white balance and brightness, contrast around the mean grey,
    saturation around luma, and a turn of the hue in the YIQ plane.
    """
    spread = 2 * draws - 1
    gains = (1 + augment.white_balance * spread[:3]) * (1 + augment.brightness * spread[3])
    contrast = 1 + augment.contrast * spread[4]
    saturation = 1 + augment.saturation * spread[5]
    luma = np.tile(np.asarray(LUMA), (3, 1))
    saturate = saturation * np.eye(3) + (1 - saturation) * luma
    turn = hue_rotation(2 * math.pi * augment.hue * spread[6])
    matrix = turn @ saturate @ np.diag(contrast * gains)
    offset = np.full(3, (1 - contrast) * (1 + augment.brightness * spread[3]) * grey)
    return matrix.astype(np.float32), offset.astype(np.float32)


def hue_rotation(angle: float) -> np.ndarray:
    """[3, 3]: the linear map of RGB that turns the chroma plane of YIQ by `angle` radians and keeps luma."""
    to_yiq = np.asarray([LUMA, (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112)])
    cos, sin = math.cos(angle), math.sin(angle)
    turn = np.asarray([(1, 0, 0), (0, cos, -sin), (0, sin, cos)])
    return np.linalg.inv(to_yiq) @ turn @ to_yiq


def gaussian_blur(values: torch.Tensor, sigma: float) -> torch.Tensor:
    """float [3, H, W] blurred by a Gaussian of `sigma` pixels, cut at three sigma, borders replicated."""
    radius = max(1, min(math.ceil(3 * sigma), *(side - 1 for side in values.shape[-2:])))
    weights = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    weights /= weights.sum()
    return _weighted_shifts(_weighted_shifts(values, weights, dim=2), weights, dim=1)


def _weighted_shifts(values: torch.Tensor, weights: np.ndarray, dim: int) -> torch.Tensor:
    """A convolution along `dim` as a sum of shifted copies: at three channels twice as fast as conv2d on a CPU."""
    radius, length = len(weights) // 2, values.shape[dim]
    margins = (radius, radius, 0, 0) if dim == 2 else (0, 0, radius, radius)
    padded = F.pad(values[None], margins, mode="replicate")[0]
    total = padded.narrow(dim, 0, length) * float(weights[0])
    for shift in range(1, len(weights)):
        total.add_(padded.narrow(dim, shift, length), alpha=float(weights[shift]))
    return total
