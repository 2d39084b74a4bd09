"""Liu et al. 2024, "MiniCache", section 3: spherical interpolation of two layers, and tokens kept apart; float64."""

import math

from .kv_scores import cosine


def minicache(lower, upper, *, t, apart):
    """What both layers are restored as; `apart`: how many of the least similar tokens are kept as they are."""
    order = sorted(range(len(lower)), key=lambda i: cosine(lower[i], upper[i]))
    restored = []
    for i, (a, b) in enumerate(zip(lower, upper, strict=True)):
        if i in order[:apart]:
            restored.append((a, b))
            continue
        angle = math.acos(min(1.0, max(-1.0, cosine(a, b))))
        length_a, length_b = math.sqrt(float(a @ a)), math.sqrt(float(b @ b))
        direction = math.sin((1 - t) * angle) * a / length_a + math.sin(t * angle) * b / length_b
        direction = direction / math.sin(angle)
        restored.append((length_a * direction, length_b * direction))
    return restored
