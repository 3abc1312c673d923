"""One source of records: which layout, where its table and images lie, how it is split."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from dermfm.config import check_choice, check_range, key
from dermfm.records.vocabulary import MODALITIES

LAYOUTS = [
    "generic",
    "isic",
    "ham10000",
    "milk10k",
    "pad_ufes_20",
    "derm7pt",
    "fitzpatrick17k",
    "mra_midas",
    "ph2",
    "folders",
    "derm1m",
    "reference",
    "atlas",
]
SPLIT_RULES = ["lesions", "test", "given"]


@dataclass(kw_only=True)
class AtlasConfig:
    """The embedded atlas: lesions drawn procedurally, with known truth."""

    seed: int = key(0, "seed of every lesion; the same seed gives the same bytes")
    num_dermo: int = key(800, "images of Atlas_dermo (internal, dermoscopic)")
    num_clinic: int = key(300, "images of Atlas_clinic (external, clinical, other camera and skin)")
    size: int = key(160, "side of the square images in pixels")
    quality: int = key(90, "JPEG quality")
    second_image: float = key(0.15, "share of lesions with two images")
    confusion: float = key(0.08, "share of lesions whose appearance is drawn from a class that resembles theirs")

    def __post_init__(self) -> None:
        check_range("num_dermo", self.num_dermo, 0)
        check_range("num_clinic", self.num_clinic, 0)
        check_range("size", self.size, 64, 1024)
        check_range("quality", self.quality, 50, 100)
        check_range("second_image", self.second_image, 0, 1)
        check_range("confusion", self.confusion, 0, 1)


@dataclass(kw_only=True)
class SourceConfig:
    """One table with its images. Empty images, table or layout are taken from the top level of the config."""

    layout: str = key("", f"table layout: {', '.join(LAYOUTS)}")
    images: str = key("", "folder of the images (searched by exact file name, with or without a folder per data set)")
    table: str = key("", "table file of the data set (layout=reference: the folder of the tables)")
    dataset: str = key("", "name of the data set where the table does not name it (generic, isic, folders)")
    pattern: str = key("", "layout=folders: regular expression of a path below `images` without suffix, see folders.py")
    datasets: list[str] = key([], "read only these data sets of the source; empty means all")
    splits: str = key(
        "lesions", "lesions: train/valid/test by lesion; test: test only; given: as the publisher or study split it"
    )
    split_tables: str = key("", "splits=given: folder of the reference study's CSVs, to take its split for these ids")
    test_only: list[str] = key([], "data sets of this source that are test only (external)")
    modality: str = key("", "dermoscopic or clinical, where the table does not say")
    licence: str = key("", "licence, where the table does not say")
    ground_truth: str = key("", "MILK10k ground truth table; empty: the *GroundTruth.csv beside `table`")
    supplement: str = key("", "MILK10k supplement table; empty: the *Supplement.csv beside `table`")
    atlas: AtlasConfig = key(AtlasConfig, "settings of layout=atlas")

    def __post_init__(self) -> None:
        if self.layout:
            check_choice("layout", self.layout, LAYOUTS)
        check_choice("splits", self.splits, SPLIT_RULES)
        if self.modality:
            check_choice("modality", self.modality, MODALITIES)

    def is_wanted(self, dataset: str) -> bool:
        """Whether records of this data set are to be read."""
        return not self.datasets or dataset in self.datasets

    def is_test_only(self, dataset: str) -> bool:
        """Whether records of this data set may only be test records."""
        return self.splits == "test" or dataset in self.test_only


NAMED, KEPT = 10, 1000
REST = "…"  # name of those that the records' file does not keep


@dataclass
class Losses:
    """What was left out or is odd: how often each name of each kind occurred."""

    kinds: dict[str, Counter[str]] = field(default_factory=dict)

    def add(self, kind: str, name: str) -> None:
        """Count one item of `kind`."""
        self.kinds.setdefault(kind, Counter())[name] += 1

    def count(self, kind: str) -> int:
        """Number of items of `kind`."""
        return sum(self.kinds.get(kind, Counter()).values())

    def most_common(self, kind: str, number: int) -> list[tuple[str, int]]:
        """(name, times) of the most frequent known names of `kind`."""
        known = Counter({name: times for name, times in self.kinds[kind].items() if name != REST})
        return known.most_common(number)

    def to_json(self) -> bytes:
        """As the records' file keeps it, so that a report can tell it later; of a kind at most KEPT names are kept."""
        kept = {
            kind: {"count": self.count(kind), "names": names.most_common(KEPT)} for kind, names in self.kinds.items()
        }
        return json.dumps(kept, ensure_ascii=False).encode()

    @classmethod
    def from_json(cls, text: bytes) -> Losses:
        """What `to_json` kept; counts stay whole: names beyond KEPT count under REST."""
        losses = cls()
        for kind, kept in json.loads(text or b"{}").items():
            names = Counter(dict(kept["names"]))
            if (rest := kept["count"] - sum(names.values())) > 0:
                names[REST] = rest
            losses.kinds[kind] = names
        return losses

    def lines(self) -> list[str]:
        """One line a kind: 'kind: 5 (a, b ×3, c)'; the most frequent ten are named."""
        lines = []
        for kind, names in self.kinds.items():
            shown = [name if n == 1 else f"{name} ×{n}" for name, n in self.most_common(kind, NAMED)]
            more = ", …" if len(names) > NAMED else ""
            lines.append(f"{kind}: {self.count(kind)} ({', '.join(shown)}{more})")
        return lines


@dataclass(frozen=True)
class Reading:
    """One run of `dermfm records`: folder of records.parquet, processes to use, whether to write, what was lost."""

    folder: Path
    workers: int = 0
    dry_run: bool = False
    losses: Losses = field(default_factory=Losses)
