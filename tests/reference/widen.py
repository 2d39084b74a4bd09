"""Yu et al. 2024, "Extend Model Merging from Fine-Tuned to Pre-Trained Large Language Models via Weight Disentanglement".

Section 3: m = column norms, D = W / m; Delta m = |m_n - m_0|, Delta D = 1 - cos(D_n, D_0); ranks over columns divided by
their number; S = softmax over models, 1 where above the model's average; W_M = W_0 + sum_n (S_m + S_D) / 2 * delta_n.
"""

import torch


def importance(values, ratio, score):
    """Values: one row per model."""
    found = torch.softmax(values, dim=0)
    for n in range(len(values)):
        for j in range(values.shape[1]):
            if values[n, j] > values[n].mean() * ratio:
                found[n, j] = score
    return found


def ranks(values):
    found = torch.zeros_like(values)
    for n, row in enumerate(values):
        order = sorted(range(len(row)), key=lambda j: float(row[j]))
        for place, j in enumerate(order):
            found[n, j] = place / len(row)
    return found


def turned(w, w0):
    if not w.any() and not w0.any():
        return 0.0
    if not w.any() or not w0.any():
        return 1.0
    return float(1 - torch.dot(w / w.norm(), w0 / w0.norm()))


def total(weights, deltas, normalize):
    if normalize:
        summed = weights.sum(dim=0)
        weights = weights / torch.where(summed > 0, summed, 1.0)
    return (weights * deltas).sum(dim=0)


def matrix(base, models, ratio, score, normalize):
    magnitude = torch.tensor(
        [[float(abs(w[:, j].norm() - base[:, j].norm())) for j in range(base.shape[1])] for w in models]
    ).double()
    direction = torch.tensor([[turned(w[:, j], base[:, j]) for j in range(base.shape[1])] for w in models]).double()
    weights = sum(importance(ranks(part), ratio, score) for part in (magnitude, direction)) / 2
    deltas = torch.stack([w - base for w in models])
    return base + total(weights.unsqueeze(1), deltas, normalize)


def vector(base, models, ratio, score, normalize):
    deltas = torch.stack([(w - base).flatten() for w in models])
    weights = importance(deltas.abs(), ratio, score)
    return base + total(weights, deltas, normalize).view(base.shape)


def widen(base, models, *, ratio=1.0, score=1.0, normalize=False, tokens="embedding"):
    base, models = base.double(), [model.double() for model in models]
    if base.dim() < 2:
        return vector(base, models, ratio, score, normalize)
    flat = matrix(base.flatten(1), [model.flatten(1) for model in models], ratio, score, normalize)
    return flat.view(base.shape)
