"""Find indexed stacks (`prefix.0.suffix`, `prefix.1.suffix`, ...) in a list of names."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence

__all__ = ["Hit", "find_stacks", "first_in", "walk"]

# No leading zeros: the name must be recoverable from the integer index, or renaming could not be undone.
_INDEX = re.compile(r"(?:0|[1-9][0-9]{0,5})\Z", re.ASCII)
_LAYER_WORD = re.compile(r"(?:(?:.*_)?(?:layers?|blocks?)|h)\Z")


Hit = tuple[str, int, str]
"""A numeric component of a name: what is before it, its number, and what is behind it."""


def walk(name: str) -> Iterator[Hit]:
    """Yield `(prefix, index, suffix)` for each numeric component of a dotted name, from the left."""
    words = name.split(".")
    for position in range(1, len(words) - 1):
        # most words are not numbers, and this check is faster than the pattern
        if words[position].isdecimal() and _INDEX.match(words[position]):
            yield ".".join(words[:position]), int(words[position]), ".".join(words[position + 1 :])


def find_stacks(hits: Mapping[str, Sequence[Hit]], counts: Collection[int]) -> dict[str, int]:
    """Return the stacks of layers, as a mapping from prefix to number of layers.

    A stack has the indices 0..n-1 without a gap, or most of a count that the config names (pruned models may have empty
    layers). Its last word is a layer word, or its layers share tensor names as blocks do. Indices inside a layer
    (experts, sub-layers of T5) are not stacks.

    Args:
        hits: What `walk` yields of every tensor name.
        counts: The numbers of layers in the config.
    """
    suffixes: dict[str, dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
    for found in hits.values():
        for prefix, index, suffix in found:
            suffixes[prefix][index].add(suffix)
    sizes = {prefix: size for prefix, layers in suffixes.items() if (size := _stack_size(prefix, layers, counts))}
    outermost = {hit[0] for found in hits.values() if (hit := first_in(found, sizes))}
    return {prefix: size for prefix, size in sizes.items() if prefix in outermost}


def first_in(hits: Sequence[Hit], stacks: Collection[str]) -> Hit | None:
    """Return `(stack, index, suffix)` for the outermost stack that contains a name; None if none does.

    Args:
        hits: What `walk` yields of the name.
        stacks: Prefixes of the stacks.
    """
    for hit in hits:
        if hit[0] in stacks:
            return hit
    return None


def _stack_size(prefix: str, layers: dict[int, set[str]], counts: Collection[int]) -> int:
    size = max(layers) + 1
    word = prefix.rsplit(".", 1)[-1].lower()
    if "expert" in word:
        return 0
    if len(layers) != size:
        size = next((count for count in sorted(counts) if max(layers) < count <= 2 * len(layers)), 0)
        return size if _LAYER_WORD.match(word) else 0
    if _LAYER_WORD.match(word):
        return size
    shared = set.intersection(*layers.values())
    blocks = any("." in suffix for suffix in shared)
    return size if size >= 2 and (blocks or (shared and size in counts)) else 0
