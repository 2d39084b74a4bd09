"""RegMean: the matrix that maps each model's inputs to what that model makes of them."""

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from ..method import Embeddings, Fraction, FromData, NonNegative, Others, PerModel, Positive, default, merge_method
from ..ops import deltas, fit_outputs


@merge_method(
    family="data",
    cite="jin2023regmean",
    scope="matrix",
    statistics={"gram": FromData("gram")},
    version=2,
)
def regmean(
    base: Tensor,
    models: list[Tensor],
    gram: Sequence[Tensor] | None,
    *,
    weight: PerModel[NonNegative] = default(1.0),
    alpha: Fraction = default(0.5),
    ridge: Positive = default(1e-4),
    limit: Positive = default(2.0),
    reference: Literal["average", "base"] = "average",
    others: Others = "average",
    embeddings: Embeddings = "others",
) -> Tensor:
    """Fit every matrix by least squares to the outputs of all models, each on inputs of its own text.

        G_i    = alpha gram_i + (1 - alpha) diag(gram_i),    gram_i = mean of x x^T over the tokens of model i
        R      = base + sum_i weight_i delta_i / sum_i weight_i,    delta_i = model_i - base
        merged = R + (sum_i weight_i (model_i - R) G_i) (sum_i weight_i G_i + e I)^-1

    This minimises sum_i weight_i |(merged - model_i) x_i|^2 over the inputs x_i of the models, which are known by their
    Gram matrices alone. In directions that no input takes, R stays.

    Use when:
        You have a few thousand tokens of each expert's field, or their statistics, which can be shared instead of the
        texts: `merganser calibrate EXPERT --data FILE --out FOLDER`.

    Args:
        weight: How much a model's inputs count.
        alpha: Factor of the off-diagonal entries of every Gram matrix. With 0 each column is averaged on its own; with 1
            the fit is exact, and follows the few texts that were seen most closely.
        ridge: What is added to the diagonal of the sum, over the mean of that diagonal: pulls towards R. It is raised where
            the sum is not positive definite.
        limit: Largest length of merged - base, over the largest length of a delta_i. Where it would be longer, the ridge is
            raised tenfold until it is not: a few tokens with huge inputs (the first of a text, in many models) otherwise
            move a matrix many times as far as any model was trained.
        reference: R: the weighted average of the models as above, or the base.

    Differs from the paper:
        The paper solves for the matrix itself; the step from R is the same matrix where the sum can be inverted, is less
        sensitive to rounding, and leaves R where there is no input instead of going to zero. The limit is ours.
        Every Gram matrix is a mean over tokens, so that a model counts the same however many tokens it was measured on;
        padding is not among them.
        A model whose matrix received no token (an expert of a mixture that was never chosen) does not count in it; where
        none received any, R remains. Matrices without statistics (embeddings, the head) are averaged.
        Routers of mixtures are matrices like others: the merged one is fitted to what each model's gives on its own inputs.
        LOT merging (Sun et al., arXiv 2505.23859) is `alpha: 1` with `reference: base`, but for three things: it inverts
        the sum by a pseudoinverse where there is a small ridge here; it adds up the inputs of all tokens (give every
        model's number of tokens as its weight); and it averages the weights of norms by the energy of their inputs,
        while norms are averaged like other tensors here.
    """
    vectors = deltas(base, models)
    return base + fit_outputs(vectors, gram, weight, alpha, ridge, limit, start=reference).to(base.dtype)
