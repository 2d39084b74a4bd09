"""Huang et al. 2024, "EMR-Merging: Tuning-Free High-Performance Model Merging", algorithm 1, the unified task vector.

gamma_uni = sgn(sum_t tau_t); epsilon_uni = the largest |tau_t| among those of that sign; tau_uni = gamma_uni * epsilon_uni.
An exact 0 counts as minus, as in the authors' code.
"""

import torch


def emr(base, models):
    base = base.double()
    deltas = [model.double() - base for model in models]
    flag = (sum(deltas) > 0) * 2.0 - 1.0
    largest = torch.zeros_like(base)
    for delta in deltas:
        largest = torch.maximum(largest, (delta * ((delta * flag) > 0)).abs())
    return base + flag.double() * largest
