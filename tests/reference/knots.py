"""Stoica et al. 2025, "Model merging with SVD to tie the Knots", section 4: align by a joint SVD, merge, map back."""

import torch

from tests.reference.decompositions import vectors
from tests.reference.draws import draws
from tests.reference.ties import elect_and_merge


def keep_largest(z, density):
    if density == 0 or z.numel() == 0:
        return torch.zeros_like(z)
    k = max(int(density * z.numel()), 1)
    return torch.where(z.abs() >= z.abs().flatten().sort(descending=True).values[k - 1], z, 0.0)


def knots(
    base,
    models,
    *,
    weight=1.0,
    rule="ties",
    density=1.0,
    drop=0.0,
    normalize=True,
    basis="output",
    epsilon=1e-5,
    seed=0,
    tensor="tensor",
    **other,
):
    n = len(models)
    weight, density, drop = (v if isinstance(v, list) else [v] * n for v in (weight, density, drop))
    deltas = vectors(base, models)
    if basis == "input":
        deltas = [delta.T for delta in deltas]
    u, s, vh = torch.linalg.svd(torch.cat(deltas, dim=1), full_matrices=False)
    kept = (s > epsilon) & (s > 2.0**-22 * s[:1])
    u, joint = u[:, kept], torch.diag(s[kept]) @ vh[kept]
    coordinates = list(joint.split(deltas[0].shape[1], dim=1))
    for i, p in enumerate(drop):
        if p > 0:
            kept = torch.from_numpy(draws(seed, tensor, i, coordinates[i].numel()) < 1 - p).view(coordinates[i].shape)
            coordinates[i] = coordinates[i] * kept / max(1 - p, 1e-300)
    if rule == "ties":
        trimmed = [keep_largest(z, d) for z, d in zip(coordinates, density, strict=True)]
        merged = elect_and_merge(trimmed, weight, normalize)
    else:
        merged = sum(w * z for w, z in zip(weight, coordinates, strict=True)) / (sum(weight) if rule == "mean" else 1)
    merged = u @ merged
    return base.double() + other.get("lambda", 1.0) * (merged.T if basis == "input" else merged)
