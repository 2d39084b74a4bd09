"""Shao et al. 2025, "HoliTom", sections 3.2 and 3.3: the segments by trying all, clusters of density peaks, as loops."""

import math

from .kv_scores import cosine


def cuts(frames):
    """All ways to cut a number of frames into segments."""
    if frames == 0:
        yield []
    for first in range(frames):
        for before in cuts(first):
            yield [*before, (first, frames - 1)]


def static(features, first, last, similarity):
    """Places whose features stay similar from one frame to the next."""
    return [
        place
        for place in range(len(features[0]))
        if last > first
        and all(cosine(features[f][place], features[f + 1][place]) > similarity for f in range(first, last))
    ]


def saved(features, segments, similarity):
    """Tokens that go when each place that stays the same becomes one."""
    return sum(len(static(features, a, b, similarity)) * (b - a) for a, b in segments)


def clustered(tokens, count, neighbours):
    """Centres' places, means and sizes, by density peaks; of equally dense tokens the earlier counts as denser."""
    n, width = len(tokens), len(tokens[0])
    far = [[math.dist(a.tolist(), b.tolist()) / math.sqrt(width) for b in tokens] for a in tokens]
    k = min(neighbours, count)
    density = [math.exp(-sum(d * d for d in sorted(row)[:k]) / k) for row in far]
    most = max(max(row) for row in far)
    rank = [(density[i], -i) for i in range(n)]
    peak = [min([far[i][j] for j in range(n) if rank[j] > rank[i]], default=most) * density[i] for i in range(n)]
    centres = sorted(sorted(range(n), key=lambda i: -peak[i])[:count])
    members = [[] for _ in centres]
    for i in range(n):
        members[min(range(count), key=lambda c: far[i][centres[c]])].append(i)
    return centres, [sum(tokens[i] for i in group) / len(group) for group in members], [len(g) for g in members]
