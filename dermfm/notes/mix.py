"""Mixes: names under which training draws one of several strategies' notes, anew for every stream index.

A mix is resolved where a note is chosen: its weight is divided equally among those of its strategies that the sample
has a note of, whatever the number of their notes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

# Strategies whose text no model has written; what is left is what `whole` mixes.
WITHOUT_MODEL = ("template", "label", "measured", "shuffled", "shuffled_within_class")


@dataclass(frozen=True)
class Mix:
    """The strategies of a mix: `members`, and with `models` every strategy that a model writes."""

    members: tuple[str, ...] = ()
    models: bool = False

    def among(self, held: Iterable[str]) -> list[str]:
        """Those of the held strategies that belong to the mix, in alphabetical order."""
        return [s for s in sorted(set(held)) if s in self.members or (self.models and s not in WITHOUT_MODEL)]


MIXES = {
    "meta": Mix(("abcd", "characteristics")),
    "all": Mix(("abcd", "characteristics", "template")),
    "whole": Mix(models=True),
    "whole_all": Mix(("template",), models=True),
}
MIXES["mix"] = MIXES["meta"]


def resolve(strategies: Mapping[str, float], held: Collection[str]) -> dict[str, float]:
    """Weights of single strategies: each mix's weight is spread equally over its strategies among `held`."""
    weights: dict[str, float] = {}
    for name, weight in strategies.items():
        members = MIXES[name].among(held) if name in MIXES else [name]
        for member in members:
            weights[member] = weights.get(member, 0.0) + weight / len(members)
    return weights


def lacking(name: str, available: Collection[str]) -> list[str]:
    """The strategies without which `name`, a strategy or a mix, cannot be drawn; [] where it can."""
    if name not in MIXES:
        return [] if name in available else [name]
    mix = MIXES[name]
    if mix.models and not Mix(models=True).among(available):
        return ["any strategy that a model writes"]
    return [member for member in mix.members if member not in available]
