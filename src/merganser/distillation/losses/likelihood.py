"""ALM: match the likelihoods of chunks of text, whatever tokens the models have."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["chunk_log_probabilities", "likelihood_loss", "word_log_probabilities"]

# a likelihood that differs from 1 by less than this has no gradient
_LEAST = 1e-6


def likelihood_loss(student: Tensor, source: Tensor, temperature: float = 100.0) -> Tensor:
    """Return the binary cross-entropy between the likelihoods of each chunk, at a temperature, times the temperature.

        loss = - t (p log q + (1 - p) log (1 - q)),  p = exp(source / t), q = exp(student / t)

    With the factor t the loss does not vanish at high temperatures; the authors weight it by its gradient instead.

    Args:
        student: Log-probabilities of chunks by the model that is taught, shape [chunks].
        source: The same by the source.
        temperature: t, above 0.

    Returns:
        Shape [chunks].

    Source:
        Minixhofer et al., Universal Cross-Tokenizer Distillation via Approximate Likelihood Matching, 2025, equation 4.
    """
    spoken, heard = student.clamp(max=-_LEAST) / temperature, source.clamp(max=-_LEAST) / temperature
    share = heard.exp()
    return -temperature * (share * spoken - torch.expm1(heard) * _log1mexp(spoken))


def _log1mexp(x: Tensor) -> Tensor:
    """Return log(1 - exp(x)) for x < 0, to full precision on both sides of -log 2."""
    near = x > -0.6931471805599453
    # each branch gets only values it can differentiate: the gradient of the branch not taken would be 0 * infinity
    close = torch.log(-torch.expm1(torch.where(near, x, -0.5)))
    return torch.where(near, close, torch.log1p(-torch.exp(torch.where(near, -1.0, x))))


def chunk_log_probabilities(logits: Tensor, ids: Tensor, numbers: Tensor, count: int) -> Tensor:
    """Return the log-probability of each chunk of a batch: the sum over its tokens.

    Args:
        logits: Shape [sequences, tokens, vocabulary].
        ids: Tokens, int64, shape [sequences, tokens].
        numbers: Number of each token's chunk in the batch, -1 for none, int64, same shape; the first token of a sequence
            is in none.
        count: Number of chunks.

    Returns:
        Shape [count], float32, or float64 if the logits are.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    kept = numbers[:, 1:] >= 0
    spoken = logits[:, :-1][kept]
    own = spoken.gather(1, ids[:, 1:][kept][:, None])[:, 0] - spoken.logsumexp(-1)
    return own.new_zeros(count).index_add(0, numbers[:, 1:][kept], own)


def word_log_probabilities(logits: Tensor, words: Tensor) -> Tensor:
    """Return the log-probability that one of some tokens follows.

    Args:
        logits: Shape [positions, vocabulary].
        words: Which tokens begin a word, bool, shape [vocabulary]; at least one does.

    Returns:
        Shape [positions], float32, or float64 if the logits are.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits[:, words].logsumexp(-1) - logits.logsumexp(-1)
