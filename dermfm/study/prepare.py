"""What all cells of tier 1 share: records, shards of images, notes, image tokens, text states."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from dermfm.config import InputError, nearest, short_hash
from dermfm.evaluate.records import RecordSet, read_split
from dermfm.evaluate.shift import ProtocolConfig, resolve_roles
from dermfm.evaluate.zeroshot import make_prompts
from dermfm.model.text import load_tokenizer
from dermfm.pack import pack
from dermfm.records.build import build_records
from dermfm.study import cells as stored
from dermfm.study.config import StudyConfig
from dermfm.study.notes import make_notes
from dermfm.study.tier1 import Data
from dermfm.study.tokens import TextStates, embed_views
from shards.manifest import Manifest

SPLITS = ("train", "valid", "test")


@dataclass(frozen=True)
class Shared:
    """Manifest of the images, records by split, notes by engine, the protocol with its roles filled in."""

    manifest: Manifest
    records: dict[str, RecordSet]
    notes: dict[str, pa.Table]
    protocol: ProtocolConfig

    @property
    def fingerprint(self) -> str:
        """A hash of which records there are, with split, data set, label and group."""
        return short_hash(
            [
                [split, *row]
                for split, records in self.records.items()
                for row in zip(
                    records.record_ids, records.datasets, records.labels.tolist(), records.groups, strict=True
                )
            ]
        )


def prepare(config: StudyConfig) -> Shared:
    """Make or find records, shards and notes. Of several jobs on one folder, one makes them and the others wait."""
    with one_at_a_time(Path(config.out)):
        records = build_records(config.records)
        if records.was_there:
            print(f"records: {config.records.out} is there")
        manifest = pack(dataclasses.replace(config.shards, notes=None))
        assert manifest is not None
        check_labels(manifest)
        notes = make_notes(config)
    sets = {split: read_split(manifest, split) for split in SPLITS}
    trained = sorted(set(sets["train"].datasets))
    protocol = resolve_roles(config.protocol, sorted(set(sets["test"].datasets)), trained)
    check_roles(protocol, sets["test"])
    check_goals(config.goals, protocol)
    stored.write_scored(config.out, sets["test"])
    return Shared(manifest, sets, notes, protocol)


def prepare_tokens(config: StudyConfig, shared: Shared) -> Data:
    """Tokens of all images and of all notes that any cell reads, and of the prompts."""
    folder = Path(config.out) / "tokens"
    with one_at_a_time(Path(config.out)):
        images = embed_views(config.tokens, shared.manifest, SPLITS, folder, device_of(config))
        texts = TextStates(config.tokens.model.text, load_tokenizer(config.tokens.model.text.name), folder)
        every = {text for table in shared.notes.values() for text in table.column("text").to_pylist()}
        texts.encode(every | set(make_prompts().texts) | {""})
    return Data(shared.records, images, texts)


def check_labels(manifest: Manifest) -> None:
    """InputError unless there are all splits, and training and validation records have labels of two classes."""
    for split in SPLITS:
        if not any(info.split == split and info.num_samples for info in manifest.shards):
            raise InputError(f"records: no record in the split '{split}'; a study needs train, valid and test")
        known = {label for label in manifest.read_rows(split)["label"] if label is not None}
        if len(known) < 2:
            raise InputError(
                f"records: the split '{split}' has labels of {len(known)} classes; a study needs two or more, "
                "look at the column label of records.parquet"
            )


def check_roles(protocol: ProtocolConfig, scored: RecordSet) -> None:
    """InputError where the endpoint would not be defined: a side without data sets, a data set without any label."""
    for side in ("internal", "external"):
        if not getattr(protocol, side):
            raise InputError(
                f"protocol.{side}: no data set with test records is {side}; a study needs both sides, "
                f"name some of {', '.join(sorted(set(scored.datasets)))}"
            )
    for name in [*protocol.internal, *protocol.external]:
        if not (scored.labels[scored.datasets == name] >= 0).any():
            raise InputError(
                f"records: no test record of data set '{name}' has a label, so nothing can be scored there; "
                "leave it out of records.datasets"
            )


def check_goals(goals: Mapping[str, float], protocol: ProtocolConfig) -> None:
    """InputError for a goal that is neither a side nor a data set of the protocol."""
    known = ["internal", "external", *protocol.internal, *protocol.external]
    for name in goals:
        if name not in known:
            raise InputError(f"goals: there is no '{name}'; {nearest(name, known)}")


def device_of(config: StudyConfig) -> str:
    """The device of the frozen image tower."""
    return ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device


@contextlib.contextmanager
def one_at_a_time(folder: Path) -> Iterator[Any]:
    """Wait until no other job of the folder makes what is shared."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".preparing").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield file
