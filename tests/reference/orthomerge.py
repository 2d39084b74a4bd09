"""Yang et al. 2026, "Orthogonal Model Merging", for models that were not trained by orthogonal fine-tuning, as the
authors' code computes it with task arithmetic of the residuals.

Directions of the inputs that the decomposition leaves free are completed by the orthogonal matrix nearest to the
identity.
"""

import torch

from tests.reference.decompositions import vectors


def procrustes(w0, w):
    m = w0.T @ w
    u, s, vh = torch.linalg.svd(m)
    rank = int((s > max(m.shape) * 2.0**-52 * s[:1]).sum())
    turn = u[:, :rank] @ vh[:rank]
    if rank < len(s):
        a, b = u[:, rank:], vh[rank:].T
        p, _, qh = torch.linalg.svd(a.T @ b)
        turn = turn + a @ p @ qh @ b.T
    return turn


def orthomerge(base, models, *, residual=0.2):
    w0 = base.double()
    eye = torch.eye(base.shape[1], dtype=torch.float64)
    skews, experts = [], [w0 + delta for delta in vectors(base, models)]
    for w in experts:
        turn = procrustes(w0, w)
        skew = torch.linalg.solve(turn + eye, turn - eye)
        skews.append((skew - skew.T) / 2)
    total = sum(skews)
    mean = sum(skew.norm() for skew in skews) / len(skews)
    common = mean * total / total.norm() if total.norm() > 1e-8 else torch.zeros_like(total)
    merged = w0 @ torch.linalg.inv(eye - common) @ (eye + common)
    for w, skew in zip(experts, skews, strict=True):
        merged = merged + residual * (w - w0 @ torch.linalg.inv(eye - skew) @ (eye + skew))
    return merged
