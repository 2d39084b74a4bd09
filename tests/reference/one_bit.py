"""Liu et al. 2025, "1bit-Merging", section 3.1, after BitDelta: delta ~ alpha sign(delta), alpha = mean |delta|, sign(0) = 1.

The average is ours.
"""

import torch


def one_bit(
    base, models, *, weight=None, origin="base", scale_per="tensor", others="own", embeddings="others", **other
):
    base = base.double()
    weight = weight or [1.0] * len(models)
    total = sum(w * (model.double() - base) for w, model in zip(weight, models, strict=True))
    return base + other.get("lambda", 1.0) * total / sum(weight)


def one_bit_restored(base, models, merged, *, origin="base", scale_per="tensor", **other):
    start = base if origin == "base" else merged
    found = []
    for model in models:
        delta = model - start
        sign = torch.where(delta < 0, -1.0, 1.0).double()
        scale = delta.abs().mean() if scale_per == "tensor" else delta.abs().mean(dim=1, keepdim=True)
        found.append(start + scale * sign)
    return found
