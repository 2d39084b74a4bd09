"""Zhao et al. 2025, "Merging LoRAs like playing LEGO": ranks as units, k-means, means of the mean norm."""

import torch


def units(a, b, scale):
    """[a_j, b_j] of every rank, balanced, with the largest entry of a positive."""
    rows = []
    for x, y in zip(a.double(), b.double().T * scale, strict=True):
        length = (x.norm() * y.norm()) ** 0.5
        x, y = x / x.norm() * length, y / y.norm() * length
        sign = 1.0 if x[x.abs().argmax()] >= 0 else -1.0
        rows.append(torch.cat([x, y]) * sign)
    return rows


def assembled(rows, labels, inputs, ranks):
    """The product of one rank per cluster, given which unit is in which cluster."""
    total = 0.0
    groups = sorted(set(labels))
    for group in groups:
        members = [row for row, label in zip(rows, labels, strict=True) if label == group]
        mean = sum(members) / len(members)
        mean = mean / mean.norm() * (sum(member.norm() for member in members) / len(members))
        total = total + torch.outer(mean[inputs:], mean[:inputs])
    return total * (sum(ranks) / len(ranks) / len(groups)) ** 0.5
