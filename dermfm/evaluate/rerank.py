"""Re-ranking by the matching head: the first k of a ranking by cosine, put into the order of their match logits.

As in ALBEF and BLIP (Li et al., NeurIPS 2021; ICML 2022). Whatever stands behind the first k keeps its place.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dermfm.evaluate import ranking
from dermfm.evaluate.embed import image_batches
from dermfm.evaluate.embedding import Embedded, Site
from dermfm.evaluate.fused import manifest_rows
from dermfm.evaluate.ranking import NOBODY, Pool
from dermfm.evaluate.ranks import together
from dermfm.evaluate.scoring import Side
from dermfm.samples import tokenize

TOP = np.float32(2.0)  # cosines end at 1


class Matcher:
    """Match logits of the pairs that re-ranking the notes of one strategy asks for, computed once and kept.

    `notes`: the pool's or queries' notes by record row.
    """

    def __init__(self, model: Any, embedded: Embedded, splits: list[str], site: Site, top: int) -> None:
        self._model, self._embedded, self._splits, self._site, self.top = model, embedded, splits, site, top

    def rerank(self, notes: dict[int, str], image_is_query: bool, groups: np.ndarray) -> Any:
        """A function (queries, pool) → Rerank, for `retrieve`; `groups` [N] are numbers of all records' groups."""

        def make(queries: Side, pool: Side) -> ranking.Rerank:
            items = Pool(pool.vectors, np.zeros(len(pool.rows)), groups[pool.rows])
            first = np.unique(items.vector_of, return_index=True)[1]  # one item for each distinct vector
            asked = self._asked(queries, items, groups)
            pairs = {
                (int(queries.rows[q]), int(pool.rows[first[v]])) if image_is_query
                else (int(pool.rows[first[v]]), int(queries.rows[q]))
                for q, vectors in asked.items()
                for v in vectors
            }  # fmt: skip
            logits = self._logits(sorted(pairs), notes)

            def change(query: int, score: np.ndarray, out: np.ndarray) -> np.ndarray:
                chosen = top_vectors(score, items, out, self.top)
                others = pool.rows[first[chosen]]
                row = int(queries.rows[query])
                keys = [(row, int(o)) if image_is_query else (int(o), row) for o in others]
                return lifted(score, chosen, np.array([logits[key] for key in keys]))

            return change

        return make

    def _asked(self, queries: Side, items: Pool, groups: np.ndarray) -> dict[int, np.ndarray]:
        """Query → the vectors that can be among its first k, whichever items of its own group are out."""
        ranks = self._site.ranks
        mine = ranking.shard_rows(len(queries.rows), ranks.rank, ranks.world)
        found = {
            int(query): top_vectors(score, items, NOBODY, self.top + len(items.members(groups[queries.rows[query]])))
            for part, scores in items.scores(queries.vectors, mine)
            for query, score in zip(part, scores, strict=True)
        }
        return {query: vectors for part in ranks.gather(found) for query, vectors in part.items()}

    def _logits(self, pairs: list[tuple[int, int]], notes: dict[int, str]) -> dict[tuple[int, int], float]:
        """Match logit of every (row of the image, row of the note's record); images batch by batch over the ranks."""
        of_image: dict[int, list[int]] = {}
        for image, note in pairs:
            of_image.setdefault(image, []).append(note)

        def work() -> dict[tuple[int, int], float]:
            own: dict[tuple[int, int], float] = {}
            for split in self._splits:
                rows_of = manifest_rows(self._embedded, split, self._site)
                for rows, pixels in self._batches(split):
                    places = [rows_of.get(int(row), -1) for row in rows]
                    wanted = [(i, p, n) for i, p in enumerate(places) for n in of_image.get(p, ())]
                    own |= self._batch_logits(pixels, wanted, notes)
            return own

        parts = self._site.ranks.gather(together(self._site.ranks, work))
        return {pair: value for part in parts for pair, value in part.items()}

    def _batches(self, split: str) -> Iterable[tuple[np.ndarray, Tensor]]:
        site = self._site
        num_rows = sum(s.num_samples for s in site.manifest.split(split))
        batches = image_batches(site.manifest, split, self._model.image_size, site.compute, site.ranks)
        for rows, (pixels, _) in batches:
            if pixels is not None:
                rows = rows[: min(len(rows), num_rows - int(rows[0]))]
                yield rows, pixels[: len(rows)]

    def _batch_logits(
        self, pixels: Tensor, wanted: list[tuple[int, int, int]], notes: dict[int, str]
    ) -> dict[tuple[int, int], float]:
        """Of one batch of images; `wanted`: place in the batch, row of the image, row of the note's record."""
        if not wanted:
            return {}
        model, compute = self._model, self._site.compute
        tokens = torch.from_numpy(compute.run(lambda x: {"tokens": model.image(x)[0]}, pixels)["tokens"])
        out: dict[tuple[int, int], float] = {}
        for start in range(0, len(wanted), compute.batch_size):
            some = wanted[start : start + compute.batch_size]
            texts = [notes[note] for _, _, note in some]
            ids, lengths = tokenize(model.tokenizer, texts, model.config.text.max_tokens)
            shown = tokens[[place for place, _, _ in some]]
            found = compute.run(self._match, shown, ids, lengths)["match"]
            out |= {(image, note): float(value) for (_, image, note), value in zip(some, found, strict=True)}
        return out

    def _match(self, image_tokens: Tensor, tokens: Tensor, lengths: Tensor) -> dict[str, Tensor]:
        return {"match": self._model.match(image_tokens, self._model.text(tokens, lengths)[0], lengths)}


def top_vectors(score: np.ndarray, pool: Pool, out: np.ndarray, top: int) -> np.ndarray:
    """The `top` vectors of largest score that stand for an item which is not `out`; of equal ones the first."""
    counts = pool.counts.copy()
    np.subtract.at(counts, pool.vector_of[out], 1)
    admitted = np.flatnonzero(counts > 0)
    return admitted[np.argsort(-score[admitted], kind="stable")[:top]]


def lifted(score: np.ndarray, chosen: np.ndarray, logits: np.ndarray) -> np.ndarray:
    """Scores where `chosen` stand above all others in the order of their logits; equal logits are ties."""
    score = score.copy()
    score[chosen] = TOP + np.unique(logits, return_inverse=True)[1].astype(np.float32)
    return score
