"""From items to finished rows: generate, check, try again, repair, fall back to the template; each row says which."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from dermfm.config import InputError
from dermfm.notes.checks import Rules, find_faults
from dermfm.notes.engines.protocol import Engine, EngineConfig, Generation, Request, build_engine
from dermfm.notes.engines.seat import Seat
from dermfm.notes.facts import Facts
from dermfm.notes.repair import repair_note
from dermfm.notes.strategies import Form

Row = dict[str, Any]


@dataclass(frozen=True)
class Item:
    """One planned note on its way: what to ask, the facts to check it against (None: nothing to check), its columns.

    `form` reads a structured answer (None: prose), `rules` say how the text is judged.
    """

    request: Request
    facts: Facts | None
    columns: Row
    form: Form | None = None
    rules: Rules = field(default_factory=Rules)


class NoteWriter:
    """Writes notes in one process: an engine, and the checks behind it. The worker of the actor pool.

    `seat` (rank, world, host, port) is this process's place among those that hold one model: rank 0 works, the others
    follow.
    """

    def __init__(
        self,
        config: EngineConfig,
        repair: bool = True,
        engine: Engine | None = None,
        seat: tuple[int, int, str, int] | None = None,
    ) -> None:
        self.config, self.repair = config, repair
        self.engine = engine or build_engine(config, Seat(*seat) if seat else None)

    def follow(self) -> None:
        """Do what rank 0's engine tells."""
        engine: Any = self.engine
        engine.follow()

    def work(self, items: Sequence[Item]) -> list[Row]:
        """One finished row (the columns of NOTE_SCHEMA) an item, in order."""
        rows: list[Row | None] = [fixed_row(item) if item.facts is None else None for item in items]
        failed = {i: (_Draft(), items[i]) for i in range(len(items)) if rows[i] is None}
        for attempt in range(self.config.attempts if failed else 0):
            chosen = list(failed)
            requests = [replace(items[i].request, attempt=attempt) for i in chosen]
            began = time.perf_counter()
            answers = generate_surely(self.engine, requests)
            share = (time.perf_counter() - began) / len(requests)
            for i, generation in zip(chosen, answers, strict=True):
                draft = judge(items[i], generation, attempt).after(failed[i][0], share)
                if not draft.faults and not draft.error:
                    rows[i] = self._row(items[i], draft, "regenerated" if attempt else self._first_source())
                    del failed[i]
                else:
                    failed[i] = (_better(failed[i][0], draft), items[i])
            if not failed:
                break
        for i, (draft, item) in failed.items():
            rows[i] = self._rescue(item, draft)
        return [row for row in rows if row is not None]

    def _first_source(self) -> str:
        return "template" if self.config.kind == "template" else "generated"

    def _rescue(self, item: Item, draft: _Draft) -> Row:
        """Repair the best try, or take the template; the faults of the try stay in the row."""
        if self.repair and item.facts is not None and not draft.error:
            mended = repair_note(draft.text, item.facts, item.rules)
            if mended is not None:
                return self._row(item, replace(draft, text=mended), "repaired")
        return self._row(item, replace(draft, text=item.request.fallback), "template")

    def _row(self, item: Item, draft: _Draft, source: str) -> Row:
        found = {"attempt": draft.attempt, "text": draft.text, "source": source, "faults": list(draft.faults)}
        cost = {"num_tokens": draft.num_tokens, "seconds": draft.seconds}
        return {**item.columns, **found, **cost, "error": draft.error, "first_faults": list(draft.first)}


@dataclass(frozen=True)
class _Draft:
    """One try at a note."""

    text: str = ""
    attempt: int = 0
    faults: tuple[str, ...] = ("empty",)
    num_tokens: int = 0
    error: str | None = None
    first: tuple[str, ...] = ()  # faults of the first try
    seconds: float = 0.0  # of all tries so far

    def after(self, before: _Draft, seconds: float) -> _Draft:
        """This try as the one that followed `before` and took `seconds`."""
        first = before.first if self.attempt else self.faults
        return replace(self, first=first, seconds=before.seconds + seconds)


def judge(item: Item, generation: Generation, attempt: int) -> _Draft:
    """A generation with its faults."""
    if generation.error:
        return _Draft("", attempt, (), generation.num_tokens, generation.error)
    if generation.refused:
        return _Draft("", attempt, ("refusal",), generation.num_tokens)
    text, faults = item.form.read(generation.text) if item.form else (" ".join(generation.text.split()), [])
    if item.facts is not None and not faults:
        faults = find_faults(text, item.facts, item.rules)
    if not generation.finished and not item.form and "unfinished" not in faults:
        faults.append("unfinished")
    return _Draft(text, attempt, tuple(faults), generation.num_tokens)


def fixed_row(item: Item) -> Row:
    """The row of a note that no model writes, or that a model must not be asked for again."""
    text = item.request.fallback
    found = {"attempt": 0, "text": text, "source": "template", "faults": [], "num_tokens": len(text.split())}
    return {**item.columns, **found, "error": None, "first_faults": None, "seconds": None}


def poisoned_row(item: Item, error: str) -> Row:
    """The row of an item that kills its worker: the template, and the error."""
    return {**fixed_row(item), "error": error}


def generate_surely(engine: Engine, requests: Sequence[Request]) -> list[Generation]:
    """The engine's answers; where a batch raises, it is cut in halves until the request that does it is alone."""
    try:
        return engine.generate(requests)
    except InputError:  # nothing that a request is to blame for: a key that is refused
        raise
    except (RuntimeError, ValueError, IndexError, KeyError, TypeError) as error:
        if len(requests) == 1:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            return [Generation("", error=reason)]
        half = len(requests) // 2
        return generate_surely(engine, requests[:half]) + generate_surely(engine, requests[half:])


def _better(before: _Draft, now: _Draft) -> _Draft:
    """The try with fewer faults; the earlier one on a tie. A try with an error loses against one without."""
    if now.error or (before.faults != ("empty",) and not before.error and len(before.faults) <= len(now.faults)):
        kept = replace(before, error=now.error) if before.faults == ("empty",) else before
        return replace(kept, first=now.first, seconds=now.seconds)
    return now
