"""Ids of special tokens in configs, where tokens have other ids in the output."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ...anatomy.settings.config import as_int

__all__ = ["moved_ids", "renumbered"]

_KEY = re.compile(r"token_(id|ids|index)$")


def moved_ids(before: Mapping[str, int], after: Mapping[str, int]) -> dict[int, int | None]:
    """Return the new id of every token whose id changes, by its old one; None for tokens that are no longer there."""
    return {number: after.get(token) for token, number in before.items() if after.get(token) != number}


def renumbered(config: Mapping[str, Any], moved: Mapping[int, int | None]) -> dict[str, Any]:
    """Return a config in which all ids of tokens, such as `eos_token_id`, are the new ones.

    Ids of tokens that are no longer there become None, and are left out of lists.

    Args:
        config: config.json or generation_config.json; mappings inside it are changed, too.
        moved: From `moved_ids`.
    """
    result: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            result[key] = renumbered(value, moved)
        elif _KEY.search(key) and isinstance(value, list):
            found = [moved.get(each, each) if as_int(each) is not None else each for each in value]
            result[key] = [each for each in found if each is not None]
        elif _KEY.search(key) and as_int(value) is not None:
            result[key] = moved.get(value, value)
        else:
            result[key] = value
    return result
