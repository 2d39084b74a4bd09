"""NearSwap as documented by mergekit: interpolate by t over the distance, at most all the way."""

import torch


def nearswap(base, models, t):
    a, b = base.double(), models[0].double()
    share = (t / (b - a).abs()).nan_to_num(0.0, posinf=1.0).clamp(0, 1)
    return (1 - share) * a + share * b if t else a + torch.zeros_like(a)
