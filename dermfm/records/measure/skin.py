"""Skin tone of the skin around the lesion: individual typology angle, its band, and an estimated Fitzpatrick type."""

from __future__ import annotations

import numpy as np

# Lower bounds in degrees (Chardon et al. 1991, Int J Cosmet Sci 13:191; Del Bino & Bernerd 2013, Br J Dermatol 169
# s3:33).
BANDS = ((55.0, "very light"), (41.0, "light"), (28.0, "intermediate"), (10.0, "tan"), (-30.0, "brown"))
DARKEST = "dark"
SAMPLE = 2000  # pixels of skin that are looked at
MIN_SKIN_B = 6.0  # b* of skin under white light is 10 to 25


def typology_angle(lightness: float, b: float) -> float:
    """ITA = arctan((L* - 50) / b*) in degrees; L* and b* of skin under D65 (Chardon et al. 1991)."""
    return float(np.degrees(np.arctan2(lightness - 50, max(b, 1e-6))))


def band(angle: float) -> str:
    """The band of an angle: very light, light, intermediate, tan, brown or dark."""
    return next((name for lowest, name in BANDS if angle > lowest), DARKEST)


def fitzpatrick(angle: float) -> int:
    """Fitzpatrick type 1…6 estimated by the bands in order (as in Kinyanjui et al. 2020, MICCAI, LNCS 12266:320).

    Types describe how skin reacts to the sun, not its colour: the estimate is often one type off.
    """
    return next((i for i, (lowest, _) in enumerate(BANDS, start=1) if angle > lowest), len(BANDS) + 1)


def skin_angle(lab: np.ndarray, is_skin: np.ndarray) -> tuple[float, float]:
    """(ITA of the median skin colour, confidence 0…1) of CIELAB [H, W, 3] and the skin's pixels.

    Shadows and highlights, the outer quarters of lightness, are left out. The confidence falls with little skin and
    with the spread of the angle over it; that the light of a photograph is not calibrated is not in it.
    """
    places = np.flatnonzero(is_skin)
    if len(places) < 50:
        return 0.0, 0.0
    skin = lab.reshape(-1, 3)[places[:: max(1, len(places) // SAMPLE)]]
    low, high = np.quantile(skin[:, 0], [0.25, 0.75])
    middle = skin[(skin[:, 0] >= low) & (skin[:, 0] <= high)]
    lightness, _, b = np.median(middle, axis=0)
    angles = np.degrees(np.arctan2(skin[:, 0] - 50, np.maximum(skin[:, 2], 1e-6)))
    spread = float(np.subtract(*np.quantile(angles, [0.75, 0.25])))
    like_skin = float(np.clip(b / MIN_SKIN_B, 0, 1))  # coloured light: the angle then says little
    confidence = float(min(1, len(places) / is_skin.size / 0.2) * np.exp(-spread / 40)) * like_skin
    return typology_angle(float(lightness), float(b)), confidence
