"""OptMerge: WUDI on task vectors truncated to low rank, which removes noise."""

from typing import Literal

import torch
from torch import Tensor

from ..method import Count, Embeddings, NonNegative, Others, Positive, Scale, default, merge_method
from ..ops.linalg.interference import Interference, Solver, Start, inverse_squares, starting_point
from ..ops.linalg.rounding import deltas_above_rounding
from ..ops.linalg.spectral import svd


@merge_method(
    family="spectral",
    cite="wei2026optmerge",
    scope="matrix",
    version=3,
    breaks={"identical": "the filter stops on the way from the sum of the models' task vectors"},
)
def optmerge(
    base: Tensor,
    models: list[Tensor],
    rounding: Tensor,
    *,
    lambda_: Scale = default(1.0),
    target: Literal["centred", "plain"] = "centred",
    solver: Solver = "filter",
    time: NonNegative = default(300.0),
    steps: Count = 300,
    learning_rate: Positive = default(1e-5),
    start: Start = "sum",
    others: Others = "base",
    embeddings: Embeddings = "others",
) -> Tensor:
    """Move the sum of the task vectors towards the least interference of their leading parts.

        [X]_k  = X with its k = floor(min(rows, columns) / T) largest singular values alone (but at least one)
        L(M)   = sum_i |(M - target_i) [delta_i]_k^T|^2 / |delta_i|^2,    delta_i = model_i - base
        target_i = mean + [delta_i - mean]_k,    mean = (1/T) sum_i delta_i          (or [delta_i]_k when plain)
        M      = M_0 + (M_min - M_0) V diag(1 - exp(-c * time)) V^T,    M_0 = sum_i delta_i
        merged = base + lambda * M

    V and c are eigenvectors and eigenvalues of C = sum_i [delta_i]_k^T [delta_i]_k / |delta_i|^2.

    Use when:
        Merging language or multimodal models that were trained for different tasks from one base.

    Args:
        lambda_: Factor of the merged task vector. The authors' scripts have 0.1 for a sum as start, 1 for a mean.
        target: Target that M should approximate: centred for full fine-tunes, plain for merged LoRA adapters.
        solver: How M is computed: by the filter above; as the minimum of L itself (nearest to M_0); or by Adam.
        time: How far the filter goes: 0 stays at M_0. For `solver: filter`. The authors' descent for adapters (from
            the mean, 300 steps of 1e-4 with momentum 0.9) goes as far as time 0.58.
        steps: Steps of Adam. For `solver: adam`.
        learning_rate: Learning rate of Adam. For `solver: adam`.
        start: M_0: the sum of the task vectors, their mean (for adapters), or zero.

    Differs from the paper:
        Directions of a task vector that contain only rounding errors of the stored weights are left out.
        The authors take 300 steps of Adam for fine-tunes of all parameters; `solver: adam` repeats them. The filter
        does the same without a step size.
        A model equal to the base is left out instead of giving NaN.
    """
    vectors = deltas_above_rounding(base, models, rounding)
    k = max(min(base.shape) // len(models), 1)
    mean = sum(vectors[1:], vectors[0]) / len(vectors) if target == "centred" else torch.zeros_like(base)
    targets, sources = [], []
    for vector in vectors:
        _, values, right = own = svd(vector, k)
        # C needs only source^T source, from which the left vectors cancel
        sources.append((right * values.to(right.dtype)).T)
        left, values, right = svd(vector - mean, k) if target == "centred" else own
        targets.append(mean + (left * values.to(left.dtype)) @ right.T)
    interference = Interference(targets, sources, inverse_squares(vectors), starting_point(vectors, start))
    merged = interference.solved(solver, time, steps, learning_rate)
    return base + lambda_ * merged.to(base.dtype)
