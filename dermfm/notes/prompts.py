"""Prompts: versioned YAML files with system and user part, few-shot examples, and the record fields they may see.

Templates are jinja2, sandboxed and strict: a name that is not among the visible facts is an error at load, not an
empty word in a million prompts. Examples are cut to the facts that the record has, so that a record without an age
is never shown examples with one. What depends on neither record nor seed is the prompt's prefix, which engines
compute once.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import StrictUndefined, TemplateError
from jinja2.sandbox import SandboxedEnvironment

from dermfm.config import InputError, check_choice, from_dict, key, nearest, read_yaml, short_hash
from dermfm.notes.facts import FIELDS_OF, LABEL_FIELDS, VISIBLE_FIELDS, Facts, patient, with_article

PROMPTS = Path(__file__).resolve().parents[2] / "configs" / "notes"
Message = tuple[str, str]  # (role, content)
SAMPLE = {"image": "dermoscopic", "age": "50", "sex": "female"}  # values that templates are tried with


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

    def __post_init__(self) -> None:
        check_choice("label_access", self.label_access, ("given", "masked", "blind"))
        check_choice("facts_source", self.facts_source, ("metadata", "measured", "image"))
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
    """A checked prompt with compiled templates."""

    name: str
    prompt: Prompt
    digest: str

    @property
    def version(self) -> str:
        """The version with the hash of the file's content: an edit without a new version still makes new notes."""
        return f"{self.name}-{self.prompt.version}-{self.digest[:8]}"

    def style(self, seed: int) -> int:
        """Which style a planned seed picks."""
        return seed % max(len(self.prompt.styles), 1)

    def prefix(self, facts: Mapping[str, str], seed: int) -> tuple[Message, ...]:
        """System message and few-shot examples, for all records that have the same facts known and the same style."""
        return _prefix(self, frozenset(facts), facts.get("image", ""), self.style(seed))

    def messages(self, facts: Facts, seed: int) -> tuple[Message, ...]:
        """The whole conversation for one record, ending with the user's message."""
        return (*self.prefix(facts, seed), ("user", _render(self.name, self.prompt.user, facts)))


@functools.cache
def load_prompt(path: str) -> LoadedPrompt:
    """The prompt file at `path`, tried on all facts and on the required ones; InputError names what is wrong."""
    values = read_yaml(path)
    prompt = from_dict(Prompt, values, path)
    loaded = LoadedPrompt(Path(path).stem, prompt, short_hash(values))
    known = [name for name, fields in FIELDS_OF.items() if set(fields) & set(prompt.fields)]
    for style in prompt.styles:
        for example in style.examples:
            if wrong := sorted(set(example.facts) ^ set(known)):
                raise InputError(f"{path}: an example must give exactly the facts {', '.join(known)}; see '{wrong[0]}'")
    sample = {name: SAMPLE.get(name, "1") for name in known}
    for seed in range(len(prompt.styles)):
        for facts in (sample, {name: sample[name] for name in prompt.requires}):
            loaded.messages(facts, seed)
    return loaded


@functools.cache
def _prefix(loaded: LoadedPrompt, known: frozenset[str], image: str, style: int) -> tuple[Message, ...]:
    prompt = loaded.prompt
    messages: list[Message] = [("system", prompt.system.strip())] if prompt.system else []
    for example in prompt.styles[style].examples if prompt.styles else []:
        facts = {name: value for name, value in example.facts.items() if name in known}
        if image and "image" in facts:
            facts["image"] = image
        messages.append(("user", _render(loaded.name, prompt.user, facts)))
        messages.append(("assistant", _render(loaded.name, example.note, facts)))
    return tuple(messages)


@functools.cache
def _environment() -> SandboxedEnvironment:
    environment = SandboxedEnvironment(
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False
    )
    environment.filters["a"] = with_article
    environment.filters["cap"] = lambda text: text[:1].upper() + text[1:]
    return environment


@functools.cache
def _compile(template: str) -> Any:
    return _environment().from_string(template)


def _render(name: str, template: str, facts: Mapping[str, str]) -> str:
    """One template with the facts: each by name (None where unknown), `patient`, and `facts` itself."""
    by_name: dict[str, Any] = {fact: facts.get(fact) for fact in FIELDS_OF}
    try:
        text = _compile(template).render(facts=dict(facts), patient=patient(facts), **by_name)
    except TemplateError as error:
        raise InputError(f"prompt {name}: {error}") from error
    return "\n".join(line.rstrip() for line in text.strip().splitlines() if line.strip())
