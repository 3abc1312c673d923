"""The ways of writing a note. Each turns a record into facts, a conversation (where a model writes) and a fallback."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dermfm.config import InputError, nearest, short_hash
from dermfm.notes.checks import Rules
from dermfm.notes.controls import CONTROLS
from dermfm.notes.facts import Facts, facts_note, plain_diagnosis, split_words, visible_facts
from dermfm.notes.mix import MIXES
from dermfm.notes.options import Structure, read_structure
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

    @property
    def options(self) -> dict[str, Any] | None:
        """The JSON schema of the structure that a model answers with; None where it answers in prose, or none is
        asked."""
        return self.prompt.options if self.prompt else None

    @property
    def sees(self) -> bool:
        """Whether the model gets the image."""
        return self.prompt is not None and self.prompt.sees

    @property
    def rules(self) -> Rules:
        """How its notes are judged."""
        return Rules(self.sees, self.prompt.prompt.max_words) if self.prompt else Rules()

    def visible(self, record: Record) -> dict[str, Any]:
        """The allowed fields of the record, those that are known."""
        return {name: record[name] for name in self.fields if record.get(name) is not None}

    def facts(self, record: Record) -> Facts:
        """The facts that a prompt may show; {} for a fixed text."""
        return visible_facts(record, self.fields) if self.prompt else {}

    def is_eligible(self, record: Record) -> bool:
        """Whether the record's known fields suffice for such a note."""
        if self.prompt is None:
            return self.fallback(record) is not None
        facts = self.facts(record)
        return all(name in facts for name in self.prompt.requires) and bool(facts)

    def realise(self, structure: Structure, record: Record) -> str:
        """The note that a valid structure stands for, in a wording picked by the record's id."""
        assert self.prompt is not None, "a fixed text has no structure"
        return form_of(self.prompt, record).text(structure)

    def form(self, record: Record) -> Form | None:
        """What reads this record's structured answer; None for prose."""
        return form_of(self.prompt, record) if self.prompt and self.options else None

    def fallback(self, record: Record) -> str | None:
        """The note without a model: the fixed text, or the facts in plain sentences; None if nothing is known."""
        if self.write:
            return self.write(record) or None
        facts = self.facts(record)
        if self.options and not self.sees and self.is_eligible(record):
            return self.realise(known_structure(self.options, facts), record)
        return facts_note(facts) or None


@dataclass(frozen=True)
class Form:
    """A structured answer's way to text, for one record: it travels to the worker with the request."""

    prompt: LoadedPrompt
    facts: Facts
    visible: dict[str, Any]
    seed: int

    def read(self, answer: str) -> tuple[str, list[str]]:
        """(text of the answer's structure, faults "option: …"); the text is "" where there is a fault."""
        structure, faults = read_structure(answer, self.prompt.options or {})
        return ("", faults) if faults else (self.text(structure), [])

    def text(self, structure: Structure) -> str:
        """The text of a valid structure."""
        return self.prompt.realise(structure, self.facts, self.visible, self.seed)


def form_of(prompt: LoadedPrompt, record: Record) -> Form:
    """The form of a record's answer; wordings depend on the record's id and the prompt's name alone."""
    visible = {name: record[name] for name in prompt.fields if record.get(name) is not None}
    seed = int(short_hash([record["record_id"], prompt.name]), 16)
    return Form(prompt, visible_facts(record, prompt.fields), visible, seed)


def known_structure(schema: Mapping[str, Any], facts: Mapping[str, str]) -> Structure:
    """The structure that the measured facts give; a list without a fact is empty."""
    return {
        name: split_words(facts.get(name, "")) if rule["type"] == "array" else facts[name]
        for name, rule in schema["properties"].items()
    }


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


def _realised(prompt: LoadedPrompt, record: Record) -> str | None:
    """The text of a prompt that needs no model; None where a required fact is unknown."""
    form = form_of(prompt, record)
    return form.text({}) if all(name in form.facts for name in prompt.requires) else None


def find_strategies(
    names: Iterable[str], folder: str | None = None, takes_images: Callable[[], bool] = lambda: False
) -> list[Strategy]:
    """The named strategies in order. Prompted ones are the YAML files of `folder` (the packaged ones by default).

    `takes_images` says whether the engine looks at images; it is asked only where a prompt would use them.
    """
    prompts = Path(folder) if folder else PROMPTS
    return [_find(name, prompts, takes_images) for name in dict.fromkeys(names)]


def _find(name: str, folder: Path, takes_images: Callable[[], bool]) -> Strategy:
    if name in FIXED:
        return FIXED[name]
    if name in MIXES:
        members = ", ".join(MIXES[name].members) or "the strategies that it is to mix"
        raise InputError(f"strategies: '{name}' is a mix, drawn when training; write its notes with {members}")
    path = folder / f"{name}.yaml"
    if not folder.is_dir():
        raise InputError(f"prompts: no folder {folder}; it holds prompt files, <strategy>.yaml (leave it out for ours)")
    if not path.is_file():
        valid = [*FIXED, *CONTROLS, *(p.stem for p in folder.glob("*.yaml"))]
        raise InputError(f"strategies: no strategy '{name}' in {folder}; {nearest(name, valid)}")
    loaded = load_prompt(str(path))
    prompt = loaded.prompt
    if prompt.images != "none" and takes_images():
        loaded = load_prompt(str(path), sees=True)
    elif prompt.images == "required":
        raise InputError(
            f"strategies: '{name}' needs an engine that takes images, and this one does not; choose another "
            "engine.kind or model, or a strategy that works from facts (narrative, abcd, characteristics, measured)"
        )
    return _of_prompt(loaded)


@functools.cache
def _of_prompt(loaded: LoadedPrompt) -> Strategy:
    told = loaded.name, loaded.version, loaded.fields, loaded.prompt.label_access, loaded.facts_source
    if not loaded.prompt.user:
        return Strategy(*told, write=functools.partial(_realised, loaded))
    return Strategy(*told, prompt=loaded)
