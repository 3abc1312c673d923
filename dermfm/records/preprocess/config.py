"""Settings of the preprocessing: a part of the configuration of `dermfm records`."""

from __future__ import annotations

from dataclasses import dataclass

from dermfm.config import check_choice, check_range, key

SQUARES = ("none", "crop", "pad")


@dataclass(kw_only=True)
class PreprocessConfig:
    """Steps in the order in which they happen; configs/data/preprocess/ has ready settings."""

    enabled: bool = key(False, "write preprocessed images to records/images; false: images stay as and where they are")
    max_pixels: int = key(200_000_000, "images of more pixels are left out")
    frame: bool = key(True, "cut off black frames, and of a round view in a black surround keep the inner rectangle")
    hair: bool = key(False, "remove dark hairs: black-hat and inpainting")
    square: str = key(
        "none", f"{', '.join(SQUARES)}: keep the aspect, cut the centre square, or pad with border colour"
    )
    margin: float = key(0.0, "share of each side that is cut off at every edge")
    size: int = key(512, "shorter side is reduced to it (never enlarged); 0: as it is")
    quality: int = key(92, "JPEG quality of what is written")

    def __post_init__(self) -> None:
        check_range("preprocess.max_pixels", self.max_pixels, 1)
        check_choice("preprocess.square", self.square, SQUARES)
        check_range("preprocess.margin", self.margin, 0, 0.4)
        check_range("preprocess.size", self.size, 0, 8192)
        if 0 < self.size < 16:
            raise ValueError(f"preprocess.size: {self.size} is not valid; at least 16, or 0 for as it is")
        check_range("preprocess.quality", self.quality, 30, 100)
