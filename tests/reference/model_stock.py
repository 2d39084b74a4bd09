"""Jang et al. 2024, "Model Stock": t = N cos / (1 + (N - 1) cos); t average + (1 - t) base, per layer or filter."""

import torch


def model_stock(base, models, filter_wise=False, clamp=False, norm_floor=0.0):
    origin = base.double()
    rows = origin.shape[0] if filter_wise and origin.dim() > 1 else 1
    deltas = [(model.double() - origin).reshape(rows, -1) for model in models]
    n = len(deltas)
    merged = origin.clone().reshape(rows, -1)
    for row in range(rows):
        cosines = []
        for i in range(n):
            for j in range(i):
                scale = max(float(deltas[i][row].norm() * deltas[j][row].norm()), norm_floor)
                cosines.append(float(deltas[i][row] @ deltas[j][row]) / scale if scale else 0.0)
        cosine = sum(cosines) / len(cosines)
        below = 1 + (n - 1) * cosine
        t = n * cosine / below if abs(below) >= 1e-6 else 0.0
        if clamp:
            t = min(1.0, max(0.0, t))
        average = torch.stack([model.double().reshape(rows, -1)[row] for model in models]).mean(0)
        merged[row] = t * average + (1 - t) * merged[row]
    return merged.reshape(origin.shape)
