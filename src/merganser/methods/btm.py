"""Branch-Train-Merge: average of expert models, weighted by the probabilities of their domains."""

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import torch
from torch import Tensor

from ..method import Fraction, Number, NumbersFromData, PerModel, default, merge_method
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


def domain_probabilities(
    losses: Sequence[Sequence[float]] | None, posterior: Sequence[float], smoothing: float
) -> tuple[float, ...]:
    """Return the probability of each expert's domain, up to a common factor.

    Args:
        losses: For each expert the loss of every sequence; None where none was measured.
        posterior: The prior of each domain; or what is returned, if there are no losses.
        smoothing: Share of the newest sequence in the moving average; 0 for the mean.
    """
    if losses is None:
        return tuple(posterior)
    average = [0.0] * len(posterior)
    for number, sequence in enumerate(zip(*losses, strict=True)):
        scores = [math.log(own) - loss if own else -math.inf for own, loss in zip(posterior, sequence, strict=True)]
        likely = [math.exp(score - max(scores)) for score in scores]
        # the first sequence has no earlier ones to be averaged with
        share = smoothing if smoothing and number else 1 / (number + 1)
        average = [(1 - share) * old + share * new / sum(likely) for old, new in zip(average, likely, strict=True)]
    return tuple(average)


@merge_method(
    family="averages",
    cite="li2022btm",
    statistics={"losses": NumbersFromData("losses", optional=True)},
    located={"probability": domain_probabilities},
    validate=check_posterior,
)
def btm(
    models: list[Tensor],
    probability: Tensor,
    *,
    posterior: PerModel[Probability] = default(1.0),
    smoothing: Fraction = default(0.3),
    top_k: Experts = 0,
) -> Tensor:
    """Average experts of different domains, weighted by the posterior of their domains on the target text.

        merged = sum_i p_i * model_i / sum_i p_i, over the top_k most probable
        p_i    = posterior_i; or, where losses are measured, the moving average over the sequences x of
                 posterior_i exp(-loss_i(x)) / sum_j posterior_j exp(-loss_j(x))

    loss_i(x) is the negative log-likelihood of all tokens of x together under model i.

    Use when:
        Copies of one model were each trained on one domain, and one model is needed for text that mixes domains, or to
        start training the expert of a new domain. It needs some text of the target: give it as `data` at the top of the
        recipe, the same for all models.

    Args:
        posterior: Probability of each expert's domain given the text. Where the recipe names data, or statistics of the
            models made with `--statistics loss` on the same data, these probabilities are the priors, from which the
            posterior of each sequence is computed.
        smoothing: Share of each sequence in the moving average over the sequences, in the order in which they were drawn;
            0 lets all sequences count alike. Without losses it has no effect.
        top_k: Number of experts that are averaged, the most probable ones; 0 for all. Of equal ones those named first
            count.

    Differs from the paper:
        The average begins with the posterior of the first sequence, as in the code of the paper's predecessor (DEMix); the
        paper's sum of 0.3^i times the i-th posterior gives nearly all weight to the first two. At 0.3 about the last ten
        sequences count; for a mixture of domains, take 0.
        A sequence is one window of the data, not a block of 1024 tokens, and its posterior that after its last token.
        The paper takes 100 sequences (`sequences: 100`).
        The paper selects the top experts for ensembles.
    """
    return weighted_sum(models, shares(torch.where(best(probability, top_k or len(models)), probability, 0.0)))
