"""Prompts: versioned YAML files with system and user part, few-shot examples, and the record fields they may see.

Templates are jinja2, sandboxed and strict: a name that is not among the visible facts is an error at load, not an
empty word in a million prompts. Examples are cut to the facts that the record has, so that a record without an age
is never shown examples with one. What depends on neither record nor seed is the prompt's prefix, which engines
compute once.

A prompt with `options` asks for a structure (JSON) instead of prose, and `realise` turns a structure into text; a
prompt with `realise` alone needs no model at all. Where `images` allows it, an engine that takes images gets the
picture, and the facts that were measured from it are left out: the model is to look for itself.
"""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from jinja2 import StrictUndefined, TemplateError
from jinja2.sandbox import SandboxedEnvironment

from dermfm.config import InputError, check_choice, check_range, from_dict, key, nearest, read_yaml, short_hash
from dermfm.notes.facts import (
    APPEARANCE,
    DEGREE_FIELDS,
    FIELDS_OF,
    LABEL_FIELDS,
    VISIBLE_FIELDS,
    Facts,
    join_words,
    patient,
    split_words,
    with_article,
)
from dermfm.notes.options import Option, Structure, json_schema

PROMPTS = Path(__file__).resolve().parents[2] / "configs" / "notes"
Message = tuple[str, str]  # (role, content)
# Values that templates are tried with.
SAMPLE = {
    "image": "dermoscopic", "age": "50", "sex": "female", "asymmetry": "symmetric", "border": "sharp",
    "colours": "red and black", "structures": "dots",
}  # fmt: skip
IMAGES = ("none", "optional", "required")
WHERE_SEEN = "image"  # facts_source of a note whose model saw the image


@dataclass(kw_only=True)
class Example:
    """One few-shot example: facts by name, and the note that states them (jinja2, cut to the facts it is given)."""

    facts: dict[str, str] = key({}, "facts by name, all that the prompt may show")
    note: str = key("", "the note, with `{% if site %}` and the like around what needs a fact")


@dataclass(kw_only=True)
class Style:
    """A way of writing: its few-shot examples. Each note's planned seed picks one style."""

    examples: list[Example] = key([], "few-shot examples in order")


@dataclass(kw_only=True)
class Prompt:
    """A prompt file. `fields` are the record's fields that it may see; everything else is invisible to it."""

    version: str = key("???", "raise it when the wording changes; part of every note's id")
    label_access: str = key("given", "given | masked | blind: what the prompt knows of the label")
    facts_source: str = key("metadata", "metadata | measured | image")
    fields: list[str] = key([], "record fields that the prompt may see")
    requires: list[str] = key([], "facts without which a record gets no note of this strategy")
    system: str = key("", "system message")
    user: str = key("", "user message (jinja2; sees `facts` and each fact by name)")
    styles: list[Style] = key([], "ways of writing, each with its examples")
    max_words: int = key(120, "longest note; a longer one is a fault")
    images: str = key("none", "none | optional | required: whether the model sees the image")
    options: list[Option] = key([], "closed options: the answer is a JSON object of these instead of prose")
    realise: list[str] = key([], "wordings (jinja2) of a structure, or without options of the facts, picked by record")

    def __post_init__(self) -> None:
        check_choice("label_access", self.label_access, ("given", "masked", "blind"))
        check_choice("facts_source", self.facts_source, ("metadata", "measured", "image"))
        check_choice("images", self.images, IMAGES)
        check_range("max_words", self.max_words, 10, 2000)
        if self.options and not self.realise:
            raise ValueError("realise: options need at least one wording that turns them into text")
        if not self.user and not self.realise:
            raise ValueError(
                "user: a prompt needs a user message (or wordings in `realise`, for notes without a model)"
            )
        for field in self.fields:
            if field not in VISIBLE_FIELDS:
                raise ValueError(f"fields: a prompt cannot see '{field}'; {nearest(field, VISIBLE_FIELDS)}")
        for name in self.requires:
            check_choice("requires", name, FIELDS_OF)
        told = sorted(set(self.fields) & set(LABEL_FIELDS))
        if self.label_access == "blind" and told:
            raise ValueError(
                f"fields: a label-blind prompt may not see '{told[0]}'; remove it or set label_access: given"
            )


@dataclass(frozen=True, eq=False)
class LoadedPrompt:
    """A checked prompt with compiled templates, for an engine that sees the image (`sees`) or does not."""

    name: str
    prompt: Prompt
    digest: str
    sees: bool = False

    @property
    def version(self) -> str:
        """The version with the hash of the file's content: an edit without a new version still makes new notes."""
        return f"{self.name}-{self.prompt.version}-{self.digest[:8]}"

    @property
    def fields(self) -> tuple[str, ...]:
        """The record fields that it sees: all that the file allows, less the measured ones where it sees the image."""
        return tuple(f for f in self.prompt.fields if not (self.sees and f.startswith("measured_")))

    @property
    def requires(self) -> list[str]:
        """Facts without which a record gets no note."""
        return [name for name in self.prompt.requires if not (self.sees and name in APPEARANCE)]

    @property
    def facts_source(self) -> str:
        """Where the facts come from that are no metadata."""
        return WHERE_SEEN if self.sees else self.prompt.facts_source

    @functools.cached_property
    def told(self) -> tuple[str, ...]:
        """Names of the facts that its fields can give it; a template that says another one is refused."""
        return tuple(name for name, fields in FIELDS_OF.items() if set(fields) & set(self.prompt.fields))

    @functools.cached_property
    def options(self) -> dict[str, Any] | None:
        """The JSON schema of a structured answer; None for prose."""
        return json_schema(self.prompt.options, self.sees)

    def style(self, seed: int) -> int:
        """Which style a planned seed picks."""
        return seed % max(len(self.prompt.styles), 1)

    def prefix(self, facts: Mapping[str, str], seed: int) -> tuple[Message, ...]:
        """System message and few-shot examples, for all records that have the same facts known and the same style."""
        return _prefix(self, frozenset(facts), facts.get("image", ""), self.style(seed))

    def messages(self, facts: Facts, seed: int) -> tuple[Message, ...]:
        """The whole conversation for one record, ending with the user's message."""
        return (*self.prefix(facts, seed), ("user", _render(self, self.prompt.user, facts, sees=self.sees)))

    def realise(self, structure: Structure, facts: Facts, visible: Mapping[str, Any], seed: int) -> str:
        """The text of a structure: a wording, and the words within it, picked by `seed`."""
        chance = random.Random(seed)
        template = chance.choice(self.prompt.realise)
        more = {"s": structure, "measured": _degrees(visible), "pick": chance.choice, "shuffled": _shuffler(chance)}
        return " ".join(_render(self, template, facts, sees=self.sees, **more).split())


