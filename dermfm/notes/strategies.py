"""The ways of writing a note. Each turns a record into facts, a conversation (where a model writes) and a fallback."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dermfm.config import InputError, nearest
from dermfm.notes.controls import CONTROLS
from dermfm.notes.facts import Facts, facts_note, plain_diagnosis, visible_facts
from dermfm.notes.prompts import PROMPTS, LoadedPrompt, load_prompt
from dermfm.records.vocabulary import CLASSES

Record = Mapping[str, Any]
FIXED_FIELDS = ("label", "malignancy", "class", "subclass", "findings", "matched_class", "matched_subclass")


@dataclass(frozen=True)
class Strategy:
    """A strategy: either a fixed text of the record (`write`) or a prompt for a language model.

    `fields` are all that it reads of a record; they and nothing else decide a note's id.
    """

    name: str
    version: str
    fields: tuple[str, ...]
    label_access: str
    facts_source: str
    write: Callable[[Record], str | None] | None = None
    prompt: LoadedPrompt | None = None

    def visible(self, record: Record) -> dict[str, Any]:
        """The allowed fields of the record, those that are known."""
        return {name: record[name] for name in self.fields if record.get(name) is not None}

    def facts(self, record: Record) -> Facts:
        """The facts that a prompt may show; {} for a fixed text."""
        return visible_facts(record, self.fields) if self.prompt else {}

    def fallback(self, record: Record) -> str | None:
        """The note without a model: the fixed text, or the facts in plain sentences; None if nothing is known."""
        text = self.write(record) if self.write else facts_note(self.facts(record))
        return text or None


def template_text(record: Record) -> str | None:
    """Malignancy category; class (subclass); findings; matched class (matched subclass), in plain sentences.

    The content of the reference study's template notes; age, sex and site are not in it.
    """
    said = []
    if record.get("malignancy"):
        said.append(f"The lesion is {record['malignancy']}.")
    named, detail = record.get("class"), record.get("subclass")
    if named or detail:
        said.append(f"Diagnosis: {_with_detail(str(named or detail), str(detail or named))}.")
    if record.get("findings"):
        said.append(f"Findings: {record['findings']}.")
    matched, detail = record.get("matched_class"), record.get("matched_subclass")
    if matched:
        said.append(f"Category: {matched if not detail or detail == matched else f'{matched} ({detail})'}.")
    return " ".join(said) or None


def label_text(record: Record) -> str | None:
    """The bare name of the record's class, nothing else."""
    label = record.get("label")
    return CLASSES[int(label)] if label is not None else record.get("matched_class")


def _with_detail(named: str, detail: str) -> str:
    plain, plain_detail = plain_diagnosis(named), plain_diagnosis(detail)
    return plain if plain == plain_detail else f"{plain} ({plain_detail})"


FIXED: dict[str, Strategy] = {
    "template": Strategy("template", "template-1", FIXED_FIELDS[1:], "given", "metadata", write=template_text),
    "label": Strategy("label", "label-1", ("label", "matched_class"), "given", "metadata", write=label_text),
}


def find_strategies(names: Iterable[str], folder: str | None = None) -> list[Strategy]:
    """The named strategies in order. Prompted ones are the YAML files of `folder` (the packaged ones by default)."""
    prompts = Path(folder) if folder else PROMPTS
    return [_find(name, prompts) for name in dict.fromkeys(names)]


@functools.cache
def _find(name: str, folder: Path) -> Strategy:
    if name in FIXED:
        return FIXED[name]
    path = folder / f"{name}.yaml"
    if not path.is_file():
        valid = [*FIXED, *CONTROLS, *(p.stem for p in folder.glob("*.yaml"))]
        raise InputError(f"strategies: no strategy '{name}' in {folder}; {nearest(name, valid)}")
    loaded = load_prompt(str(path))
    prompt = loaded.prompt
    return Strategy(name, loaded.version, tuple(prompt.fields), prompt.label_access, prompt.facts_source, prompt=loaded)
