"""Find indexed stacks (`prefix.0.suffix`, `prefix.1.suffix`, ...) in a list of names."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator

__all__ = ["find_stacks", "split_at", "walk"]

# No leading zeros: the name must be recoverable from the integer index, or renaming could not be undone.
_INDEX = re.compile(r"(?:0|[1-9][0-9]{0,5})\Z", re.ASCII)
_LAYER_WORD = re.compile(r"(?:(?:.*_)?(?:layers?|blocks?)|h)\Z")


def walk(name: str) -> Iterator[tuple[str, int, str]]:
    """Yield `(prefix, index, suffix)` for each numeric component of a dotted name, from the left."""
    words = name.split(".")
    for position in range(1, len(words) - 1):
        # most words are no numbers, and this tells sooner than the pattern
        if words[position].isdecimal() and _INDEX.match(words[position]):
            yield ".".join(words[:position]), int(words[position]), ".".join(words[position + 1 :])


def find_stacks(names: Iterable[str], counts: Collection[int]) -> dict[str, int]:
    """Return the stacks of layers, as a mapping from prefix to number of layers.

    A stack has the indices 0..n-1 without a gap, or most of a count that the config names (pruned models may have empty
    layers). Its last word is a layer word, or its layers share tensor names as blocks do. Indices inside a layer
    (experts, sub-layers of T5) are not stacks.

    Args:
        names: Every tensor name.
        counts: The numbers of layers in the config.
    """
    names = list(names)
    suffixes: dict[str, dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
    for name in names:
        for prefix, index, suffix in walk(name):
            suffixes[prefix][index].add(suffix)
    sizes = {prefix: size for prefix, layers in suffixes.items() if (size := _stack_size(prefix, layers, counts))}
    outermost = {hit[0] for name in names if (hit := split_at(name, sizes))}
    return {prefix: size for prefix, size in sizes.items() if prefix in outermost}


def split_at(name: str, stacks: Collection[str]) -> tuple[str, int, str] | None:
    """Return `(stack, index, suffix)` for the outermost stack that contains `name`; None if none does."""
    return next((hit for hit in walk(name) if hit[0] in stacks), None)


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
