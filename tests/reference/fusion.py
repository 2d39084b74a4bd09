"""Fusion by training, literally and in float64: alignments by trying everything, losses with plain loops."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from itertools import combinations


def groups(one: Sequence[bytes], other: Sequence[bytes]) -> list[tuple[bytes, bytes]]:
    """The finest pieces of two divisions of a text that begin and end together, as the text of both sides."""
    found = []
    own, others, text, other_text = list(one), list(other), b"", b""
    while own or others:
        if own and (len(text) <= len(other_text) or not others):
            text += own.pop(0)
        elif others:
            other_text += others.pop(0)
        if text and len(text) == len(other_text):
            found.append((text, other_text))
            text = other_text = b""
    return found


def edit_distance(one: bytes, other: bytes) -> int:
    @cache
    def distance(i: int, j: int) -> int:
        if not i or not j:
            return i + j
        return min(
            distance(i - 1, j) + 1, distance(i, j - 1) + 1, distance(i - 1, j - 1) + (one[i - 1] != other[j - 1])
        )

    return distance(len(one), len(other))


def cheapest_path(costs: Sequence[Sequence[float]]) -> float:
    """The least sum of costs of a monotone path through all rows and columns, by trying all of them."""
    n, m = len(costs), len(costs[0])

    @cache
    def best(i: int, j: int) -> float:
        if i < 0 or j < 0:
            return math.inf
        if i == j == 0:
            return costs[0][0]
        return costs[i][j] + min(best(i - 1, j - 1), best(i - 1, j), best(i, j - 1))

    return best(n - 1, m - 1)


def log_softmax(logits: Sequence[float]) -> list[float]:
    top = max(logits)
    total = top + math.log(sum(math.exp(x - top) for x in logits))
    return [x - total for x in logits]


def taught_cross_entropy(logits: Sequence[float], ids: Sequence[int], p: Sequence[float], rest: float) -> float:
    q = [math.exp(x) for x in log_softmax(logits)]
    loss = -sum(share * math.log(q[i]) for i, share in zip(ids, p, strict=True) if share)
    others = sum(q[i] for i in range(len(q)) if i not in ids)
    return loss - (rest * math.log(others) if rest else 0.0)


def likelihood_loss(student: float, source: float, t: float) -> float:
    p, q = math.exp(source / t), math.exp(student / t)
    return -t * (p * math.log(q) + (1 - p) * math.log(1 - q))


def avg_ce(ce: Sequence[float]) -> list[float]:
    weights = [math.exp(math.exp(-own)) if math.isfinite(own) else 0.0 for own in ce]
    return [own / sum(weights) for own in weights]


def gate(weights: Sequence[Sequence[Sequence[float]]], biases: Sequence[Sequence[float]], ce: Sequence[float]):
    """Shares of sources by a gate of three layers, after the threshold of 0.15."""
    values = [math.exp(-own) for own in ce]
    for number, (matrix, bias) in enumerate(zip(weights, biases, strict=True)):
        values = [sum(w * v for w, v in zip(row, values, strict=True)) + b for row, b in zip(matrix, bias, strict=True)]
        if number < 2:
            values = [v * 0.5 * (1 + math.erf(v / math.sqrt(2))) for v in values]
    shares = [math.exp(x) for x in log_softmax(values)]
    kept = [share if share > 0.15 else 0.0 for share in shares]
    if not any(kept):
        kept = [share if i == shares.index(max(shares)) else 0.0 for i, share in enumerate(shares)]
    return [share / sum(kept) for share in kept]


def variation(sums: Sequence[float]) -> float:
    """Squared coefficient of variation."""
    mean = sum(sums) / len(sums)
    pairs = sum((a - b) ** 2 for a, b in combinations(sums, 2))
    return pairs / len(sums) / (len(sums) - 1) / mean**2


def debiased_chunks(
    pieces: Sequence[tuple[Sequence[int], Sequence[int]]],
    student: Sequence[float],
    source: Sequence[float],
    student_words: Sequence[float],
    source_words: Sequence[float],
    threshold: float,
) -> list[tuple[float, float]]:
    """Log-probabilities of chunks by both models, as ALM's authors debias them, with their matrices.

    Args:
        pieces: For each of the finest chunks the tokens of the student, and those of the source.
        student, source: The log-probability of each token, given those before it.
        student_words, source_words: Behind each token the log-probability that a word begins.
        threshold: A chunk ends where a word begins with more than this probability, by the source.
    """
    own = [sum(student[i] for i in mine) for mine, _ in pieces]
    others = [sum(source[i] for i in theirs) for _, theirs in pieces]
    own_words, other_words = [student_words[mine[-1]] for mine, _ in pieces], [source_words[t[-1]] for _, t in pieces]
    # the number of ends from here to the last one, counted from behind, and turned into a number from the front
    ends = [math.exp(words) > threshold for words in other_words]
    left = [sum(ends[i:]) for i in range(len(ends))]
    merged = [max(left) - number for number in left]
    found = []
    for column in range(max(merged, default=-1) + 1):
        rows = [i for i, number in enumerate(merged) if number == column]
        last = rows[-1]
        found.append((sum(own[i] for i in rows) + own_words[last], sum(others[i] for i in rows) + other_words[last]))
    return found


def taught_by_pairs(
    own, theirs, tokens, others, pairs, ids, probabilities, table, count
) -> dict[int, dict[int, float]]:
    """What FuseChat teaches at each position of the student, as probabilities of its tokens."""
    found = {}
    for position in range(len(own) - 1):
        token, places = tokens[position], pairs[position]
        if token:
            equal = [j for j in places if others[j] == token]
            holding = [j for j in places if token in others[j]]
            rest, pieces = token, []
            for j in places:
                if others[j] and rest.startswith(others[j]):
                    rest, pieces = rest[len(others[j]) :], [*pieces, j]
            places = equal[:1] or holding[:1] or ([] if rest else pieces)
        else:
            places = [j for j in places if len(pairs[position]) == 1 and not others[j]]
        weights = [math.exp(count(own[position], theirs[j])) for j in places]
        best: dict[int, float] = {}
        for weight, j in zip(weights, places, strict=True):
            for token_id, p in zip(ids[j], probabilities[j], strict=True):
                if table[token_id] >= 0:
                    best[table[token_id]] = max(best.get(table[token_id], 0.0), p * weight / sum(weights))
        top = sorted(best.values(), reverse=True)[: len(ids[0])]
        kept = {token_id: p for token_id, p in best.items() if p >= top[-1]} if top else {}
        if kept:
            found[position] = {token_id: p / sum(kept.values()) for token_id, p in kept.items()}
    return found
