"""What the methods should give, in float64, kept on disk: decompositions of large matrices take their time."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from tests.reference.iso_c import iso_c
from tests.reference.iso_cts import iso_cts
from tests.reference.svc import svc
from tests.reference.tsv_m import tsv_m


def reference(method: str, vectors: Sequence[Tensor], key: str, folder: Path, *, steps: int) -> Tensor:
    """Return a merged task vector, float64.

    Args:
        method: Name of the method.
        vectors: Task vectors.
        key: Tells apart what is kept: shape, number of models, seed.
        folder: Where it is kept.
        steps: Of Adam, for WUDI.
    """
    file = folder / f"{method}-{key}{f'-{steps}' if method == 'wudi' else ''}.pt"
    if not file.exists():
        found = adam(vectors, steps) if method == "wudi" else _literal(method)(torch.zeros_like(vectors[0]), vectors)
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(found, file)
    loaded: Tensor = torch.load(file)
    return loaded


def _literal(method: str) -> Callable[..., Tensor]:
    found: Callable[..., Tensor] = {"iso_c": iso_c, "iso_cts": iso_cts, "tsv_m": tsv_m, "svc": svc}[method]
    return found


def adam(vectors: Sequence[Tensor], steps: int, learning_rate: float = 1e-5) -> Tensor:
    """Take Adam's steps from the sum of the task vectors down sum_i |(M - delta_i) delta_i^T|^2 / |delta_i|^2."""
    wide = [vector.double() for vector in vectors]
    merged = torch.stack(wide).sum(0)
    n = merged.shape[1]
    curvature, pull = merged.new_zeros(n, n), torch.zeros_like(merged)
    for vector in wide:
        products = vector.T @ vector / vector.square().sum()
        curvature += products
        pull += vector @ products
    mean, square = torch.zeros_like(merged), torch.zeros_like(merged)
    for step in range(1, steps + 1):
        slope = 2 * (merged @ curvature - pull)
        mean = 0.9 * mean + 0.1 * slope
        square = 0.999 * square + 0.001 * slope.square()
        merged = merged - learning_rate * (mean / (1 - 0.9**step)) / ((square / (1 - 0.999**step)).sqrt() + 1e-8)
    return merged
