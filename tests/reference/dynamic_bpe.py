"""Byte-pair encoding over tokens, word by word, as Feher et al. 2024 describe it; shares no code with src."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise


def merged(words: dict[tuple[int, ...], int], merges: int, first: int) -> dict[tuple[int, ...], list[tuple[int, ...]]]:
    """Return every word as groups of its tokens after so many merges; new tokens are numbered from `first` on."""
    now = {word: list(word) for word in words}
    parts: dict[int, tuple[int, ...]] = {}
    for new in range(first, first + merges):
        counts: Counter[tuple[int, int]] = Counter()
        for word, tokens in now.items():
            for left, right in pairwise(tokens):
                counts[left, right] += words[word]
        if not counts:
            break
        pair = min(counts, key=lambda each: (-counts[each], each))
        parts[new] = parts.get(pair[0], (pair[0],)) + parts.get(pair[1], (pair[1],))
        for word, tokens in now.items():
            out, i = [], 0
            while i < len(tokens):
                if tuple(tokens[i : i + 2]) == pair:
                    out.append(new)
                    i += 2
                else:
                    out.append(tokens[i])
                    i += 1
            now[word] = out
    return {word: [parts.get(token, (token,)) for token in tokens] for word, tokens in now.items()}
