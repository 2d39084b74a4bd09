"""CAT Merging: remove from every task vector the output directions that disturb the other tasks."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from ..method import Count, Embeddings, FromData, NonNegative, Others, Scale, default, merge_method
from ..ops import deltas

_ROUNDING = 1e-6
"""Share of the largest eigenvalue, or of a norm, up to which a number is rounding of float32 statistics."""


def conflict_bases(
    vectors: list[Tensor], gram: Sequence[Tensor], trade_off: float, rank: int, order: str
) -> list[Tensor]:
    """Return for every task the directions in which the others disturb it, shape [m, at most `rank`], orthonormal columns.

    Args:
        vectors: Task vectors, shape [m, n] each, float64.
        gram: Gram matrix of each model's inputs, shape [n, n].
        trade_off: Factor of what the others lose themselves.
        rank: Largest number of directions.
        order: Whether those of the largest or of the smallest eigenvalues are taken.
    """
    disturbed, own = [], []
    for i, inputs in enumerate(gram):
        wide = inputs.double()
        on_inputs = [vector @ wide @ vector.T for vector in vectors]
        own.append(on_inputs.pop(i))
        disturbed.append(sum(on_inputs, torch.zeros_like(own[i])))
    removed = []
    for i, conflict in enumerate(disturbed):
        lost = sum((one for j, one in enumerate(own) if j != i), torch.zeros_like(conflict))
        conflict = conflict - trade_off * lost
        values, directions = torch.linalg.eigh((conflict + conflict.T) / 2)
        positive = int((values > _ROUNDING * values.abs().max()).sum())
        if order == "largest":
            directions = directions.flip(1)[:, : min(rank, positive)]
        else:
            directions = directions[:, : rank if positive else 0]
        removed.append(directions)
    return removed


def without(vector: Tensor, directions: Tensor, rescale: bool) -> Tensor:
    """Return a task vector without its part in some output directions, scaled to its norm before if so wanted.

    Args:
        vector: Shape [m, n].
        directions: Shape [m, r], orthonormal columns.
        rescale: Whether to keep the norm; not where all of it is removed.
    """
    rest = vector - directions @ (directions.T @ vector)
    if not rescale:
        return rest
    before, after = vector.norm(), rest.norm()
    return rest * torch.where(after > _ROUNDING * before, before / after, 0.0)


@merge_method(
    family="data",
    cite="sun2025cat",
    scope="matrix",
    statistics={"gram": FromData("gram")},
    breaks={
        "identical": "what equal models have in common is a conflict, too",
        "order": "the directions of several tasks are removed one after the other, and are not orthogonal",
    },
)
def cat(
    base: Tensor,
    models: list[Tensor],
    gram: Sequence[Tensor] | None,
    *,
    lambda_: Scale = default(1.0),
    trade_off: NonNegative = default(1.0),
    rank: Count = 8,
    order: Literal["largest", "smallest"] = "largest",
    rescale: bool = True,
    others: Others = "sum",
    embeddings: Embeddings = "others",
) -> Tensor:
    """Add the task vectors, each without the output directions in which it disturbs another task most.

        C_i    = sum_{j != i} delta_j (gram_i - trade_off gram_j) delta_j^T,    delta_i = model_i - base
        B_i    = eigenvectors of the `rank` largest eigenvalues of C_i, as far as these are positive
        for each j, for each i != j:    delta_j <- (1 - B_i B_i^T) delta_j, scaled to its norm before
        merged = base + lambda sum_j delta_j

    gram_i is the mean of x x^T over the tokens of model i: B_i are the outputs in which the task vectors of the others
    act strongly on inputs of task i, and weakly on those of their own.

    Use when:
        You have statistics of each expert's field, and the sum of the task vectors works better than their average.
        RegMean uses the same statistics and has nothing to tune but alpha. Where the sum is far too long, as of several
        adapters, removing a few directions does not help: lower `lambda` first, to 0.3 or 0.5.

    Args:
        lambda_: Factor of the sum.
        trade_off: How much directions are kept in which the others act on their own inputs. With 0 only the disturbance
            counts.
        rank: Largest number of directions that are removed for each other task.
        order: Whether they are those of the largest eigenvalues, as the paper says, or of the smallest (see below).
        rescale: Scale a task vector back to its previous norm, each time directions are removed.

    Differs from the paper:
        The paper takes the eigenvectors of the largest eigenvalues. A port to language models, which says that it
        follows the authors' code, takes the first columns of an eigendecomposition in ascending order: those of the
        smallest. `order: smallest` repeats this, where any eigenvalue is positive. Rescaling is from that port, too. Another
        port takes 3 directions of the largest, and does not rescale.
        The defaults of trade_off, rank and lambda are ours.
        Inputs are those of the models themselves, on text of their fields; the port measures them in the base plus
        lambda task vectors. Grams are means over tokens, so that a model counts the same however many it was measured on.
        The paper masks entries of the weights of norms and of biases by rules of their own; here `others` applies.
        A matrix without statistics is the base and lambda times the sum of its task vectors.
    """
    vectors = [delta.double() for delta in deltas(base, models)]
    if gram is not None:
        bases = conflict_bases(vectors, gram, float(trade_off), rank, order)
        for j in range(len(vectors)):
            for i, directions in enumerate(bases):
                if i != j:
                    vectors[j] = without(vectors[j], directions, rescale)
    total = sum(vectors[1:], vectors[0])
    return base + (lambda_ * total).to(base.dtype)
