"""Tang et al. 2025, "Merging Models on the Fly Without Retraining", algorithm 1, on the matrices of a model.

Step by step, with the scale after every model, as the authors do it.
"""

import torch

from tests.reference.decompositions import vectors


def project(previous, delta, alpha):
    u, s, vh = torch.linalg.svd(previous, full_matrices=False)
    if s[0] == 0:
        return delta
    known = s > 1e-5 * s[0]
    u, s, vh = u[:, known], s[known], vh[known]
    share = s.cumsum(0) / s.sum()
    a = next((i for i in range(len(s)) if share[i] > alpha), len(s)) if alpha < 1 else len(s)
    inner = u.T @ delta @ vh.T
    keep = inner.clone()
    keep.fill_diagonal_(0)
    keep[:a, :a] = 0
    # what lies outside of the span of both bases is not touched
    outside = delta - u @ inner @ vh
    return outside + u @ keep @ vh


def opcm(matrices, *, alpha=0.5):
    """Merge the matrices of a model, given as pairs of a base and models; also return the last scale."""
    bases = [base.double() for base, _ in matrices]
    deltas = [vectors(base, models) for base, models in matrices]

    def norm(tensors):
        return sum(float(t.square().sum()) for t in tensors) ** 0.5

    merged = [own[0] for own in deltas]
    norms, scale = [norm(merged)], 1.0
    for k in range(1, len(deltas[0])):
        norms.append(norm([own[k] for own in deltas]))
        mean = sum(norms) / len(norms)
        total = [scale * m + project(m, own[k], alpha) for m, own in zip(merged, deltas, strict=True)]
        scale = norm(total) / mean
        merged = [t / scale for t in total]
    return [base + m for base, m in zip(bases, merged, strict=True)], scale
