"""RegMean++: RegMean with the inputs that the merged blocks before a block compute."""

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from ..method import Embeddings, Fraction, FromData, NonNegative, Others, PerModel, Positive, default, merge_method
from ..ops import deltas, fit_outputs


@merge_method(
    family="data",
    cite="nguyen2025regmean",
    scope="matrix",
    statistics={"gram": FromData("gram", inputs="prefix")},
)
def regmean_plus(
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
    """Fit every matrix by least squares to the outputs of all models, on inputs that come from the merged blocks before.

        G_i    = alpha gram_i + (1 - alpha) diag(gram_i),    gram_i = mean of x x^T over the tokens of model i
        R      = base + sum_i weight_i delta_i / sum_i weight_i,    delta_i = model_i - base
        merged = R + (sum_i weight_i (model_i - R) G_i) (sum_i weight_i G_i + e I)^-1

    The inputs x are what the matrix receives in the block of model i, when this block itself receives what the merged
    blocks before it make of the tokens. So each block is fitted to what it will receive in the merged model, where RegMean
    fits it to what it received in the models.

    Use when:
        As for RegMean, if you have the texts while merging: the statistics depend on the merge, so they cannot be measured
        before it or shared.

    Args:
        weight: How much a model's inputs count.
        alpha: Factor of the off-diagonal entries of every Gram matrix. With 0 each column is averaged on its own; with 1
            the fit is exact, and follows the few texts that were seen most closely.
        ridge: What is added to the diagonal of the sum, over the mean of that diagonal: pulls towards R. It is raised where
            the sum is not positive definite.
        limit: Largest length of merged - base, over the largest length of a delta_i. Where it would be longer, the ridge is
            raised tenfold until it is not, as in RegMean.
        reference: R: the weighted average of the models as above, or the base.

    Differs from the paper:
        The paper solves for the matrix itself; the step from R is the same matrix where the sum can be inverted, and leaves
        R where there is no input. The limit is ours.
        Norms, biases and everything outside the blocks are averaged; the authors' code for language models keeps the
        embedding and the head of one model.
        Every Gram matrix is a mean over tokens, and padding is not among them. Masks and rotary tables are computed once,
        by the merged model's config, for all models.
    """
    vectors = deltas(base, models)
    return base + fit_outputs(vectors, gram, weight, alpha, ridge, limit, start=reference).to(base.dtype)
