"""A small network that makes the row of a merged token from those of its parts; untrained, it gives their mean.

Source: Feher, Vulic and Minixhofer 2024, arXiv:2411.18553, whose hypernetwork is that of Minixhofer, Ponti and Vulic 2024,
arXiv:2405.07883: transformer layers over the embeddings of the parts. Theirs is trained once for all tokenizers, on billions of tokens;
this one is smaller, for the tokens of one text, and predicts what a row has beyond the mean of its parts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["Hypernetwork"]

_WIDTH = 256
_HEADS = 4


class Hypernetwork(nn.Module):
    """Makes rows of one table.

    Args:
        table: The rows of the model's own tokens, float32, shape [tokens, width].
        parts: For each new token, the rows that it is made of; at least one.
        seed: Seed of the first weights.
    """

    mean: Tensor
    rows: Tensor
    absent: Tensor

    def __init__(self, table: Tensor, parts: Sequence[Sequence[int]], seed: int) -> None:
        super().__init__()
        most = max(map(len, parts))
        padded = torch.tensor([[*own, *[-1] * (most - len(own))] for own in parts])
        absent = padded < 0
        rows = table[padded.clamp(min=0)].masked_fill(absent.unsqueeze(2), 0.0)
        count = (~absent).sum(1, keepdim=True)
        self.register_buffer("mean", rows.sum(1) / count)
        self.scale = float(table.double().square().mean().sqrt()) or 1.0
        self.register_buffer("rows", rows / self.scale)
        self.register_buffer("absent", absent)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.inward = nn.Linear(table.shape[1], _WIDTH)
            self.places = nn.Parameter(0.02 * torch.randn(most, _WIDTH))
            self.layer = nn.TransformerEncoderLayer(
                _WIDTH, _HEADS, 2 * _WIDTH, dropout=0.0, batch_first=True, norm_first=True
            )
            self.outward = nn.Linear(_WIDTH, table.shape[1])
        nn.init.zeros_(self.outward.weight)
        nn.init.zeros_(self.outward.bias)

    def forward(self) -> Tensor:
        """Return the rows of all new tokens, shape [new, width]."""
        states = self.layer(self.inward(self.rows) + self.places, src_key_padding_mask=self.absent)
        states = states.masked_fill(self.absent.unsqueeze(2), 0.0).sum(1) / (~self.absent).sum(1, keepdim=True)
        rows: Tensor = self.mean + self.scale * self.outward(states)
        return rows
