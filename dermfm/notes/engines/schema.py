"""Answers that are choices among options: JSON schemas as decoders can enforce them, and what must hold of the text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import jsonschema

Schema = Mapping[str, Any]


def decodable(schema: Schema) -> dict[str, Any]:
    """The schema as decoders enforce it: every property must be there, no other may, lists are bounded.

    `uniqueItems` is left out, since no grammar of reasonable size can count which options were named; `settle` drops
    what was named twice.
    """
    changed = {name: value for name, value in schema.items() if name != "uniqueItems"}
    if "properties" in schema:
        changed["properties"] = {name: decodable(value) for name, value in schema["properties"].items()}
        changed |= {"required": list(schema["properties"]), "additionalProperties": False}
    if "items" in schema:
        changed["items"] = decodable(schema["items"])
        options = schema["items"].get("enum")
        if options and "maxItems" not in schema:
            changed["maxItems"] = len(options)
    return changed


def settle(schema: Schema, text: str) -> str:
    """The answer as compact JSON, options named twice kept once; ValueError where it is not valid under the schema."""
    try:
        value = _once(schema, json.loads(text))
        jsonschema.validate(value, dict(schema))
    except json.JSONDecodeError as error:
        raise ValueError(f"the answer is no whole JSON: {error.msg} at character {error.pos}") from error
    except jsonschema.ValidationError as error:
        where = "/".join(map(str, error.absolute_path)) or "the answer"
        raise ValueError(f"{where} is not among the options: {' '.join(error.message.split())[:120]}") from error
    return json.dumps(value, ensure_ascii=False)


def longest(schema: Schema) -> int | None:
    """Characters of the longest compact JSON text under a `decodable` schema; null where it has no bound."""
    if "enum" in schema:
        return max(len(json.dumps(value)) for value in schema["enum"])
    if "const" in schema:
        return len(json.dumps(schema["const"]))
    if schema.get("type") == "boolean":
        return len("false")
    if "properties" in schema:
        parts = [longest(value) for value in schema["properties"].values()]
        names = sum(len(json.dumps(name)) + len(": , ") for name in schema["properties"])
        return None if None in parts else 2 + names + sum(part for part in parts if part is not None)
    if "items" in schema and "maxItems" in schema:
        item = longest(schema["items"])
        return None if item is None else 2 + schema["maxItems"] * (item + len(", "))
    return None


def most_tokens(schema: Schema | None, otherwise: int) -> int:
    """Tokens that any answer under the schema fits into, its end included; `otherwise` where there is no bound."""
    bound = None if schema is None else longest(decodable(schema))
    return otherwise if bound is None else bound + 1


def _once(schema: Schema, value: Any) -> Any:
    if isinstance(value, dict):
        properties = schema.get("properties", {})
        return {name: _once(properties.get(name, {}), part) for name, part in value.items()}
    if isinstance(value, list) and schema.get("uniqueItems"):
        return [item for place, item in enumerate(value) if item not in value[:place]]
    return value
