"""KnOTS: merge the coordinates of the task vectors, element by element, in a common basis."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from ..method import Embeddings, Fraction, NonNegative, Others, PerModel, Scale, Weight, default, merge_method
from ..ops import Random, check_total, disjoint_mean, weighted_sum
from ..ops.linalg.rounding import deltas_above_rounding
from ..ops.linalg.spectral import left_basis

Rule = Literal["ties", "mean", "sum"]


def dropped(values: Tensor, kept: Tensor, drop: Tensor) -> Tensor:
    """Set entries that are not kept to 0 and divide the others by the probability to be kept."""
    # where the probability is 0, the quotient is discarded: `kept` is False there
    return torch.where(kept, values / (1 - drop), 0.0)


def largest(values: Tensor, density: Tensor) -> Tensor:
    """Keep the entries that are as large as the k-th largest, k = floor(density * size), at least 1 unless it is 0."""
    if density == 0 or not values.numel():
        return torch.zeros_like(values)
    if density == 1:
        return values
    magnitude = values.abs()
    k = max(int(values.numel() * float(density)), 1)
    cut = magnitude.reshape(-1).kthvalue(values.numel() - k + 1).values
    return torch.where(magnitude >= cut, values, 0.0)


def merge_coordinates(
    coordinates: list[Tensor], rule: Rule, weight: Tensor, density: Tensor, *, normalize: bool
) -> Tensor:
    """Merge tensors of one shape by a rule for single elements.

    Args:
        coordinates: The tensors.
        rule: The rule.
        weight: One entry per tensor, shape [T].
        density: Share that "ties" keeps, shape [T].
        normalize: In "ties", divide by the sum of the weights that agree.
    """
    if rule == "ties":
        trimmed = [largest(values, density[i]) for i, values in enumerate(coordinates)]
        return disjoint_mean(trimmed, weight, coordinates[0].dtype, normalize=normalize)
    return weighted_sum(coordinates, weight / weight.sum() if rule == "mean" else weight)


def check_weights(parameters: Mapping[str, Any]) -> str | None:
    """Return what is wrong if the mean divides by the sum of the weights, and they add up to 0; else None."""
    return check_total({"weight": parameters["weight"]}) if parameters["rule"] == "mean" else None


def votes(rule: Rule) -> bool:
    """Return whether the rule trims and elects signs."""
    return rule == "ties"


@merge_method(
    family="spectral",
    cite="stoica2025knots",
    scope="matrix",
    version=3,
    when={"density": votes, "normalize": votes},
    validate=check_weights,
)
def knots(
    base: Tensor,
    models: list[Tensor],
    rng: Random,
    rounding: Tensor,
    *,
    weight: PerModel[Weight] = default(1.0),
    lambda_: Scale = default(1.0),
    rule: Rule = "ties",
    density: PerModel[Fraction] = default(1.0),
    drop: PerModel[Fraction] = default(0.0),
    normalize: bool = True,
    basis: Literal["output", "input"] = "output",
    epsilon: NonNegative = default(1e-5),
    others: Others = "average",
    embeddings: Embeddings = "others",
) -> Tensor:
    """Express the task vectors in one orthonormal basis of all of them, and merge their coordinates there.

        [delta_1 ... delta_T] = U diag(s) [V_1^T ... V_T^T],   delta_i = model_i - base
        Z_i    = diag(s) V_i^T where s > epsilon
        merged = base + lambda * U rule(Z_1, ..., Z_T)

    The rules: `ties` keeps the largest entries of every Z_i, elects a sign per element and averages those that agree;
    `mean` and `sum` are linear, and without a drop give the same as without the basis. Before any of them entries may
    be dropped at random and the others rescaled, as DARE does.

    Use when:
        LoRA fine-tunes are merged: their task vectors hardly share directions, and elementwise rules work better in a
        common basis.

    Args:
        weight: Factor of each task vector's coordinates.
        lambda_: Factor of the merged task vector; the authors take 0.3 to 0.7.
        rule: How the coordinates are merged.
        density: Share of each model's coordinates that `ties` keeps, the largest; the authors take 1 or 0.2.
        drop: Probability of each model's coordinates to be dropped; the authors take 0.1 to 0.2 for vision models and
            0.8 for Llama.
        normalize: In `ties`, divide by the sum of the weights that agree (a mean), instead of adding.
        basis: Whether the basis is one of outputs (task vectors side by side), or of inputs (one above the other).
        epsilon: Directions whose singular value is at most this are left out.

    Differs from the paper:
        Directions of a task vector that contain only rounding errors of the stored weights are left out.
        The paper ranks the coordinates of all layers together for the trim; here every matrix is trimmed by itself.
        The authors' code multiplies every model by the first one's weight; here each has its own, also in the vote.
        Its mean divides by the number of models whose coordinate is not 0; `mean` is the mean of all here.
        Entries whose magnitude equals the cut are all kept, and at least one is unless the density is 0.
        An exact tie of the vote elects plus; the authors' code takes the majority sign of the whole model.
        Tensors that are not matrices are averaged; the authors leave them as they are.
    """
    known = deltas_above_rounding(base, models, rounding)
    vectors = [vector if basis == "output" else vector.T for vector in known]
    left = left_basis(vectors, float(epsilon))
    coordinates = []
    for i in range(len(models)):
        values = left.T @ vectors.pop(0)
        if drop[i] > 0:
            values = dropped(values, rng.keep(i, values.shape, 1 - drop[i]), drop[i])
        coordinates.append(values)
    merged = left @ merge_coordinates(coordinates, rule, weight, density, normalize=normalize)
    return base + (merged if basis == "output" else merged.T) * lambda_
