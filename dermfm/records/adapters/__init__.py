"""One file a table layout. An adapter is a function `read(source, reading) -> list[Record]`.

It reads the source's own tables, finds each row's image by exact id, and fills what the tables say;
`reading.losses` takes what had to be left out. Everything after that (conflicts, groups, splits) is the same for all
data sets.
"""

from __future__ import annotations

from collections.abc import Callable

from dermfm.records.adapters import atlas, generic, ham10000, milk10k
from dermfm.records.source import Reading, SourceConfig
from dermfm.records.table import Record

Adapter = Callable[[SourceConfig, Reading], list[Record]]

ADAPTERS: dict[str, Adapter] = {
    "generic": generic.read,
    "ham10000": ham10000.read,
    "milk10k": milk10k.read,
    "atlas": atlas.read,
}
