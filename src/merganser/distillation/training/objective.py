"""The loss of a batch: on the text's own tokens, and on the predictions of the sources."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from ..losses.choice import CHOICES
from ..losses.cross_entropy import taught_cross_entropy
from ..losses.gate import FEEDBACK, FusionGate
from ..losses.likelihood import chunk_log_probabilities, likelihood_loss, word_log_probabilities

__all__ = ["Objective", "Terms"]


@dataclass(frozen=True)
class Terms:
    """The terms of a loss, each a sum over the tokens that are predicted.

    Args:
        text: Cross-entropy of the text's tokens, in nats.
        taught: What the sources add; where none teaches, the text's token does.
        feedback: Feedback loss of the gate, of a part its share by the tokens; 0 without one. It is no sum.
        tokens: Number of tokens that are predicted.
    """

    text: Tensor
    taught: Tensor
    feedback: Tensor
    tokens: int


@dataclass(frozen=True)
class Objective:
    """What is minimised: lambda * text + (1 - lambda) * taught.

    Args:
        lambda_: Share of the text's own tokens; 1 is plain fine-tuning.
        loss: `cross_entropy` or `alm`.
        choice: How sources share a sequence, one of `CHOICES`; a gate comes first.
        temperature: Of ALM.
        gate: The gate of Fusion-X, which is trained with the model; None without one.
        words: Which of the student's logits begin a word, bool, shape [vocabulary], if chunks are debiased; else None.
    """

    lambda_: float
    loss: str = "cross_entropy"
    choice: str = "min_ce"
    temperature: float = 100.0
    gate: FusionGate | None = None
    words: Tensor | None = None

    def __call__(
        self,
        logits: Tensor,
        ids: Tensor,
        labels: Tensor,
        lesson: Mapping[str, Tensor],
        whole: Mapping[str, Tensor] | None = None,
    ) -> Terms:
        """Return the terms for a batch, or for a part of one; the terms of all parts add up to those of the batch.

        Args:
            logits: Shape [B, T, vocabulary].
            ids: Input tokens, shape [B, T].
            labels: Tokens to predict, -100 for none, shape [B, T].
            lesson: From `collate`.
            whole: From `whole_batch`, where this is a part.
        """
        flat = logits.flatten(0, 1)
        targets = torch.cat([labels[:, 1:], labels.new_full((len(labels), 1), -100)], 1).flatten()
        spoken = (targets >= 0).nonzero()[:, 0]
        wide = torch.promote_types(logits.dtype, torch.float32)
        own = cross_entropy(flat[spoken].to(wide), targets[spoken], reduction="none")
        text, nothing = own.sum(), own.sum() * 0
        if self.lambda_ == 1:
            return Terms(text, text.detach(), nothing, len(spoken))
        weights, feedback = self._weights(lesson["cross_entropy"], nothing)
        of_all, counts, tokens = weights, lesson["chunk_counts"], len(spoken)
        if whole is not None:
            of_all, feedback = self._weights(whole["cross_entropy"], nothing)
            counts, tokens = whole["chunk_counts"], int(whole["tokens"])
            feedback = feedback * (len(spoken) / max(tokens, 1))
        if self.loss == "alm":
            # a mean over the chunks of the whole batch
            all_shares = (of_all.detach() * counts.flatten()).sum().clamp(min=1e-8)
            taught = self._likelihoods(logits, ids, lesson, weights) * (tokens / all_shares)
        else:
            by_row = own.new_zeros(len(flat)).index_put((spoken,), own)
            taught = text + self._distributions(flat, by_row, lesson, weights)
        return Terms(text, taught, feedback, len(spoken))

    def _weights(self, entropies: Tensor, nothing: Tensor) -> tuple[Tensor, Tensor]:
        if self.gate is not None:
            weights, feedback = self.gate(entropies)
            return weights.flatten(), feedback
        return CHOICES[self.choice](entropies).flatten(), nothing

    def _distributions(self, flat: Tensor, text: Tensor, lesson: Mapping[str, Tensor], weights: Tensor) -> Tensor:
        """Return the loss on the sources' predictions, minus that of the text's tokens at the same positions."""
        share = weights[lesson["shares"]]
        some = share.detach() > 0
        rows = lesson["rows"][some]
        said = taught_cross_entropy(
            flat[rows], lesson["ids"][some], lesson["log_probabilities"][some], lesson["rest"][some]
        )
        return (share[some] * (said - text[rows])).sum()

    def _likelihoods(self, logits: Tensor, ids: Tensor, lesson: Mapping[str, Tensor], weights: Tensor) -> Tensor:
        """Return the sum over chunks, each with its source's weight."""
        count = len(lesson["chunks"])
        own = logits.new_zeros(count, dtype=torch.promote_types(logits.dtype, torch.float32))
        for numbers in lesson["numbers"]:
            own = own + chunk_log_probabilities(logits, ids, numbers, count)
        if self.words is not None and count:
            behind = logits.flatten(0, 1)[lesson["chunk_ends"]]
            own = own + word_log_probabilities(behind, self.words.to(logits.device))
        share = weights[lesson["chunk_shares"]]
        losses = likelihood_loss(own, lesson["chunks"], self.temperature)
        return (share * losses).sum()

    def total(self, terms: Terms, whole: Mapping[str, Tensor] | None = None) -> Tensor:
        """Return the loss per token; those of all parts of a batch add up to that of the batch.

        Args:
            terms: Of a batch, or of a part of one.
            whole: From `whole_batch`, where they are of a part.
        """
        count = terms.tokens if whole is None else int(whole["tokens"])
        mixed = self.lambda_ * terms.text + (1 - self.lambda_) * terms.taught
        return mixed / count + FEEDBACK * terms.feedback
