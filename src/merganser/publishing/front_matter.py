"""The mapping at the top of a model card, between two lines of dashes."""

from __future__ import annotations

from typing import Any

import yaml

__all__ = ["FENCE", "front_matter"]

FENCE = "---\n"


def front_matter(text: str) -> tuple[dict[str, Any], str]:
    """Return the mapping at the top of a card, and the text below it; an empty mapping if there is none."""
    text = text.replace("\r\n", "\n")
    if not text.startswith(FENCE) or (end := text.find(f"\n{FENCE}", len(FENCE) - 1)) < 0:
        return {}, text
    try:
        found = yaml.safe_load(text[len(FENCE) : end + 1])
    except (yaml.YAMLError, RecursionError, ValueError):
        found = None
    return (found, text[end + 1 + len(FENCE) :]) if isinstance(found, dict) else ({}, text)
