"""From the bytes of a shard's sample to a training batch: decode, augment, choose a note, tokenise, collate.

Everything random comes from the generator that the loader makes of (seed, stream index), in a fixed number of draws,
so that pixels and notes do not depend on ranks, workers or what other samples did.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dermfm.concepts import CONCEPTS, find_concepts
from dermfm.config import InputError, nearest
from dermfm.images import AugmentConfig, decode_into, empty_images
from dermfm.notes.mix import MIXES, lacking, resolve
from dermfm.records.vocabulary import MALIGNANCIES, SUBCLASSES

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
NO_CONCEPTS = np.zeros(len(CONCEPTS), dtype=bool)
GREY = 128  # every pixel of a sample that is bad or padded
PAD_MULTIPLE = 8  # token lengths are padded to a multiple: fewer distinct shapes for kernels and allocator


@dataclass
class Item:
    """One decoded sample. `pixels` uint8 [3, S, S]; labels are −1 where unknown; `group` a 63-bit hash of the group."""

    pixels: np.ndarray
    text: str
    label: int
    group: int
    record_id: str
    subclass: int = -1
    malignancy: int = -1


@dataclass
class Batch:
    """One rank's batch.

    pixels uint8 [B, 3, S, S]; tokens int64 [B, T], padded after the note; lengths int64 [B], valid tokens; labels int64
    [B], −1 unknown; weight float32 [B], 0 for a bad or padded sample; group, text int64 [B], 63-bit hashes of group_id
    and of the note (negative and unique where weight is 0); indices int64 [B], stream indices or rows; record_ids [B].
    subclasses, malignancies int64 [B], places in the vocabulary's lists, −1 unknown; concepts bool [B, 63], the concept
    words of the note. These three may be left out: then nothing is known.
    """

    pixels: torch.Tensor
    tokens: torch.Tensor
    lengths: torch.Tensor
    labels: torch.Tensor
    weight: torch.Tensor
    group: torch.Tensor
    text: torch.Tensor
    indices: torch.Tensor
    record_ids: list[str]
    subclasses: torch.Tensor = None  # type: ignore[assignment]
    malignancies: torch.Tensor = None  # type: ignore[assignment]
    concepts: torch.Tensor = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        self.subclasses = torch.full_like(self.labels, -1) if self.subclasses is None else self.subclasses
        self.malignancies = torch.full_like(self.labels, -1) if self.malignancies is None else self.malignancies
        if self.concepts is None:
            self.concepts = self.labels.new_zeros((len(self.labels), len(CONCEPTS)), dtype=torch.bool)

    def __len__(self) -> int:
        return len(self.record_ids)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """The batch on a device."""
        return self._each(lambda t: t.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory, from which copies to a GPU can overlap with work."""
        return self._each(lambda t: t.pin_memory())

    def _each(self, change: Any) -> Batch:
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return Batch(**{n: change(v) if isinstance(v, torch.Tensor) else v for n, v in values.items()})


@dataclass(frozen=True)
class SampleFn:
    """A sample's bytes → Item. Picklable. `strategies`: weight of each note strategy; empty: no text at all."""

    image_size: int
    strategies: Mapping[str, float]
    augment: AugmentConfig | None = None

    def __call__(self, sample: dict[str, bytes], rng: np.random.Generator) -> Item:
        """Raises KeyError or ValueError for a sample without image or fields, or one that cannot be decoded."""
        return self.prepare(sample, rng)(self.allocate(1)[0])

    def allocate(self, count: int) -> torch.Tensor:
        """Memory for the pixels of a batch, uint8 [count, 3, S, S]."""
        return empty_images(count, self.image_size, self.augment)

    def prepare(self, sample: dict[str, bytes], rng: np.random.Generator) -> Callable[[torch.Tensor], Item]:
        """All but the decoding, which the returned call does, into one image of `allocate`'s memory: what is short is
        done for a whole batch before."""
        if "json" not in sample:
            raise KeyError(f"no .json with a record's fields among its members ({', '.join(sorted(sample))})")
        fields = json.loads(sample["json"])
        text = choose_note(fields.get("notes") or [], self.strategies, rng)
        label = fields.get("label")
        record_id = str(fields.get("record_id") or sample["__key__"].decode())
        group = hash63(str(fields.get("group_id") or record_id))
        finer = _place(fields.get("matched_subclass"), SUBCLASSES), _place(fields.get("malignancy"), MALIGNANCIES)
        data = image_bytes(sample)

        def decode(pixels: torch.Tensor) -> Item:
            decode_into(pixels, data, rng, self.augment)
            return Item(pixels.numpy(), text, -1 if label is None else int(label), group, record_id, *finer)

        return decode


