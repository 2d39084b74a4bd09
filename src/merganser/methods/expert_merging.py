"""Expert Merging: task vectors with coefficients that are learnt, so that every block computes what each model's does."""

from collections.abc import Sequence
from typing import Annotated

import torch
from torch import Tensor

from ..method import Count, FromData, NonNegative, Number, PerModel, Positive, default, merge_method
from ..ops import deltas

Sigmoid = Annotated[Tensor, Number(0.0, 1.0, open=True, search=(0.05, 0.5))]


def add_chunks(base: Tensor, vectors: Sequence[Tensor], coefficients: Sequence[Tensor]) -> Tensor:
    """Return the base plus task vectors, each of whose chunks of consecutive elements has a coefficient.

    Args:
        base: The base.
        vectors: The task vectors, in the shape of the base.
        coefficients: Of each task vector, shape [chunks]. Where chunks cannot be equal, the first have one element more.
    """
    merged = base
    for vector, own in zip(vectors, coefficients, strict=True):
        pieces = vector.flatten().tensor_split(len(own))
        merged = merged + torch.cat([c * piece for c, piece in zip(own, pieces, strict=True)]).view(base.shape)
    return merged


@merge_method(
    family="data",
    cite="zhang2025expert",
    scope="tensor",
    version=2,
    statistics={"coefficients": FromData("coefficients", inputs="fitted")},
    breaks={"identical": "the coefficients of equal models, or of one, need not have the sum 1"},
)
def expert_merging(
    base: Tensor,
    models: list[Tensor],
    coefficients: Sequence[Tensor] | None,
    *,
    weight: PerModel[NonNegative] = default(1.0),
    start: Sigmoid = default(0.1),
    chunks: Count = default(1),
    steps: Count = default(30),
    batch: Count = default(2),
    rate: Positive = default(0.5),
    regulariser: NonNegative = default(0.1),
) -> Tensor:
    """Add the task vectors with coefficients that are learnt block by block from what each model's block computes.

        merged = base + sum_i s(c_i) delta_i,    delta_i = model_i - base,    s(c) = 1 / (1 + exp(-c))
        loss   = sum_i w_i |h_i - y_i|^2 / |h0_i - y_i|^2 + regulariser mean over tensors of sum_i |s(c_i) - start|

    Every tensor has one c per model, or one for each of its chunks. y_i is what the block computes in model i on its own
    data, h_i what the merged block makes of the same tokens behind the merged blocks before it, and h0_i the same with all
    s(c) = start. w_i is weight_i over the sum of the weights. The loss of a block is lowered by Adam, with some sequences of
    every model in each step, and a rate that falls along a cosine.

    Use when:
        You have some texts of each expert's field while merging, and norms and biases should be weighted, too. Only a few
        numbers per tensor are learnt, so few texts are enough; methods that solve for whole matrices fit them better.
        Coefficients stay near `start`, and the paper's 0.1 is small for a few experts: try 0.3.

    Args:
        weight: How much the outputs of a model count.
        start: First value of every s(c), to which the regulariser pulls, and that of tensors outside the blocks.
        chunks: Into how many pieces of consecutive elements a tensor is cut, each with its own coefficient for each
            model. Where the pieces cannot be equal, the first ones have one element more.
        steps: Steps of the optimiser for each block; like the weights, one number for all tensors of a block.
        batch: Sequences of every model in a step: the next ones, over and over. The work grows with their number.
        rate: Step size of the optimiser, for c, at the start.
        regulariser: Pulls towards start. Without it the loss is 1 at the start, and 0 where all outputs are equal.

    Differs from the paper:
        The paper lowers the divergence between the logits of the whole merged model and of each model, as
        `expert_merging_whole` does, and takes hidden states only as an addition. Here every block is learnt by itself, from
        hidden states alone, after the blocks before it.
        The squared error is divided by that at the start, so that deep blocks, whose outputs are large, and models that
        differ much count alike; the regulariser thereby has no unit. The paper's is 5 (0.1 in its code) on another scale.
        The optimiser is Adam without decay of weights and with one falling rate, not AdamW with warm restarts.
        The chunked variant (Expert Merging++) chooses the number of chunks of a layer by its importance; here it is a
        parameter. The authors' code drops coefficients where a tensor cannot be cut into equal chunks; here none is.
        A coefficient is between 0 and 1, so one model, or equal ones, do not come out exactly.
        Embeddings, the head, and tensors that transformers changes on loading have the coefficient `start`.
    """
    vectors = deltas(base, models)
    if coefficients is None:
        total = vectors[0]
        for vector in vectors[1:]:
            total = total + vector
        return base + start * total
    return add_chunks(base, vectors, coefficients)
