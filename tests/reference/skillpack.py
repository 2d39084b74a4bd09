"""Du et al. 2025, "Knowledge Grafting of Large Language Models": singular vectors in 8, 4 and 2 bits.

Quantisation is round to nearest, with the step that is best among thirteen, entry by entry; the average is ours.
"""

import math

import torch


def skillpack(base, models, *, weight=None, **other):
    base = base.double()
    weight = weight or [1.0] * len(models)
    total = sum(w * (model.double() - base) for w, model in zip(weight, models, strict=True))
    return base + other.get("lambda", 1.0) * total / sum(weight)


def nearest_levels(vector, bits, group):
    """Return a vector whose groups of entries are rounded to the nearest of the levels."""
    again = []
    half = (2**bits - 1) / 2
    for start in range(0, len(vector), group):
        entries = [float(x) for x in vector[start : start + group]]
        best = None
        for i in range(13):
            widest = max(abs(x) for x in entries) / half * (1 + 2.0**-8)
            step = float(torch.tensor(widest * (1.0 - 0.05 * i), dtype=torch.float64).bfloat16())
            levels = [(min(max(_round(x / step + half), 0), 2 * half) - half) * step if step else 0.0 for x in entries]
            off = math.fsum((x - y) ** 2 for x, y in zip(entries, levels, strict=True))
            if best is None or off < best[0]:
                best = off, levels
        again += best[1]
    return torch.tensor(again, dtype=torch.float64)


def _round(x):
    return float(torch.tensor(x, dtype=torch.float64).round())


def skillpack_restored(start, models, *, rank, widths, group):
    """Restore with the first widths[0] singular vectors in so many bits, and so on; `widths` has a number for each."""
    found = []
    for model in models:
        left, values, right = torch.linalg.svd(model - start, full_matrices=False)
        again = torch.zeros_like(start)
        for j in range(rank):
            u, v = (nearest_levels(side, widths[j], group) for side in (left[:, j], right[j]))
            again += values[j] * torch.outer(u, v)
        found.append(start + again)
    return found
