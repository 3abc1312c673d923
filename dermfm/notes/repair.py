"""Repairing a note: sentences that say more or other than the facts go, and facts that nobody states are added."""

from __future__ import annotations

from dermfm.notes.checks import Rules, find_faults, states
from dermfm.notes.claims import normalise, sentences
from dermfm.notes.facts import Facts, statements
from dermfm.notes.spelling import put_right

ABOUT_CONTENT = ("missing", "repetition", "empty")


def repair_note(text: str, facts: Facts, rules: Rules = Rules()) -> str | None:  # noqa: B008  it is frozen
    """The note without its faulty sentences and with the missing facts stated plainly; None if that does not mend it.

    At least one sentence of the original must remain: what is left of nothing is a template, not a repair.
    """
    kept: list[str] = []
    for sentence in sentences(text):
        if sentence not in kept and not _is_faulty(sentence, facts, rules):
            kept.append(sentence)
    if not kept:
        return None
    said = " ".join(kept)
    clean = put_right(normalise(said), facts)
    absent = {name for name in facts if not states(clean, name, facts)}
    if {"age", "sex"} & absent:
        absent |= {"age", "sex"}
    added = [sentence for name, sentence in statements(facts).items() if name in absent]
    mended = " ".join([*kept, *added])
    return None if find_faults(mended, facts, rules) else mended


def _is_faulty(sentence: str, facts: Facts, rules: Rules) -> bool:
    """Whether the sentence, on its own, says something wrong (that it does not say everything is no fault of it)."""
    return any(not fault.startswith(ABOUT_CONTENT) for fault in find_faults(sentence, facts, rules))
