"""Colours of a lesion by the reference study's six words, with the share of the lesion that each covers.

The light is estimated first: skin of any tone has much the same hue, so that what its hue deviates from the usual is
the lamp's or camera's cast (the skin is the grey card).
"""

from __future__ import annotations

import cv2
import numpy as np

from dermfm.records.measure.columns import COLOURS
from dermfm.records.measure.mask import LesionMask, to_lab

SKIN_STEP = 4  # every so many pixels of skin are looked at
MIN_SHARE = 0.05  # of the lesion, from which a colour is named
# Share of red, green and blue in skin light (linear sRGB) of ITA 30 degrees: L* 59, a* 11, b* 18.
SKIN_CHROMATICITY = np.array([0.475, 0.304, 0.221])
BLACK_L, DARK_L = 25.0, 45.0
BLUE_HUE, RED_HUE = (170.0, 345.0), 42.0  # degrees in the a*b* plane


def balanced(found: LesionMask) -> np.ndarray:
    """The lesion's picture under neutral light: RGB uint8, each channel of linear sRGB scaled (von Kries) so that
    the skin's median has SKIN_CHROMATICITY. Gains stay within 0.7…1.4."""
    outside = found.valid & ~found.mask
    if not outside.any():
        return found.pixels
    # The median of what a rising table gives is what it gives of the median.
    skin = _LINEAR[_medians(found.pixels[outside])]
    gain = SKIN_CHROMATICITY / np.maximum(skin / max(float(skin.sum()), 1e-6), 1e-3)
    gain = np.clip(gain / np.exp(np.log(gain).mean()), 0.7, 1.4)
    return cv2.LUT(found.pixels, _encoded(_LINEAR[:, None] * gain)[None])


def _medians(values: np.ndarray) -> np.ndarray:
    """The (lower) median of each column of uint8 [N, 3]."""
    counts = [np.cumsum(np.bincount(column, minlength=256)) for column in values.T]
    return np.array([np.searchsorted(count, (len(values) + 1) // 2) for count in counts])


def colour_words(lab: np.ndarray, skin_l: float) -> np.ndarray:
    """Index into COLOURS of every CIELAB colour [..., 3] under neutral light; `skin_l` is the skin's lightness.

    Black is darker than L* 25; blue-gray lies on the blue side of the a*b* plane or is gray and no lighter than skin;
    white is pale, little coloured and lighter than skin; red has a hue near a*; the rest is brown, dark below L* 45.
    The six words are those of the ABCD rule of dermoscopy (Nachbar et al. 1994, J Am Acad Dermatol 30:551).
    """
    lightness, a, b = lab[..., 0], lab[..., 1], lab[..., 2]
    chroma, hue = np.hypot(a, b), np.degrees(np.arctan2(b, a)) % 360
    words = np.where(lightness < DARK_L, 3, 2)
    words = np.where((hue < RED_HUE) | (hue > BLUE_HUE[1]), 1, words)
    is_blue = (hue > BLUE_HUE[0]) & (hue < BLUE_HUE[1]) | (chroma < 7)
    words = np.where(is_blue, 4, words)
    is_white = (lightness > np.maximum(skin_l + 8, 66)) & (chroma < 17)
    words = np.where(is_white, 0, words)
    return np.where(lightness < BLACK_L, 5, words)


def colour_shares(found: LesionMask) -> np.ndarray:
    """Share of each of COLOURS in the lesion, [6], summing to 1; hairs are not counted."""
    smooth = cv2.GaussianBlur(balanced(found), (0, 0), 1.0)
    outside = smooth[found.valid & ~found.mask][::SKIN_STEP]
    skin_l = float(np.median(to_lab(outside[None])[..., 0])) if len(outside) else 60.0
    inside = found.mask & found.valid
    inside = inside if inside.any() else found.mask
    counts = np.bincount(colour_words(to_lab(smooth[inside][None])[0], skin_l), minlength=len(COLOURS))
    return counts / max(int(counts.sum()), 1)


def _encoded(linear: np.ndarray) -> np.ndarray:
    return _ENCODED[(np.clip(linear, 0, 1) * (len(_ENCODED) - 1) + 0.5).astype(np.int32)]


def _tables() -> tuple[np.ndarray, np.ndarray]:
    """sRGB to linear for 256 values, linear to sRGB uint8 for 65,536."""
    value = np.arange(256) / 255
    linear = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    steps = np.linspace(0, 1, 1 << 16)
    encoded = np.where(steps <= 0.0031308, 12.92 * steps, 1.055 * steps ** (1 / 2.4) - 0.055)
    return linear.astype(np.float32), (255 * encoded + 0.5).astype(np.uint8)


_LINEAR, _ENCODED = _tables()