@functools.cache
def load_prompt(path: str, sees: bool = False) -> LoadedPrompt:
    """The prompt file at `path`, tried on all facts and on the required ones; InputError names what is wrong.

    `sees`: whether the engine takes images; it counts where the prompt uses them.
    """
    values = read_yaml(path)
    prompt = from_dict(Prompt, values, path)
    sees = prompt.images == "required" or (sees and prompt.images == "optional")
    loaded = LoadedPrompt(Path(path).stem, prompt, short_hash(values), sees)
    for style in prompt.styles:
        for example in style.examples:
            if wrong := sorted(set(example.facts) ^ set(loaded.told)):
                raise InputError(
                    f"{path}: an example must give exactly the facts {', '.join(loaded.told)}; see '{wrong[0]}'"
                )
    told = [name for name in loaded.told if not (loaded.sees and name in APPEARANCE)]
    try:
        _try_out(loaded, told)
    except InputError as error:
        hint = f"; its `fields` give it the facts {', '.join(told) or 'none'}" if "undefined" in str(error) else ""
        raise InputError(f"{path}: {error}{hint}") from error
    return loaded


def _try_out(loaded: LoadedPrompt, known: Sequence[str]) -> None:
    """Render everything once with all facts and once with the required ones alone."""
    sample = {name: SAMPLE.get(name, "1") for name in known}
    full = {name: _first_choices(rule) for name, rule in (loaded.options or {"properties": {}})["properties"].items()}
    empty = {name: [] if isinstance(value, list) else value for name, value in full.items()}
    for facts, structure in ((sample, full), ({name: sample[name] for name in loaded.requires}, empty)):
        for seed in range(len(loaded.prompt.styles) or 1):
            loaded.messages(facts, seed)
        for template in loaded.prompt.realise:
            tried = replace(loaded, prompt=replace(loaded.prompt, realise=[template]))
            for seed in range(3):
                tried.realise(structure, facts, {}, seed)


def _first_choices(rule: Mapping[str, Any]) -> Any:
    return rule["items"]["enum"] if rule["type"] == "array" else rule["enum"][0]


@functools.cache
def _prefix(loaded: LoadedPrompt, known: frozenset[str], image: str, style: int) -> tuple[Message, ...]:
    prompt = loaded.prompt
    messages: list[Message] = [("system", _render(loaded, prompt.system, {}, sees=loaded.sees))]
    for example in prompt.styles[style].examples if prompt.styles else []:
        facts = {name: value for name, value in example.facts.items() if name in known}
        if image and "image" in facts:
            facts["image"] = image
        messages.append(("user", _render(loaded, prompt.user, facts, sees=loaded.sees)))
        messages.append(("assistant", _render(loaded, example.note, facts, sees=loaded.sees)))
    return tuple((role, text) for role, text in messages if text)


def _degrees(visible: Mapping[str, Any]) -> dict[str, Any]:
    """The measured values that the prompt may see, by name without `measured_`; None where unknown."""
    names = ("measured_dots", "measured_globules", "measured_structureless", *DEGREE_FIELDS)
    return {name.removeprefix("measured_"): visible.get(name) for name in names}


def _shuffler(chance: random.Random) -> Callable[[Sequence[Any]], list[Any]]:
    """A function that puts a list into an order drawn from `chance`, and leaves empty texts out."""
    return lambda items: chance.sample(kept := [i for i in items if str(i).strip()], len(kept))


@functools.cache
def _environment() -> SandboxedEnvironment:
    environment = SandboxedEnvironment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False
    )
    environment.filters["a"] = with_article
    environment.filters["cap"] = lambda text: text[:1].upper() + text[1:]
    environment.filters["words"] = join_words
    environment.filters["listed"] = lambda value: json.dumps(split_words(value or ""))
    return environment


@functools.cache
def _compile(template: str) -> Any:
    return _environment().from_string(template)


def _render(loaded: LoadedPrompt, template: str, facts: Mapping[str, str], **more: Any) -> str:
    """One template with the facts: each by name (None where unknown), `patient`, `facts` itself, and `more`."""
    by_name: dict[str, Any] = {fact: facts.get(fact) for fact in loaded.told}
    if "age" in by_name or "sex" in by_name:
        by_name["patient"] = patient(facts)
    try:
        text = _compile(template).render(facts=dict(facts), **by_name, **more)
    except TemplateError as error:
        raise InputError(f"prompt {loaded.name}: {error}") from error
    return "\n".join(line.rstrip() for line in text.strip().splitlines() if line.strip())
