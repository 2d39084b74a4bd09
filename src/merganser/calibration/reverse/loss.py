"""The loss of a sequence: the negative log-likelihood of each token that counts, given those before it."""

from __future__ import annotations

import torch
import xxhash
from torch import Tensor
from torch.nn import functional

from ..data.batches import Padded

__all__ = ["Loss", "predicted"]

# the label of a position that predicts no token
_NOTHING = -100


class Loss:
    """The loss of sequences.

    Args:
        labels: `data`: the next token of the text, which gives the empirical Fisher information; `sampled`: a token
            drawn from the model's own distribution at that position of the text, which gives an unbiased estimate of
            the Fisher information.
        seed: Seed of the draw. What is drawn for a sequence depends on the seed and its tokens alone.
    """

    def __init__(self, labels: str, seed: int) -> None:
        self._sampled = labels == "sampled"
        self._seed = seed

    def of(self, logits: Tensor, sequence: Padded) -> Tensor:
        """Return the sum of the losses of all predicted tokens, 0-d, float32.

        Args:
            logits: Shape [1, longest, vocabulary].
            sequence: One sequence.
        """
        chosen = predicted(sequence)
        labels = sequence.ids[0, 1:].masked_fill(~chosen, _NOTHING)
        if self._sampled:
            labels[chosen] = self._draw(logits.detach()[0, :-1][chosen], sequence)
        # the last position predicts nothing; to leave it out of the logits would copy them
        labels = torch.cat([labels, labels.new_tensor([_NOTHING])])
        return functional.cross_entropy(logits.flatten(0, 1).float(), labels, ignore_index=_NOTHING, reduction="sum")

    def _draw(self, logits: Tensor, sequence: Padded) -> Tensor:
        ids = sequence.ids[sequence.valid].numpy().tobytes()
        generator = torch.Generator().manual_seed(xxhash.xxh64_intdigest(ids, seed=self._seed) >> 1)
        shares = torch.log_softmax(logits.float(), dim=-1).exp()
        return torch.multinomial(shares, 1, generator=generator)[:, 0]


def predicted(sequence: Padded) -> Tensor:
    """Return which positions predict a token that counts, bool, shape [longest - 1]; the first token is not predicted.

    Args:
        sequence: One sequence.
    """
    return sequence.counted[0, 1:]
