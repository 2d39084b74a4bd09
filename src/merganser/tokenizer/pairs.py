"""Merge the most frequent pairs of neighbouring tokens, within words, one pair after another (byte-pair encoding)."""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Mapping

__all__ = ["Pairs"]

_GONE = -1
"""Stands at a place whose token was merged into the one before it; and where a word begins or ends."""


class Pairs:
    """Words as sequences of tokens, and how often each pair of neighbours occurs in them.

    The pair that occurs most often comes first; of equally frequent ones, that of the lower numbers. Where a pair overlaps
    itself (`a a a`), every occurrence counts, and those on the left are merged.

    Args:
        words: How often each word occurs, by its tokens.
    """

    def __init__(self, words: Mapping[tuple[int, ...], int]):
        self._token: list[int] = []
        self._before: list[int] = []
        self._after: list[int] = []
        self._weight: list[int] = []
        self._words: dict[tuple[int, ...], int] = {}
        self._counts: dict[tuple[int, int], int] = defaultdict(int)
        self._places: dict[tuple[int, int], set[int]] = defaultdict(set)
        for word, count in words.items():
            self._add(word, count)
        self._queue = [(-count, pair) for pair, count in self._counts.items()]
        heapq.heapify(self._queue)

    def _add(self, word: tuple[int, ...], count: int) -> None:
        start = len(self._token)
        end = start + len(word)
        self._words[word] = start
        self._token += word
        self._weight += [count] * len(word)
        self._before += [_GONE, *range(start, end - 1)][: len(word)]
        self._after += [*range(start + 1, end), _GONE][-len(word) :] if word else []
        for place in range(start, end - 1):
            pair = (self._token[place], self._token[place + 1])
            self._counts[pair] += count
            self._places[pair].add(place)

    def best(self) -> tuple[tuple[int, int], int] | None:
        """Return the most frequent pair and how often it occurs; None if there is no pair left."""
        while self._queue:
            negative, pair = self._queue[0]
            count = self._counts.get(pair, 0)
            if count == -negative and count > 0:
                return pair, count
            heapq.heappop(self._queue)
            if 0 < count < -negative:
                # it became rarer since it was queued
                heapq.heappush(self._queue, (-count, pair))
        return None

    def drop(self, pair: tuple[int, int]) -> None:
        """Leave out a pair from now on."""
        self._counts.pop(pair, None)
        self._places.pop(pair, None)

    def merge(self, pair: tuple[int, int], token: int) -> None:
        """Put one token in the place of every occurrence of a pair.

        Args:
            pair: The pair.
            token: The token.
        """
        left, right = pair
        grown: set[tuple[int, int]] = set()
        for place in sorted(self._places.get(pair, ())):
            second = self._after[place]
            # an occurrence that overlapped another one is gone
            if self._token[place] != left or second == _GONE or self._token[second] != right:
                continue
            before, after = self._before[place], self._after[second]
            self._change(before, place, -1)
            self._change(second, after, -1)
            self._token[place], self._token[second] = token, _GONE
            self._after[place] = after
            if after != _GONE:
                self._before[after] = place
            grown |= self._change(before, place, 1) | self._change(place, after, 1)
        self.drop(pair)
        for each in grown:
            heapq.heappush(self._queue, (-self._counts.get(each, 0), each))

    def _change(self, one: int, other: int, sign: int) -> set[tuple[int, int]]:
        """Count the pair at two places once more, or once less, for every occurrence of its word; return the pair."""
        if _GONE in (one, other):
            return set()
        pair = (self._token[one], self._token[other])
        self._counts[pair] += sign * self._weight[one]
        if sign > 0:
            self._places[pair].add(one)
        else:
            self._places[pair].discard(one)
        return {pair}

    def words(self) -> dict[tuple[int, ...], tuple[int, ...]]:
        """Return the tokens of each word as they are now, by those of the beginning."""
        found = {}
        for word, start in self._words.items():
            tokens = self._token[start : start + len(word)]
            found[word] = tuple(token for token in tokens if token != _GONE)
        return found
