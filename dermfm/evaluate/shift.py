"""Where a number is measured: every data set and the partitions of the protocol."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from dermfm.config import InputError, check_choice, key, nearest
from dermfm.evaluate.classify import METRICS
from dermfm.evaluate.records import RecordSet
from dermfm.records.vocabulary import CLASSES

QUIRKS = ("all_splits_in_pool", "self_in_pool", "merge_identical", "bare_words")
CLASS_MATCHED = "external, classes as internal"  # a scope of its own: the same records, weighted
ENDPOINTS = tuple(metric for metric in METRICS if metric not in ("auroc", "ece"))  # predicted classes suffice
PARTITIONS = ("internal", "external", "dermoscopic", "clinical", "all")


@dataclass(kw_only=True)
class ProtocolConfig:
    """Which data sets play which role, and how they are scored."""

    name: str = key("strict", "strict (own group out of the pool), or reference (the pool of the reference study)")
    internal: list[str] = key([], "data sets of the training domain; empty: those with training samples in the shards")
    external: list[str] = key([], "data sets under domain shift; empty: all others")
    endpoint: str = key(
        "f1_macro", "metric of the primary endpoint: image classification, mean over external data sets"
    )
    all_splits_in_pool: bool | None = key(None, "the pool holds training and validation records too; null: reference")
    self_in_pool: bool | None = key(None, "the query itself, and its group, stay in the pool; null: reference only")
    merge_identical: bool | None = key(None, "identical embeddings stand in the pool once; null: reference only")
    bare_words: bool | None = key(None, "zero-shot by the bare class words alone; null: reference only")

    def __post_init__(self) -> None:
        check_choice("protocol.name", self.name, ("strict", "reference"))
        check_choice("protocol.endpoint", self.endpoint, ENDPOINTS)
        both = sorted(set(self.internal) & set(self.external))
        if both:
            raise ValueError(f"protocol.external: '{both[0]}' is also in protocol.internal; a data set has one role")
        for quirk in QUIRKS:
            if self.name == "strict" and getattr(self, quirk):
                raise ValueError(
                    f"protocol.{quirk}: true exists in the reference protocol only; protocol.name=reference"
                )

    def has(self, quirk: str) -> bool:
        """Whether one of QUIRKS is on: as given, else as the named protocol has it."""
        given = getattr(self, quirk)
        return self.name == "reference" if given is None else bool(given)


@dataclass(frozen=True)
class Scope:
    """A set of records that numbers are given for: `mask` bool [N].

    `like` bool [N]: the records whose class frequencies those of the set are weighted to; None: the set as it is.
    """

    kind: str
    name: str
    mask: np.ndarray
    like: np.ndarray | None = None


def resolve_roles(protocol: ProtocolConfig, present: list[str], trained: list[str]) -> ProtocolConfig:
    """The protocol with both lists filled in. InputError for a name that no evaluated data set has, or an empty side.

    `present`: data sets of the evaluated records; `trained`: those with training samples in the shards.
    """
    for field in ("internal", "external"):
        for name in getattr(protocol, field):
            if name not in present:
                raise InputError(f"protocol.{field}: no test record of data set '{name}'; {nearest(name, present)}")
    internal = protocol.internal or [d for d in present if d in trained and d not in protocol.external]
    external = protocol.external or [d for d in present if d not in internal]
    left = [d for d in present if d not in internal and d not in external]
    if left:
        raise InputError(f"protocol: data set '{left[0]}' is neither internal nor external; add it to one of the lists")
    return replace(protocol, internal=sorted(internal), external=sorted(external))


def make_scopes(records: RecordSet, protocol: ProtocolConfig, scored: np.ndarray | None = None) -> list[Scope]:
    """Every data set, then the partitions that hold records; `protocol` has its roles resolved.

    `scored` bool [N] limits all of them (the others are in the records as pool items only).
    """
    scored = np.ones(len(records), bool) if scored is None else scored
    names = sorted(set(records.datasets[scored]))
    scopes = [Scope("dataset", name, scored & (records.datasets == name)) for name in names]
    masks = {
        "internal": np.isin(records.datasets, protocol.internal),
        "external": np.isin(records.datasets, protocol.external),
        "dermoscopic": records.modality == "dermoscopic",
        "clinical": records.modality == "clinical",
        "all": np.ones(len(records), bool),
    }
    found = {name: scored & mask for name, mask in masks.items()}
    scopes += [Scope("partition", name, found[name]) for name in PARTITIONS if found[name].any()]
    return scopes


def class_matched_scopes(scopes: list[Scope]) -> list[Scope]:
    """The external partition with the classes as frequent as in the internal one, where both are there: what is left of
    the shift gap is not prevalence. For measures of classification only."""
    found = {scope.name: scope.mask for scope in scopes if scope.kind == "partition"}
    if "internal" not in found or "external" not in found:
        return []
    return [Scope("partition", CLASS_MATCHED, found["external"], like=found["internal"])]


def empty_partitions(scopes: list[Scope]) -> list[str]:
    """Partitions without a record, for the protocol's notes."""
    return [name for name in PARTITIONS if name not in {s.name for s in scopes if s.kind == "partition"}]


def absent_classes(records: RecordSet, scopes: list[Scope]) -> dict[str, list[str]]:
    """Classes without a record, for each scope that lacks some: its macro means are over the others."""
    out = {}
    for scope in scopes:
        held = set(records.labels[scope.mask])
        lacking = [name for c, name in enumerate(CLASSES) if c not in held]
        if lacking:
            out[f"{scope.kind} {scope.name}"] = lacking
    return out
