"""One file a table layout. An adapter is a function `read(source, reading) -> list[Record]`.

It reads the source's own tables, finds each row's image by exact id, and fills what the tables say;
`reading.losses` takes what had to be left out. Everything after that (conflicts, groups, splits) is the same for all
data sets.
"""

from __future__ import annotations

from collections.abc import Callable

from dermfm.records.adapters import (
    atlas,
    derm1m,
    derm7pt,
    fitzpatrick17k,
    folders,
    generic,
    ham10000,
    isic,
    milk10k,
    mra_midas,
    pad_ufes_20,
    ph2,
    reference,
)
from dermfm.records.source import Reading, SourceConfig
from dermfm.records.table import Record

Adapter = Callable[[SourceConfig, Reading], list[Record]]

ADAPTERS: dict[str, Adapter] = {
    "generic": generic.read,
    "isic": isic.read,
    "ham10000": ham10000.read,
    "milk10k": milk10k.read,
    "pad_ufes_20": pad_ufes_20.read,
    "derm7pt": derm7pt.read,
    "fitzpatrick17k": fitzpatrick17k.read,
    "mra_midas": mra_midas.read,
    "ph2": ph2.read,
    "folders": folders.read,
    "derm1m": derm1m.read,
    "reference": reference.read,
    "atlas": atlas.read,
}
