"""Branch-Train-Merge: average of expert models, weighted by the probabilities of their domains."""

from collections.abc import Mapping
from typing import Annotated, Any

import torch
from torch import Tensor

from ..method import Number, PerModel, merge_method
from ..ops import best, shares, weighted_sum

Probability = Annotated[Tensor, Number(0.0, search=(0.0, 1.0))]
Experts = Annotated[int, Number(0, search=(1, 3))]


def check_posterior(parameters: Mapping[str, Any]) -> str | None:
    """Return a complaint if all probabilities are 0, or `top_k` exceeds the number of models, else None."""
    posterior, top_k = parameters["posterior"], parameters["top_k"]
    if not any(posterior):
        return "posterior is 0 for every model; one at least must be above 0"
    if top_k > len(posterior):
        return f"top_k must be at most the number of models, {len(posterior)}, got {top_k}"
    return None


@merge_method(family="averages", cite="li2022btm", validate=check_posterior)
def btm(models: list[Tensor], *, posterior: PerModel[Probability], top_k: Experts = 0) -> Tensor:
    """Average experts of different domains, weighted by the posterior of their domains on the target text.

        merged = sum_i posterior_i * model_i / sum_i posterior_i, over the top_k most probable

    Use when:
        Copies of one model were each trained on one domain, and one model is needed for text that mixes domains, or to
        start training the expert of a new domain.

    Args:
        posterior: Probability of each expert's domain given the text. The paper starts with equal priors, computes
            the posterior from the likelihoods of the experts on development text, and averages it over the batches.
        top_k: Number of experts that are averaged, the most probable ones; 0 for all. Of equal ones those named first
            count.

    Differs from the paper:
        The posterior is a parameter; estimating it takes text and a forward pass of every expert.
        The paper selects the top experts for ensembles.
    """
    return weighted_sum(models, shares(torch.where(best(posterior, top_k or len(models)), posterior, 0.0)))
