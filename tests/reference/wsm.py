"""Tian et al. 2025, "WSM: Decay-Free Learning Rate Schedule via Checkpoint Merging", theorem 3.1, read from the right.

theta = theta_n + sum_(i=1)^k w_i (theta_(n+i) - theta_(n+i-1)), 1 >= w_1 >= ... >= w_k >= 0: the updates between
checkpoints, scaled by a decayed learning rate.
"""

import math


def wsm(base, models, *, decay="1-sqrt"):
    k = len(models) - 1
    merged = models[0].double()
    for i in range(1, k + 1):
        x = i / (k + 1)
        w = {"linear": 1 - x, "cosine": math.cos(math.pi * x / 2) ** 2, "1-sqrt": 1 - x**0.5}[decay]
        merged = merged + w * (models[i].double() - models[i - 1].double())
    return merged
