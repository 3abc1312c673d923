"""One regular expression for many phrases, as a tree of their letters: `re` tries an alternation one by one."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any


def any_of(phrases: Iterable[str]) -> str:
    """A pattern that matches each of the phrases and nothing else, the longest where several would match."""
    root: dict[str, Any] = {}
    for phrase in phrases:
        node = root
        for letter in phrase:
            node = node.setdefault(letter, {})
        node[""] = {}
    return f"(?:{_branches(root)})"


def _branches(node: dict[str, Any]) -> str:
    found = [re.escape(letter) + _branches(below) for letter, below in node.items() if letter]
    if not found:
        return ""
    body = found[0] if len(found) == 1 and "" not in node else f"(?:{'|'.join(found)})"
    return f"{body}?" if "" in node else body
