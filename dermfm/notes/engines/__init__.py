"""Engines that turn requests into text, behind one protocol: `generate(requests) -> list[Generation]`."""
