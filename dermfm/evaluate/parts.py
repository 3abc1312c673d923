"""Arrays over rows that many ranks fill in pieces, kept on disk so that an interrupted job continues.

A folder holds pieces `part-*.safetensors`, each with the rows it covers, and in the end one `all.safetensors`. Its name
ends in a hash of everything that the values depend on, so a stale piece is never read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from dermfm.config import InputError, short_hash
from shards.files import replacing

Arrays = dict[str, np.ndarray]


class Parts:
    """Pieces of arrays [rows, …] under `folder`/`name`-<hash of identity>. Every piece has "rows" int64 [n] (done) and
    "good" bool [n]; the other arrays hold the good rows only, in the order of "rows"."""

    def __init__(self, folder: str | Path, name: str, identity: Any) -> None:
        self.folder = Path(folder) / f"{name}-{short_hash(identity)}"

    def done(self, num_rows: int) -> np.ndarray:
        """bool [num_rows]: rows that pieces on disk cover."""
        covered = np.zeros(num_rows, bool)
        for piece in self._pieces():
            covered[piece["rows"]] = True
        return covered

    def write(self, arrays: Arrays, rank: int) -> None:
        """Store one piece under a name of its own."""
        self.folder.mkdir(parents=True, exist_ok=True)
        rows = arrays["rows"]
        self._save(arrays, f"part-{rank:04d}-{int(rows[0]):09d}-{len(rows)}.safetensors")

    def merge(self) -> None:
        """Put all pieces into one file, in row order, and remove them. Only one rank may call it."""
        if self._path("all.safetensors").is_file():
            return
        self._save(_joined(self._pieces()), "all.safetensors")
        for path in self.folder.glob("part-*"):
            path.unlink()

    def load(self) -> Arrays:
        """ "rows" [n] of the good rows in ascending order, and every array [n, …]."""
        arrays = load_file(self._path("all.safetensors"))
        return {name: values for name, values in arrays.items() if name != "good"} | {
            "rows": arrays["rows"][arrays["good"]]
        }

    def _pieces(self) -> list[Arrays]:
        paths = sorted(self.folder.glob("*.safetensors"))
        try:
            return [load_file(path) for path in paths]
        except (OSError, SafetensorError) as error:
            raise InputError(f"{self.folder}: a stored piece cannot be read ({error}); remove the folder") from error

    def _path(self, name: str) -> Path:
        return self.folder / name

    def _save(self, arrays: Arrays, name: str) -> None:
        with replacing(self._path(name)) as temporary:
            save_file({n: np.ascontiguousarray(a) for n, a in arrays.items()}, temporary)


def _joined(pieces: list[Arrays]) -> Arrays:
    """One set of arrays in row order; a row that two pieces cover is taken once."""
    rows = np.concatenate([p["rows"] for p in pieces])
    good = np.concatenate([p["good"] for p in pieces])
    _, first = np.unique(rows, return_index=True)
    place_of_good = np.cumsum(good) - 1
    kept = place_of_good[first[good[first]]]
    arrays = {"rows": rows[first], "good": good[first]}
    for name, like in max(pieces, key=len).items():  # a piece of unreadable rows alone has no arrays
        if name not in arrays:
            arrays[name] = np.concatenate([p.get(name, like[:0]) for p in pieces])[kept]
    return arrays
