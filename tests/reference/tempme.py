"""Shen et al. 2025, "TempMe", section 3.3: neighbouring clips become one, one video, float64, as lists.

A clip is (class tokens, patches), a token (vector, size).
"""

from .kv_scores import cosine


def joined(clips, count):
    """Class tokens and patches of `count` neighbouring clips, one after the other."""
    return [
        ([t for c in clips[at : at + count] for t in c[0]], [t for c in clips[at : at + count] for t in c[1]])
        for at in range(0, len(clips), count)
    ]


def merged(clip, metric, r):
    """Merge r patches of a clip; `metric`: a vector per patch. Places are counted with the class tokens."""
    classes, patches = clip
    own = [p for p in range(len(patches)) if (p + len(classes)) % 2 == 0]
    other = [p for p in range(len(patches)) if (p + len(classes)) % 2 == 1]
    best = {a: max(other, key=lambda b: cosine(metric[a], metric[b])) for a in own}
    gone = sorted(own, key=lambda a: -cosine(metric[a], metric[best[a]]))[:r]
    left = []
    for b, (vector, size) in enumerate(patches):
        if b not in gone:
            total, parts = size, size * vector
            for a in gone:
                if best[a] == b:
                    total, parts = total + patches[a][1], parts + patches[a][1] * patches[a][0]
            left.append((parts / total, total))
    return classes, left
