"""Image files of records: found by exact name, opened, measured (size and perceptual hash), in parallel."""

from __future__ import annotations

import filecmp
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import imagehash
import numpy as np
from PIL import Image, UnidentifiedImageError

from dermfm.config import InputError, nearest
from dermfm.progress import track
from dermfm.records.duplicates import THUMBNAIL
from dermfm.records.preprocess.decode import decode
from dermfm.records.processes import mapping

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
MAX_PIXELS = 200_000_000  # larger files are refused: decompression bombs, whole-slide scans
CHUNK = 64  # images read by one call of a process


@dataclass(frozen=True)
class ImageFacts:
    """Size in pixels, 64-bit perceptual hash (16 hex digits) and grey thumbnail (duplicates.THUMBNAIL² bytes) of one
    image, or why it cannot be read."""

    width: int = 0
    height: int = 0
    phash: str = ""
    thumbnail: bytes = b""
    error: str = ""


class ImageFolder:
    """All images below a folder by the exact stem of their name; never by part of it. Hidden files are no images.

    `copies` collects files that `find` passed over because another folder holds the very same bytes.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            beside = self.folder.parent
            names = [path.name for path in beside.iterdir() if path.is_dir()] if beside.is_dir() else []
            hint = f"; {nearest(self.folder.name, names)}" if names else ""
            raise InputError(f"images={folder}: no such folder{hint}")
        self.copies: set[Path] = set()
        self._by_stem: dict[str, list[Path]] = {}
        self._by_folded: dict[str, list[str]] = {}
        for root, folders, names in os.walk(self.folder):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            for name in sorted(names):
                stem, suffix = os.path.splitext(name)
                if suffix.lower() in SUFFIXES and not name.startswith("."):
                    self._by_stem.setdefault(stem, []).append(Path(root, name))
        if not self._by_stem:
            raise InputError(f"images={folder}: holds no image ({', '.join(SUFFIXES)})")
        for stem in self._by_stem:
            self._by_folded.setdefault(stem.casefold(), []).append(stem)

    def find(self, dataset: str, name: str) -> Path | None:
        """`<folder>/<dataset>/<name>.*`, else `<folder>/<name>.*`, else the only image of that name anywhere below.

        `name` may have a suffix, which need not be the file's, and folders: then one in other folders is no match.
        Upper and lower case may differ where that is unambiguous (publishers' tables do). Of several files with the
        same bytes the first is taken.
        """
        place, stems = self._stems(name)
        if len(stems) != 1:
            return None
        paths = self._by_stem[stems[0]]
        for expected in (self.folder / dataset / place, self.folder / place, self.folder / dataset, self.folder):
            here = [path for path in paths if path.parent == expected]
            if here:
                return here[0]
        paths = self.of_name(name)
        if len(paths) > 1 and all(filecmp.cmp(paths[0], path, shallow=False) for path in paths[1:]):
            self.copies.update(paths[1:])
            return paths[0]
        return paths[0] if len(paths) == 1 else None

    def of_name(self, name: str) -> list[Path]:
        """The images of that name, in order; several where `find` cannot tell which is meant."""
        place, stems = self._stems(name)
        paths = [path for stem in stems for path in self._by_stem[stem]]
        return [path for path in paths if not place or _ends_with(path.parent, place)]

    def _stems(self, name: str) -> tuple[str, list[str]]:
        """Folders of a name, and the stems that it may mean."""
        place, _, last = name.replace("\\", "/").rpartition("/")
        stem, suffix = os.path.splitext(last)
        stem = stem if suffix.lower() in SUFFIXES else last
        return place, [stem] if stem in self._by_stem else self._by_folded.get(stem.casefold(), [])

    def paths(self) -> list[Path]:
        """All images, sorted."""
        return sorted(path for paths in self._by_stem.values() for path in paths)

    def resembling(self, name: str) -> str | None:
        """The stem of an image of which `name` is a part, or that is a part of it; None without one."""
        stem = os.path.splitext(name.rpartition("/")[2])[0]
        return next((other for other in self._by_stem if stem and (stem in other or other in stem)), None)

    def unnamed(self, named: set[Path], datasets: set[str]) -> list[Path]:
        """Images that no row names: below `<folder>/<dataset>` where such folders exist, else below the folder."""
        own = tuple(f"{self.folder / dataset}{os.sep}" for dataset in datasets if (self.folder / dataset).is_dir())
        known = named | self.copies
        others = (path for paths in self._by_stem.values() for path in paths if path not in known)
        return sorted(path for path in others if not own or str(path).startswith(own))


def _ends_with(folder: Path, place: str) -> bool:
    return f"/{folder.as_posix()}/".casefold().endswith(f"/{place}/".casefold())


def image_facts(path: Path) -> ImageFacts:
    """Open and decode one image (reduced while decoding, where JPEG allows it) and measure it."""
    try:
        with Image.open(path) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                return ImageFacts(error=f"{width}x{height} pixels, more than {MAX_PIXELS}")
            if image.format == "JPEG":
                image.draft("L", (128, 128))
            # Pillow's own conversion to grey cuts 16 bits off at white.
            is_plain = image.mode in ("L", "RGB")
            grey = image.convert("L") if is_plain else Image.fromarray(_decoded(path)).convert("L")
            thumbnail = grey.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX).tobytes()
            return ImageFacts(width, height, str(imagehash.phash(grey)), thumbnail)
    except (OSError, ValueError, SyntaxError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        return ImageFacts(error=f"{type(error).__name__}: {error}")


def _decoded(path: Path) -> np.ndarray:
    return decode(path.read_bytes(), MAX_PIXELS).pixels


def all_image_facts(paths: Sequence[Path], workers: int = 0) -> Iterator[ImageFacts]:
    """`image_facts` of every path in order, over `workers` processes (0: one a core; few images: in process)."""
    return track(_facts(paths, workers), len(paths), "reading images", "images")


def _facts(paths: Sequence[Path], workers: int) -> Iterator[ImageFacts]:
    blocks = [paths[k : k + CHUNK] for k in range(0, len(paths), CHUNK)]
    with mapping(workers, len(paths)) as mapped:
        yield from chain.from_iterable(mapped(_block_facts, blocks))


def _block_facts(paths: Sequence[Path]) -> list[ImageFacts]:
    return [image_facts(path) for path in paths]
