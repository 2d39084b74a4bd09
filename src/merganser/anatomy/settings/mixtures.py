"""The settings of a mixture that say how many experts there are, and how many compute each token."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from .config import as_int

__all__ = ["CHOSEN", "COUNTS", "chosen_experts", "number_of_experts", "numbers_said", "odd_routing", "with_experts"]

COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""Keys of the number of experts; ERNIE's is the last."""

CHOSEN = ("num_experts_per_tok", "experts_per_token", "moe_k", "moe_topk")
"""Keys of the number that compute each token; of ERNIE and Hunyuan the last two."""


def _holder(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the part of a config that describes the experts: that of the language model, where it is nested."""
    nested = config.get("text_config")
    return nested if isinstance(nested, Mapping) and any(key in nested for key in COUNTS) else config


def number_of_experts(config: Mapping[str, Any]) -> int | None:
    """Return how many experts a config.json says there are; None if it does not say it."""
    own = _holder(config)
    return next((found for key in COUNTS if (found := as_int(own.get(key)))), None)


def numbers_said(config: Mapping[str, Any]) -> frozenset[int]:
    """Return all numbers of experts that a config.json says, in any of its parts."""
    found: set[int] = set()
    for key, value in config.items():
        if isinstance(value, Mapping):
            found |= numbers_said(value)
        elif key in COUNTS:
            found |= {count for each in (value if isinstance(value, list) else [value]) if (count := as_int(each))}
    return frozenset(found)


def chosen_experts(config: Mapping[str, Any]) -> int | None:
    """Return how many experts a config.json says compute each token; None if it does not say it."""
    own = _holder(config)
    return next((found for key in CHOSEN if (found := as_int(own.get(key)))), None)


def odd_routing(config: Mapping[str, Any]) -> str | None:
    """Return why a config.json describes a mixture that cannot compute a token; None if it does not."""
    own, count = _holder(config), number_of_experts(config)
    for key in CHOSEN:
        value = own.get(key)
        # a family whose layers may be dense says so with one expert; Hunyuan may give a list with a number per layer
        if count is None or count == 1 or value is None or isinstance(value, list):
            continue
        if as_int(value) is None or not 1 <= int(value) <= count:
            return f"{key} is {value!r}, and there are {count} experts: it must be 1 to {count}"
    return None


def with_experts(config: Mapping[str, Any], experts: int, chosen: int) -> dict[str, Any] | None:
    """Return a config.json with other numbers, under all keys that it has for them.

    Args:
        config: The config.
        experts: Number of experts.
        chosen: How many of them compute each token.

    Returns:
        The config; None if it does not say how many experts there are.
    """
    found = copy.deepcopy(dict(config))
    own = _holder(found)
    counts = [key for key in COUNTS if key in own]
    if not counts or not isinstance(own, dict):
        return None
    own |= dict.fromkeys(counts, experts)
    # a config without the key relies on a default
    own |= dict.fromkeys([key for key in CHOSEN if key in own] or CHOSEN[:1], chosen)
    return found
