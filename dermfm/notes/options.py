"""Closed options: what a structured answer may hold, as a JSON schema, and reading such an answer back.

An engine that can constrain its decoding gets the schema; whatever comes back is parsed and held against the same
options here, so that an engine that cannot is no weaker a promise, only a lower yield.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dermfm.config import key

Structure = dict[str, Any]  # property → one choice, or a list of choices


@dataclass(kw_only=True)
class Option:
    """One property of a structured answer. `measured` are the choices that measured facts can support.

    A text-only engine is offered nothing else; a property without such choices is only asked of engines that see.
    """

    name: str = key("???", "property of the answer")
    choices: list[str] = key([], "what it may be")
    measured: list[str] = key([], "the choices that a text-only engine may take")
    many: bool = key(False, "whether it is a list of choices")
    at_least: int = key(1, "fewest choices of a list")

    def __post_init__(self) -> None:
        if not self.choices or len(set(self.choices)) < len(self.choices):
            raise ValueError(f"options.{self.name}: choices must be a list of different words")
        if wrong := [word for word in self.measured if word not in self.choices]:
            raise ValueError(f"options.{self.name}.measured: '{wrong[0]}' is not among its choices")
        if not 0 <= self.at_least <= len(self.choices):
            raise ValueError(f"options.{self.name}.at_least: {self.at_least} is not within 0 … {len(self.choices)}")

    def offered(self, sees: bool) -> list[str]:
        """The choices for an engine that sees the image, or does not."""
        return self.choices if sees else self.measured


def json_schema(options: Sequence[Option], sees: bool) -> dict[str, Any] | None:
    """The options as a JSON schema of an object, properties in their order; None where there are none."""
    properties: dict[str, Any] = {}
    for option in options:
        choice = {"type": "string", "enum": option.offered(sees)}
        if not choice["enum"]:
            continue
        properties[option.name] = choice
        if option.many:
            limits = {"minItems": option.at_least, "maxItems": len(choice["enum"]), "uniqueItems": True}
            properties[option.name] = {"type": "array", "items": choice, **limits}
    if not properties:
        return None
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def read_structure(answer: str, schema: Mapping[str, Any]) -> tuple[Structure, list[str]]:
    """(structure, faults "option: …") of a model's answer; the structure is {} where there is a fault.

    Text around the one JSON object (a code fence, a sentence) is passed over. A choice that a list names twice
    counts once: no decoder enforces `uniqueItems`.
    """
    found = re.search(r"\{.*\}", answer, re.DOTALL)
    try:
        structure = json.loads(found[0]) if found else None
    except (json.JSONDecodeError, RecursionError):
        structure = None
    if not isinstance(structure, dict):
        return {}, ["option: no JSON object"]
    faults = list(_wrong_options(structure, schema["properties"]))
    if faults:
        return {}, faults
    once = {name: list(dict.fromkeys(v)) if isinstance(v, list) else v for name, v in structure.items()}
    return {name: once[name] for name in schema["properties"]}, []


def _wrong_options(structure: Mapping[str, Any], properties: Mapping[str, Any]) -> Iterator[str]:
    for name in structure.keys() - properties.keys():
        yield f"option: {str(name)[:40]} (not asked for)"
    for name, rule in properties.items():
        value = structure.get(name)
        if value is None:
            yield f"option: {name} (not given)"
        elif rule["type"] == "array":
            if not isinstance(value, list) or len(value) < rule["minItems"]:
                yield f"option: {name} (not a list of at least {rule['minItems']})"
            else:
                yield from (f"option: {name} ({one!s:.40})" for one in value if one not in rule["items"]["enum"])
        elif value not in rule["enum"]:
            yield f"option: {name} ({value!s:.40})"
