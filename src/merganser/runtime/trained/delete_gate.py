"""MrT5's delete gate: an early layer of an encoder decides which tokens later layers no longer see (Kallini et al. 2025)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...errors import ParameterError, UnsupportedError

__all__ = ["DeleteGate", "Gate", "RateController", "softmax1"]


@dataclass(frozen=True)
class Gate:
    """What a delete gate says of each token.

    Attributes:
        values: From `scale`, deleted, to 0, kept, shape [batch, tokens]. In training they are added to the attention
            logits of the tokens as keys, in all later layers and in cross attention: `values[:, None, None]`.
        deleted: Which tokens are gone once the gate is hard, padding too: shape [batch, tokens], bool.
        penalty: Mean of the values outside padding, a scalar with a gradient. Added to the loss with the coefficient of
            a `RateController`, it makes the gate delete.
        rate: Share of the tokens outside padding that are deleted.
    """

    values: Tensor
    deleted: Tensor
    penalty: Tensor
    rate: float


class DeleteGate(nn.Module):
    """Scores the tokens behind an early layer of an encoder; to be trained with the model.

        G = scale * sigmoid(-(w RMSNorm(h) + b)),   deleted where G < threshold

    In training all tokens stay, and G is added to the logits of attention ("soft deletion"); for speed, `delete` takes the
    tokens out. Attention should be `softmax1`, so that a layer can attend to nothing where all of a text is deleted.

    Source: section 3 of the paper, whose defaults these are; b begins with 1.

    Args:
        hidden_size: Width of the hidden states.
        scale: The value of a deleted token, below 0.
        threshold: Between `scale` and 0; half of the scale by default.
        noise: In training, add Gumbel noise to the logits of the gate.

    Raises:
        ParameterError: A number is out of range.
    """

    def __init__(self, hidden_size: int, *, scale: float = -30.0, threshold: float | None = None, noise: bool = False):
        super().__init__()
        if not scale < 0:
            raise ParameterError(f"scale: must be below 0, not {scale!r}")
        threshold = scale / 2 if threshold is None else threshold
        if not scale < threshold < 0:
            raise ParameterError(f"threshold: must be between {scale} and 0, not {threshold!r}")
        self.scale, self.threshold, self.noise = scale, threshold, noise
        self.norm = nn.RMSNorm(hidden_size, eps=1e-6)
        self.score = nn.Linear(hidden_size, 1)
        nn.init.xavier_uniform_(self.score.weight)
        nn.init.ones_(self.score.bias)

    def forward(self, hidden: Tensor, mask: Tensor | None = None) -> Gate:
        """Score tokens.

        Args:
            hidden: Shape [batch, tokens, hidden size].
            mask: 1 or True for tokens, 0 for padding, shape [batch, tokens]. Padding counts as deleted, and for nothing in
                penalty and rate.
        """
        logits = self.score(self.norm(hidden))[..., 0]
        if self.training and self.noise:
            uniform = torch.rand_like(logits.float()).clamp(1e-10, 1 - 1e-7)
            logits = logits - (-uniform.log()).log().to(logits.dtype)
        values = self.scale * (-logits).sigmoid()
        real = torch.ones_like(values, dtype=torch.bool) if mask is None else mask.bool()
        if not bool(real.any()):
            raise ParameterError("mask: every token is padding")
        penalty = values[real].mean()
        deleted = values < self.threshold
        rate = float(deleted[real].float().mean())
        return Gate(values.masked_fill(~real, self.scale), deleted | ~real, penalty, rate)

    @staticmethod
    def delete(hidden: Tensor, gate: Gate) -> tuple[Tensor, Tensor, Tensor]:
        """Take deleted tokens out.

        Args:
            hidden: Shape [batch, tokens, hidden size].
            gate: What the gate said of them.

        Returns:
            The tokens that stay, in order and padded on the right with zeros, [batch, longest, hidden size]; True where
            there is a token, [batch, longest]; and the places they had, [batch, longest], for relative positions.

        Raises:
            UnsupportedError: A row would lose all of its tokens.
        """
        stays = ~gate.deleted
        count = stays.sum(1)
        if not bool(count.all()):
            row = int((count == 0).nonzero()[0])
            raise UnsupportedError(
                f"delete gate: row {row} would lose all of its tokens; train the gate with a lower rate of deletion"
            )
        mask = torch.arange(int(count.max()), device=hidden.device) < count[:, None]
        # a stable sort puts what stays first, in order
        places = (~stays).to(torch.uint8).argsort(dim=1, stable=True)[:, : mask.shape[1]]
        left = hidden.gather(1, places[..., None].expand(-1, -1, hidden.shape[-1]))
        return left.masked_fill(~mask[..., None], 0.0), mask, places.masked_fill(~mask, 0)


class RateController:
    """The coefficient of a gate's penalty, moved so that a share of the tokens is deleted: a PI controller.

        p <- 0.9 p + 0.1 kp (target - rate),   i <- i + ki (target - rate),   coefficient = max(0, p + i)

    Args:
        target: Share of tokens to delete, from 0 to below 1.
        proportional: kp.
        integral: ki.

    Raises:
        ParameterError: The target is out of range.
    """

    def __init__(self, target: float, *, proportional: float = 0.5, integral: float = 1e-5):
        if not isinstance(target, (int, float)) or isinstance(target, bool) or not 0 <= target < 1:
            raise ParameterError(f"target: must be a share from 0 to below 1, not {target!r}")
        self.target, self.proportional, self.integral = target, proportional, integral
        self._smooth = self._sum = 0.0

    def step(self, rate: float) -> float:
        """Return the coefficient for a batch in which the share `rate` is deleted."""
        error = self.target - rate
        self._smooth = 0.9 * self._smooth + 0.1 * self.proportional * error
        self._sum += self.integral * error
        return max(0.0, self._smooth + self._sum)


def softmax1(logits: Tensor) -> Tensor:
    """Return exp(x_t) / (1 + sum exp(x)) over the last axis: a softmax that can give nothing to all.

    No exponent is above 0, so nothing overflows, in float16 either.
    """
    most = logits.detach().amax(-1, keepdim=True).clamp(min=0)
    mass = (logits - most).exp()
    return mass / (mass.sum(-1, keepdim=True) + (-most).exp())
