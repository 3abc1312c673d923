"""Groups: the connected components over lesion, patient and duplicate images, unique across data sets.

Splits, masked negatives, exclusion from pools and the bootstrap all use them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from dermfm.records.source import Losses
from dermfm.records.table import Record
from dermfm.records.vocabulary import CLASS_CODES, FAMILY_OF

WITHIN, ACROSS = "duplicate images within a data set", "duplicate images across data sets"
OTHER_LABEL = "duplicate images with different labels"
LESION_LABELS = "lesions whose images have different labels"
DROPPED = "copies left out"


def assign_groups(records: Sequence[Record], duplicates: Iterable[tuple[int, int]], losses: Losses) -> None:
    """Set `group_id` of every record: the smallest record_id of its component. `duplicates` are counted in `losses`."""
    pairs = [*_shared_ids(records)]
    for i, j in duplicates:
        pairs.append((i, j))
        if not _same_lesion(records[i], records[j]):
            _count(records[i], records[j], losses)
    component = _components(len(records), pairs)
    ids = [record.record_id for record in records]
    smallest: dict[int, str] = {}
    for name, number in zip(ids, component, strict=True):
        smallest[number] = min(smallest.get(number, name), name)
    for record, number in zip(records, component, strict=True):
        record.group_id = smallest[number]


def drop_copies(records: Sequence[Record], duplicates: Iterable[tuple[int, int]], losses: Losses) -> list[Record]:
    """One record of every set of copies, in order; the others are counted.

    A test-only record is kept before others (external test sets stay whole), a labelled one before one without a label,
    then the first. Call it after `assign_groups`: what a copy links stays linked.
    """
    copies: dict[int, list[int]] = defaultdict(list)
    for i, number in enumerate(_components(len(records), list(duplicates))):
        copies[number].append(i)
    kept = {
        min(each, key=lambda i: (not records[i].test_only, records[i].label is None, i)) for each in copies.values()
    }
    for i, record in enumerate(records):
        if i not in kept:
            losses.add(DROPPED, f"{record.dataset}/{record.source_id}")
    return [records[i] for i in sorted(kept)]


def _components(size: int, pairs: Sequence[tuple[int, int]]) -> list[int]:
    """The number of the connected component of each of `size` items."""
    rows, columns = np.array(pairs or [(0, 0)]).T
    graph = coo_matrix((np.ones(len(rows)), (rows, columns)), shape=(size, size))
    return connected_components(graph, directed=False)[1].tolist()


def _shared_ids(records: Sequence[Record]) -> Iterator[tuple[int, int]]:
    """Pairs (first record of a lesion or patient, another one of it); ids count within a family of data sets."""
    first: dict[tuple[str, str, str], int] = {}
    for i, record in enumerate(records):
        family = FAMILY_OF.get(record.dataset, record.dataset)
        for kind, value in (("lesion", record.lesion_id), ("patient", record.patient_id)):
            if value:
                j = first.setdefault((family, kind, value), i)
                if j != i:
                    yield j, i


def count_lesion_conflicts(records: Sequence[Record], losses: Losses) -> None:
    """Count the lesions whose records have more than one label; nothing is changed."""
    labels: dict[tuple[str, str], set[int]] = defaultdict(set)
    for record in records:
        if record.lesion_id is not None and record.label is not None:
            labels[FAMILY_OF.get(record.dataset, record.dataset), record.lesion_id].add(record.label)
    for (family, lesion), found in labels.items():
        if len(found) > 1:
            codes = " and ".join(CLASS_CODES[label] for label in sorted(found))
            losses.add(LESION_LABELS, f"{family}/{lesion}: {codes}")


def _same_lesion(one: Record, two: Record) -> bool:
    families = {FAMILY_OF.get(record.dataset, record.dataset) for record in (one, two)}
    return len(families) == 1 and one.lesion_id is not None and one.lesion_id == two.lesion_id


def _count(one: Record, two: Record, losses: Losses) -> None:
    names = f"{one.dataset}/{one.source_id} = {two.dataset}/{two.source_id}"
    losses.add(WITHIN if one.dataset == two.dataset else ACROSS, names)
    if None not in (one.label, two.label) and one.label != two.label:
        codes = f"{CLASS_CODES[one.label or 0]} and {CLASS_CODES[two.label or 0]}"
        losses.add(OTHER_LABEL, f"{names}: {codes}")
