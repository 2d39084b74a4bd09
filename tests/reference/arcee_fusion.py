"""Arcee Fusion as documented by mergekit: importance by KL divergence of rows, cut at median + 1.5 times the IQR."""

import math

import torch


def arcee_fusion(base, models):
    a, b = base.double(), models[0].double()
    rows = a.shape[0] if a.dim() > 1 else 1
    p = torch.softmax(b.reshape(rows, -1), 1) + 1e-8
    q = torch.softmax(a.reshape(rows, -1), 1) + 1e-8
    divergence = (p * torch.log(p / q)).sum(1, keepdim=True)
    importance = (b - a).abs().reshape(rows, -1) * divergence
    ordered = importance.reshape(-1).sort().values
    low, median, high = (float(ordered[math.floor(share * (len(ordered) - 1))]) for share in (0.25, 0.5, 0.75))
    # an entry that equals the threshold in exact arithmetic may miss it by rounding; weights of 16 bits often do
    keep = (importance >= (median + 1.5 * (high - low)) * (1 - 1e-12)).reshape(a.shape)
    return torch.where(keep, b, a)
