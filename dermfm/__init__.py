"""Image-text foundation models for skin lesions, pretrained on synthesized clinical notes."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from dermfm.export.model import Exported


def load(path: str | Path, device: str = "cpu") -> Exported:
    """The model that `dermfm export` wrote to `path`: encode_image, encode_text, classify, match, write_report.

    Raises dermfm.config.InputError where `path` is not such a folder.
    """
    from dermfm.export.model import load as load_exported  # torch is imported only where a model is wanted

    return load_exported(path, device)