@dataclass(frozen=True)
class Collate:
    """Items → Batch. `tokenizer`: a Hugging Face tokenizer; notes are cut to `max_tokens`. Picklable.

    `concepts`: whether to look for concept words; without, the batch has none.
    """

    tokenizer: Any
    max_tokens: int
    image_size: int
    concepts: bool = False

    def __call__(self, items: Sequence[Item | None], indices: np.ndarray, pixels: torch.Tensor | None = None) -> Batch:
        """None marks a bad or padded sample: grey pixels, empty text, label −1, weight 0.

        `pixels` uint8 [B, 3, S, S]: the memory into which the items were decoded; without it, theirs are copied.
        """
        filled = [self._placeholder() if item is None else item for item in items]
        texts = [item.text for item in filled]
        bad = np.asarray([item is None for item in items])
        unique = -1 - np.asarray(indices, dtype=np.int64)  # no other sample has this group or text
        group = np.where(bad, unique, np.asarray([item.group for item in filled], dtype=np.int64))
        text = np.where(bad, unique, np.asarray([hash63(t) for t in texts], dtype=np.int64))
        tokens, lengths = tokenize(self.tokenizer, texts, self.max_tokens)
        if pixels is None:
            pixels = stack_pixels([item.pixels for item in filled])
        else:
            for place in np.flatnonzero(bad).tolist():
                pixels[place] = GREY
        return Batch(
            pixels=pixels,
            tokens=tokens,
            lengths=lengths,
            labels=torch.tensor([item.label for item in filled], dtype=torch.int64),
            weight=torch.from_numpy((~bad).astype(np.float32)),
            group=torch.from_numpy(group),
            text=torch.from_numpy(text),
            indices=torch.from_numpy(np.array(indices, dtype=np.int64)),
            record_ids=[item.record_id for item in filled],
            subclasses=torch.tensor([item.subclass for item in filled], dtype=torch.int64),
            malignancies=torch.tensor([item.malignancy for item in filled], dtype=torch.int64),
            concepts=torch.from_numpy(np.stack([find_concepts(t) if self.concepts else NO_CONCEPTS for t in texts])),
        )

    def _placeholder(self) -> Item:
        return Item(np.full((3, self.image_size, self.image_size), GREY, dtype=np.uint8), "", -1, -1, "")


def _place(name: Any, names: Sequence[str]) -> int:
    """Place of a name in a list of the vocabulary, whatever its case; −1 where it is not in it."""
    return _places(tuple(names)).get(str(name or "").casefold(), -1)


@functools.cache
def _places(names: tuple[str, ...]) -> dict[str, int]:
    return {name.casefold(): place for place, name in reversed(list(enumerate(names)))}


def stack_pixels(images: Sequence[np.ndarray]) -> torch.Tensor:
    """uint8 [B, 3, S, S], in the memory order of the first image: to reorder every image costs a tenth of decoding."""
    if images[0].flags.c_contiguous:
        return torch.from_numpy(np.stack(images))
    return torch.from_numpy(np.stack([image.transpose(1, 2, 0) for image in images])).permute(0, 3, 1, 2)


def tokenize(tokenizer: Any, texts: Sequence[str], max_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(tokens int64 [B, T], lengths int64 [B]): notes from the left, padding after, T a multiple of 8."""
    ids = tokenizer(list(texts), truncation=True, max_length=max_tokens, padding=False)["input_ids"]
    lengths = [len(i) for i in ids]
    width = -(-max(lengths, default=1) // PAD_MULTIPLE) * PAD_MULTIPLE
    tokens = np.full((len(ids), width), tokenizer.pad_token_id or 0, dtype=np.int64)
    for row, one in enumerate(ids):
        tokens[row, : len(one)] = one
    return torch.from_numpy(tokens), torch.tensor(lengths, dtype=torch.int64)


def hash63(text: str) -> int:
    """63 bits of the sha256 of a text: a non-negative int64."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def image_bytes(sample: Mapping[str, bytes]) -> bytes:
    """The encoded image of a sample; KeyError where it has none."""
    for extension in IMAGE_EXTENSIONS:
        if extension in sample:
            return sample[extension]
    raise KeyError(f"no image among its members ({', '.join(sorted(sample))})")


def choose_note(notes: Sequence[Mapping[str, Any]], strategies: Mapping[str, float], rng: np.random.Generator) -> str:
    """The text of one note: a strategy by weight among those present, then any of its notes; "" where there is none.

    A mix (`dermfm.notes.mix`) divides its weight equally among its strategies, however many notes each has.
    """
    first, second = rng.random(2).tolist()
    held = {n["strategy"] for n in notes}
    strategies = resolve(strategies, held)
    present = [s for s in sorted(strategies) if strategies[s] > 0 and s in held]
    if not present:
        return ""
    # plain Python: over a handful of strategies, array functions cost more than they save
    cumulative = list(itertools.accumulate(strategies[s] for s in present))
    chosen = present[min(bisect.bisect_right(cumulative, first * cumulative[-1]), len(present) - 1)]
    candidates = [n for n in notes if n["strategy"] == chosen]
    return str(candidates[int(second * len(candidates))]["text"])


def check_strategies(strategies: Mapping[str, float], available: Iterable[str]) -> None:
    """InputError where a strategy with weight has no note in the shards, or a weight is negative."""
    names = sorted(available)
    for name, weight in strategies.items():
        if weight < 0:
            raise InputError(f"strategies.{name}: the weight {weight:g} is negative; it must be at least 0")
        if weight > 0 and (absent := lacking(name, names)):
            if name in MIXES:
                told = f"'{name}' mixes strategies, and the shards hold no note of {absent[0]}"
                raise InputError(f"strategies: {told}; they hold {', '.join(names) or 'no notes at all'}")
            hint = nearest(name, [*names, *MIXES]) if names else "the shards hold no notes at all"
            raise InputError(f"strategies: the shards hold no note of strategy '{name}'; {hint}")


def balanced_weights(labels: Sequence[int | None], power: float = 1.0) -> np.ndarray:
    """Weights [N] for SampleOrder, mean 1, proportional to class frequency ** −power; unknown labels are one class.

    power 1 makes all classes equally frequent, 0 leaves them as they are.
    """
    values = np.asarray([-1 if label is None else int(label) for label in labels])
    _, classes, counts = np.unique(values, return_inverse=True, return_counts=True)
    weights = counts[classes].astype(np.float64) ** -power
    return weights * (len(weights) / weights.sum())
