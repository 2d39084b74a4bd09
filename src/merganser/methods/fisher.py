"""Fisher merging: every parameter is averaged, weighted by how much each model's predictions depend on it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..method import FromData, NonNegative, PerModel, Positive, default, merge_method, statistic
from ..ops import shares, weighted_sum


def squares(models: list[Tensor], fisher: Sequence[Tensor] | None) -> Tensor:
    """Measure of each model the sum of squares of its Fisher information and the number of entries, shape [T, 2]."""
    if fisher is None:
        return torch.zeros(len(models), 2, dtype=torch.float64)
    sums = [torch.stack([own.double().square().sum(), own.new_tensor(own.numel()).double()]) for own in fisher]
    return torch.stack(sums)


def units(measured: Tensor, normalize: bool) -> Tensor:
    """Return what each model's Fisher information is divided by, shape [T].

    This is the root of its mean square over all tensors, or that of all models together.
    """
    total, count = measured.unbind(1)
    own = (total / count.clamp(min=1)).sqrt()
    together = (total.sum() / count.sum().clamp(min=1)).sqrt().expand_as(own)
    found = own if normalize else together
    return torch.where(found > 0, found, 1.0)


@merge_method(
    family="data",
    cite="matena2022fisher",
    statistics={"fisher": FromData("fisher"), "unit": statistic(squares, units, over="model")},
)
def fisher(
    models: list[Tensor],
    fisher: Sequence[Tensor] | None,
    unit: Tensor,
    *,
    weight: PerModel[NonNegative] = default(1.0),
    normalize: bool = True,
    floor: Positive = default(1e-6),
) -> Tensor:
    """Average every parameter, weighted by its Fisher information in each model.

        F_i    = max(fisher_i / unit_i, floor)
        merged = sum_i weight_i F_i model_i / sum_i weight_i F_i

    fisher_i is the diagonal of the Fisher information of model i on its own text: the mean square of the gradient of the
    log-likelihood. A parameter that a model's predictions do not depend on leaves the choice to the others.

    Use when:
        You have text of each expert's field, and all parameters should be weighted, norms and embeddings too. RegMean
        takes less time to measure, and uses the correlations between inputs, which the diagonal leaves out.

    Args:
        weight: How much a model counts.
        normalize: Divide each model's Fisher information by the root of its mean square over the whole model, so that a
            model that is unsure of its text does not outweigh the others. Otherwise all are divided by the same number.
        floor: Least Fisher information, in units of that root. Where all models are below, the result is their average.

    Differs from the paper:
        The Fisher information is of sequences of text, with the text's own tokens as labels (the empirical one) or
        tokens drawn from the model (`labels: sampled` in the recipe's `data`); the paper takes the exact expectation over classes.
        It is the square of each sequence's gradient; MergeBench and FusionBench square the gradient of a whole batch,
        in which gradients of different sequences cancel.
        It is divided by the number of tokens, not of sequences; with sequences of one length this is a constant factor.
        The authors' code applies the floor, 1e-6 before normalising, to the first model alone by default, so that this
        one wins where no Fisher information is found; FusionBench adds 1e-6 to all. Here the floor holds for all.
        The paper searches the weights on validation data; here they are parameters.
    """
    share = shares(weight)
    if fisher is None:
        return weighted_sum(models, share)
    pull, total = torch.zeros_like(models[0]), torch.zeros_like(models[0])
    for i, own in enumerate(fisher):
        amount = (own / unit[i]).clamp(min=floor) * share[i]
        pull = pull + amount * models[i]
        total = total + amount
    return pull / total
