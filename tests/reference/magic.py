"""Li et al. 2025, "MAGIC", weight space calibration: d is scaled onto the ellipsoid with the task vectors as semi-axes.

Row by row: (x . a_k / |a_k|^2)^2 summed over k, plus what is outside of their span over the squared mean length, is 1
on the surface; the scaled row is where the ray along d meets it.
"""

import torch


def surface(row, axes):
    """The value of the surface's equation at a row; 1 on the surface."""
    axes = [axis for axis in axes if axis.norm() > 0]
    coordinates = [torch.dot(row, axis) / torch.dot(axis, axis) for axis in axes]
    outside = row - sum(c * axis for c, axis in zip(coordinates, axes, strict=True))
    return sum(c**2 for c in coordinates), outside.norm()


def magic(base, models, *, weight=1.0, **other):
    weight = weight if isinstance(weight, list) else [weight] * len(models)
    base = base.double()
    tasks = [model.double() - base for model in models]
    merged = sum(w * task for w, task in zip(weight, tasks, strict=True))
    result = base.clone()
    for m, row in enumerate(merged):
        if not row.any():
            continue
        axes = [task[m] for task in tasks]
        inside, outside = surface(row, axes)
        mean = sum(axis.norm() for axis in axes) / len(axes)
        result[m] += other.get("lambda", 1.0) * row / (inside + (outside / mean) ** 2) ** 0.5
    return result
