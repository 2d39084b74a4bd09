"""FeatCal: fit what a merge computes to what the models compute, block by block."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from ..method import (
    Embeddings,
    Fraction,
    FromData,
    NonNegative,
    Others,
    PerModel,
    Positive,
    Scale,
    default,
    merge_method,
)
from ..ops import deltas, solve_right
from ..ops.linalg.interference import Interference, exponential, inverse_squares, starting_point

# how far the filter of WUDI goes: its default
_WUDI_TIME = 300.0


@merge_method(
    family="data",
    cite="gu2026featcal",
    scope="matrix",
    statistics={
        "gram": FromData("gram", inputs="merged"),
        "cross_gram": FromData("cross_gram", inputs="merged"),
    },
    breaks={"identical": "the anchor lies beyond the merge"},
)
def featcal(
    base: Tensor,
    models: list[Tensor],
    gram: Sequence[Tensor] | None,
    cross_gram: Sequence[Tensor] | None,
    *,
    weight: PerModel[NonNegative] = default(1.0),
    lambda_: Scale = default(1.0),
    rho: Scale = default(2.2),
    alpha: Fraction = default(0.25),
    ridge: Positive = default(0.05),
    start: Literal["average", "wudi"] = "average",
    others: Others = "average",
    embeddings: Embeddings = "others",
) -> Tensor:
    """Correct every matrix of a first merge so that the merged model computes what the models do on their data.

        M      = base + lambda sum_i weight_i delta_i / sum_i weight_i,    delta_i = model_i - base     (start: average)
        M      = base + lambda WUDI(delta_1, delta_2, ...)                                               (start: wudi)
        A      = base + rho (M - base)                                                 (M itself with start: wudi)
        C_i    = mean of x x^T,  K_i = mean of (alpha y + (1 - alpha) x) x^T    over the tokens of model i
        s_i    = weight_i / |C_i|
        merged = (sum_i s_i model_i K_i + ridge A) (sum_i s_i C_i + ridge)^-1

    x is what a matrix receives in M's block, when this block itself receives what the corrected blocks before it make of
    the tokens of model i; y is what it receives in model i itself. So the corrections of a block also mend what those
    before it left.

    Use when:
        You have a few hundred tokens or more of each expert's field while merging. `start: wudi` kept more than starting
        from the average, for full fine-tunes and for adapters (docs/quality.md). RegMean++ needs no start and has less to
        tune.

    Args:
        weight: Share of a model in the average, and how much its inputs count.
        lambda_: Factor of the first merge.
        rho: How far the anchor lies on the way from the base to the average: with 1 the average itself is the anchor. For
            `start: average`.
        alpha: How far the inputs to fit go from those in the merged model towards those in the models.
        ridge: Pulls towards the anchor. The sum of matrices beside it has a norm of at most the sum of the weights.
        start: The first merge: the weighted average, or that of `wudi` with its defaults, of the models whose weight is not 0.

    Differs from the paper:
        The paper also fits biases, and the weights and biases of norms, each after the matrix before it; here they are
        averaged, as `others` says. It starts from any merge (task arithmetic in its experiments, with the default of rho);
        here from the average or from WUDI, times lambda. WUDI, and an anchor that is not beyond the first merge, are our
        choice. Its second ridge of 1e-8 towards zero is left out.
        It weighs tokens of images unequally, which has no counterpart for text: every token that counts weighs the same.
        Experts of a mixture are averaged: the merged model and a model may choose different experts for a token.
    """
    vectors = [delta.double() for delta in deltas(base, models)]
    first = lambda_ * (_average(vectors, weight) if start == "average" else _wudi(vectors, weight))
    if gram is None or cross_gram is None:
        return base + first.to(base.dtype)
    anchor = rho * first if start == "average" else first
    pull = torch.zeros_like(first)
    total = first.new_zeros(first.shape[1], first.shape[1])
    for w, vector, own, cross in zip(weight.double(), vectors, gram, cross_gram, strict=True):
        inputs = own.double()
        norm = inputs.norm()
        scale = torch.where(norm > 0, w / norm, 0.0)
        towards = alpha * (cross.double() - inputs).T
        pull += scale * ((base.double() + vector) @ towards + (vector - anchor) @ inputs)
        total += scale * inputs
    mean = total.diagonal().mean()
    if not mean > 0:
        return base + first.to(base.dtype)
    return base + (anchor + solve_right(pull, total, ridge / mean)).to(base.dtype)


def _average(vectors: Sequence[Tensor], weight: Tensor) -> Tensor:
    shares = weight.double() / weight.double().sum().clamp(min=1e-30)
    return sum((s * v for s, v in zip(shares, vectors, strict=True)), torch.zeros_like(vectors[0]))


def _wudi(vectors: Sequence[Tensor], weight: Tensor) -> Tensor:
    """Return what `wudi` adds to the base at its defaults."""
    kept = [vector for vector, w in zip(vectors, weight, strict=True) if w > 0]
    if not kept:
        return torch.zeros_like(vectors[0])
    interference = Interference(kept, kept, inverse_squares(kept), starting_point(kept, "sum"))
    return interference.filtered(lambda values: exponential(values, torch.tensor(_WUDI_TIME, dtype=values.dtype)))
