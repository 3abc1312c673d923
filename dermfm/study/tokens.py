"""What frozen towers say, computed once: tokens of every view of every image, states of every distinct text.

Image tokens lie in one memory-mapped float16 file; text states in pieces, to which new texts are added. Two modules
stand for the towers in the model: they look the tokens up, and what is trained starts behind them.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dermfm.config import InputError, short_hash, to_dict
from dermfm.images import AugmentConfig, decode_image
from dermfm.model.image import ImageTower
from dermfm.model.text import TextConfig, TextTower
from dermfm.progress import Meter
from dermfm.samples import image_bytes, stack_pixels
from dermfm.study.config import TokensConfig
from shards.files import write_text
from shards.loader import sample_rng
from shards.manifest import Manifest
from shards.reader import ShardReader

Key = bytes  # the token ids of a text
TEXTS_A_PIECE = 512


@dataclass(frozen=True)
class ImageTokens:
    """Tokens [rows, P, D] float16 of all views; those of the i-th record of a split start at `first[split][i]`."""

    tokens: np.ndarray
    first: dict[str, np.ndarray]
    views: dict[str, int]
    identity: str

    def rows(self, split: str, view: int = 0) -> np.ndarray:
        """The row [n] of one view of every record of a split."""
        return self.first[split] + view


def embed_views(
    config: TokensConfig, manifest: Manifest, splits: Sequence[str], folder: Path, device: str
) -> ImageTokens:
    """The tokens of the splits' images, from `folder` or computed now; an interrupted call goes on where it stopped.

    The split "train" gets `views` views, all others `eval_views`; view 0 is the plain one. Raises ValueError or OSError
    for an image that cannot be decoded.
    """
    sizes = {split: sum(info.num_samples for info in manifest.split(split)) for split in splits}
    views = {split: config.views if split == "train" else config.eval_views for split in splits}
    starts = np.cumsum([0, *(sizes[s] * views[s] for s in splits)])
    first = {s: starts[i] + np.arange(sizes[s]) * views[s] for i, s in enumerate(splits)}
    tower = frozen_image_tower(config).to(device).eval()
    augment = to_dict(config.augment) if max(views.values()) > 1 else None
    identity = short_hash([manifest.fingerprint, sizes, views, augment, tower_hash(tower), tower.size])
    path = folder / f"images-{identity}.npy"
    shape = (int(starts[-1]), tower.grid[0] * tower.grid[1], tower.width)
    if not path.is_file():
        _write_tokens(config, tower, _views(manifest, splits, views, tower.size, config.augment), path, shape, device)
    tokens = np.load(path, mmap_mode="r")
    if tokens.shape != shape:
        raise InputError(f"{path}: has tokens of the shape {tokens.shape}, not {shape}; remove it")
    return ImageTokens(tokens, first, views, identity)


def frozen_image_tower(config: TokensConfig) -> ImageTower:
    """The tower with its pretrained weights; without any, with the same random ones in every call."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return ImageTower(config.model.image)


