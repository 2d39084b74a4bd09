"""RCP-Merging: a domain model's task vector, where the domain needs it more than reasoning suffers from it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..method import FromData, NonNegative, Scale, default, merge_method
from ..ops import deltas


@merge_method(
    family="data",
    cite="yang2026rcp",
    models=(2, 2),
    version=2,
    statistics={"fisher": FromData("fisher"), "gradient": FromData("gradient")},
    breaks={
        "identical": "a task vector is added to a model that has it already",
        "order": "the first model reasons, the second one knows the domain",
    },
)
def rcp(
    base: Tensor,
    models: list[Tensor],
    fisher: Sequence[Tensor] | None,
    gradient: Sequence[Tensor] | None,
    *,
    lambda_: NonNegative = default(3.9),
    scale: Scale = default(1.0),
) -> Tensor:
    """Add a domain model's task vector to a reasoning model, in the entries where the domain needs it most.

        s      = model_2 gradient_2,    F = model_1^2 fisher_1
        merged = model_1 + scale [s + lambda F (model_1 - model_2)^2 < 0] (model_2 - base)

    gradient_2 is the mean gradient of the domain model's loss on its text: without a weight the loss would rise by about
    -s. fisher_1 is the Fisher information of the reasoning model on its own text.

    Use when:
        A reasoning model should gain the domain of a fine-tune of the same base, and keep its reasoning.

    Args:
        lambda_: How much the change of what matters to reasoning counts. With 0 the domain alone decides. The default is the
            paper's 1000 for sequences of 256 tokens, the length that `calibrate` draws unless told otherwise (see below).
        scale: Factor of the task vector.

    Differs from the paper:
        In the paper every sample of the domain votes for or against an entry, and the majority decides; here the mean of
        s over the samples decides, which can be added up over parts of the data and measured without the reasoning
        model. For one sample both are the same. A sum that is exactly 0 (no gradient) counts against the entry; in the
        paper it counts for it.
        Gradients are of the sum of the losses of a sequence's tokens, over the number of tokens; in the paper of their
        mean. For sequences of L tokens F is L times as large as there, so that its lambda of 1000 is 1000 / L here, the
        default for L = 256.
        The factor of the task vector is ours; the paper has 1. A tensor without gradients stays as in the reasoning model.
    """
    reasoning, domain = models
    if fisher is None or gradient is None:
        return reasoning.clone()
    _, delta = deltas(base, models)
    cost = lambda_ * (reasoning.square() * fisher[0]) * (reasoning - domain).square()
    return reasoning + torch.where(domain * gradient[1] + cost < 0, scale * delta, 0.0)
