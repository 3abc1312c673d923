"""Train, valid and test by group: deterministic, stratified by data set and class, without leaks.

Within a stratum (data set, label) the groups are ordered by a hash of seed and group id; the first ones, up to the test
fraction of the stratum's images, become test, the next ones valid. So a rare class has test images as soon as it has
two groups, and no clock, order of files or random generator has a say.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

from dermfm.config import short_hash
from dermfm.records.source import Losses
from dermfm.records.table import SPLITS, Record

MOVED = "records moved to test because an external data set shares their group"
LEAK = "groups that the given split divides"
TWICE = "images that the given split puts on two sides, taken for the later one"

Stratum = tuple[str, int | None]


def assign_splits(records: Sequence[Record], seed: int, valid: float, test: float, losses: Losses) -> None:
    """Set `split` of every record. A group with a test-only record is test as a whole; a given split is kept."""
    groups: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        groups[record.group_id].append(record)
    free: dict[Stratum, dict[str, list[Record]]] = defaultdict(dict)
    for group_id, members in groups.items():
        if any(record.test_only for record in members):
            _all_test(members, losses)
        elif any(record.given_split for record in members):
            _as_given(group_id, members, losses)
        else:
            free[_stratum(members)][group_id] = members
    for stratum in free.values():
        _split_stratum(stratum, seed, valid, test)


def _stratum(members: list[Record]) -> Stratum:
    """The most frequent (data set, label) of a group; ties by order."""
    counts = Counter((record.dataset, record.label) for record in members)
    return max(counts, key=lambda s: (counts[s], s[0], -1 if s[1] is None else s[1]))


def _split_stratum(groups: dict[str, list[Record]], seed: int, valid: float, test: float) -> None:
    order = sorted(groups, key=lambda group_id: short_hash([seed, group_id]))
    total = sum(len(members) for members in groups.values())
    quota = {"test": test * total, "valid": valid * total}
    least = {"test": int(test > 0 and len(order) >= 2), "valid": int(valid > 0 and len(order) >= 3)}
    for name in ("test", "valid"):
        images = taken = 0
        while order and (taken < least[name] or images + len(groups[order[0]]) / 2 <= quota[name]):
            members = groups[order.pop(0)]
            images, taken = images + len(members), taken + 1
            for record in members:
                record.split = name
    for group_id in order:
        for record in groups[group_id]:
            record.split = "train"


def _all_test(members: list[Record], losses: Losses) -> None:
    for record in members:
        record.split = "test"
        if not record.test_only:
            losses.add(MOVED, f"{record.dataset}/{record.source_id}")


def _as_given(group_id: str, members: list[Record], losses: Losses) -> None:
    """The publisher's split; a record without one follows its group. A divided group is counted, not repaired."""
    given = [record.given_split for record in members if record.given_split]
    if len(set(given)) > 1:
        names = ", ".join(f"{r.source_id} {r.given_split}" for r in members[:3])
        losses.add(LEAK, f"{members[0].dataset}: {names}")
    last = max((split for split in given if split), key=SPLITS.index)
    for record in members:
        record.split = record.given_split or last