def frozen_text_tower(config: TextConfig) -> TextTower:
    """As `frozen_image_tower`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return TextTower(config)


def tower_hash(tower: nn.Module) -> str:
    """A hash of all weights and statistics of a tower."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tower.state_dict().items()):
        digest.update(name.encode() + tensor.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def _views(
    manifest: Manifest, splits: Sequence[str], views: dict[str, int], size: int, augment: AugmentConfig
) -> Iterator[Any]:
    """A call for every row, in order, that gives its pixels."""
    for split in splits:
        shards = manifest.split(split)
        reader = ShardReader(manifest.folder, shards, manifest.remote)
        places = [(s, row) for s, info in enumerate(shards) for row in range(info.num_samples)]
        for i, place in enumerate(places):
            for view in range(views[split]):
                yield lambda r=reader, p=place, i=i, v=view: decode_image(
                    image_bytes(r.read(*p)), size, sample_rng(v, i) if v else None, augment if v else None
                )


def _write_tokens(
    config: TokensConfig, tower: ImageTower, pixels: Iterator[Any], path: Path, shape: tuple[int, ...], device: str
) -> None:
    """Fill the file in row order; how far it is stands beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial, progress = path.with_suffix(".partial.npy"), path.with_suffix(".json")
    done = int(json.loads(progress.read_text())["rows"]) if progress.is_file() and partial.is_file() else 0
    mode: Any = "r+" if done else "w+"
    out = np.lib.format.open_memmap(partial, mode=mode, dtype=np.float16, shape=shape)
    held: list[Any] = []
    with Meter(shape[0], "embedding views", "views", start=done) as meter, torch.inference_mode():
        for row, view in enumerate(pixels):
            if row >= done:
                held.append(view())
            if held and (len(held) == config.batch_size or row + 1 == shape[0]):
                out[row + 1 - len(held) : row + 1] = tower(stack_pixels(held).to(device))[0].half().cpu().numpy()
                meter.advance(len(held))
                held = []
                if (row + 1) // config.batch_size % 16 == 0:
                    out.flush()
                    write_text(progress, json.dumps({"rows": row + 1}))
    out.flush()
    del out
    os.replace(partial, path)
    progress.unlink(missing_ok=True)


class TextStates:
    """Token ids → states [T, D] float16 of a frozen text tower, in pieces on disk that are only ever added to."""

    def __init__(self, config: TextConfig, tokenizer: Any, folder: Path) -> None:
        self.config, self.tokenizer = config, tokenizer
        self._tower: TextTower | None = None
        self._config_hash = short_hash(to_dict(config))
        self.folder = folder / f"texts-{self._config_hash}"
        self._places: dict[Key, tuple[int, int, int]] = {}  # piece, start, length
        self._pieces: list[np.ndarray] = []
        self._ids: dict[str, np.ndarray] = {}
        self.width = 0
        for index in self._stored():
            self._open(index)

    def encode(self, texts: Iterable[str]) -> None:
        """Compute the states of the texts that are not there yet."""
        keys = {self.ids(text).tobytes(): self.ids(text) for text in sorted(set(texts))}
        missing = sorted((ids for name, ids in keys.items() if name not in self._places), key=len)
        if missing and self._tower is None:
            self._tower = frozen_text_tower(self.config).eval()
        with Meter(len(missing), "encoding texts", "texts") as meter:
            for start in range(0, len(missing), TEXTS_A_PIECE):
                self._write(missing[start : start + TEXTS_A_PIECE], meter)

    def ids(self, text: str) -> np.ndarray:
        """Token ids [T] int64 of a text, cut as the tower's configuration says."""
        if text not in self._ids:
            found = self.tokenizer(text, truncation=True, max_length=self.config.max_tokens)["input_ids"]
            self._ids[text] = np.asarray(found, dtype=np.int64)
        return self._ids[text]

    def states(self, ids: np.ndarray) -> np.ndarray:
        """States [T, D] of token ids [T]; they must have been encoded."""
        piece, start, length = self._places[ids.tobytes()]
        return self._pieces[piece][start : start + length]

    def _write(self, batch: list[np.ndarray], meter: Meter) -> None:
        assert self._tower is not None
        found = []
        with torch.inference_mode():
            for ids in batch:  # one at a time: a text's states must not depend on the others
                states, _ = self._tower(torch.from_numpy(ids)[None], torch.tensor([len(ids)]))
                found.append(states[0].half().numpy())
                meter.advance()
        self.folder.mkdir(parents=True, exist_ok=True)
        index = f"{len(self._stored()):05d}-{os.getpid()}"
        lengths = np.asarray([len(ids) for ids in batch])
        arrays = {"states": np.concatenate(found), "lengths": lengths, "ids": np.concatenate(batch)}
        for name, array in arrays.items():
            temporary = self.folder / f"{index}.{name}.tmp"
            with temporary.open("wb") as file:
                np.save(file, array)
            os.replace(temporary, self.folder / f"{index}.{name}.npy")  # `ids` comes last: with it the piece is whole
        self._open(index)

    def _stored(self) -> list[str]:
        return sorted(p.name.removesuffix(".ids.npy") for p in self.folder.glob("*.ids.npy"))

    def _open(self, index: str) -> None:
        arrays = {n: np.load(self.folder / f"{index}.{n}.npy", mmap_mode="r") for n in ("states", "lengths", "ids")}
        start = 0
        for length in arrays["lengths"].tolist():
            self._places[np.asarray(arrays["ids"][start : start + length]).tobytes()] = (
                len(self._pieces),
                start,
                length,
            )
            start += length
        self._pieces.append(arrays["states"])
        self.width = arrays["states"].shape[1]


class StoredImage(nn.Module):
    """Stands for the image tower: rows of the file [B] int64 → (tokens [B, P, width], mean token [B, width]).

    The tokens are those of the frozen tower through a small perceptron, which is trained.
    """

    def __init__(self, tokens: np.ndarray, width: int, grid: tuple[int, int] = (0, 0)) -> None:
        super().__init__()
        self.width, self.grid = width, grid
        self._tokens = tokens
        # No scale and shift in the norm (the next layer has them): so no gradient is taken back to the wide tokens.
        wide = tokens.shape[2]
        norm = nn.LayerNorm(wide, elementwise_affine=False)
        self.adapter = nn.Sequential(norm, nn.Linear(wide, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """See the class. The argument has the name that the model's phases give it."""
        tokens = self.adapter(torch.from_numpy(self._tokens[pixels.numpy()]).float())
        return tokens, tokens.mean(1)

    def pooled(self, pixels: Tensor) -> Tensor:
        """The mean token."""
        return self(pixels)[1]


class StoredText(nn.Module):
    """Stands for the text tower: token ids [B, T], lengths [B] → (states [B, T, D], mean over valid tokens [B, D])."""

    def __init__(self, states: TextStates) -> None:
        super().__init__()
        self.width = states.width
        self._states = states

    def forward(self, tokens: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """See the class; zeros at padding."""
        out = np.zeros((*tokens.shape, self.width), np.float32)
        ids = tokens.numpy()
        for row, length in enumerate(lengths.tolist()):
            out[row, :length] = self._states.states(ids[row, :length])
        states = torch.from_numpy(out)
        return states, states.sum(1) / lengths.clamp(min=1)[:, None]
