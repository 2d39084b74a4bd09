"""GMSA: groups of neighbouring hidden states become soft tokens that a language model reads (Tang et al. 2025)."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ParameterError
from ..cache import check_model
from ..options import at_least

__all__ = ["GroupMerging", "SemanticAlignment"]


class GroupMerging(nn.Module):
    """Merges the last hidden states of an encoder into soft tokens; to be trained with it.

        soft tokens = align(means of `size` neighbouring tokens)

    The soft tokens stand for the text in the `inputs_embeds` of a language model. Trained first as an autoencoder (the
    model repeats the text that it reads as soft tokens), then on questions about the text. In training the paper draws
    `size` for each sample: give it to `forward`.

    Source: the paper's description; its authors' code was not compared.

    Args:
        size: Tokens of a group, the rate of compression.
        align: What turns means into what the decoder's first layer reads; `SemanticAlignment`, or any module that takes
            means [batch, groups, hidden size] and their mask. None: the means themselves.

    Raises:
        ParameterError: The size is out of range.
    """

    def __init__(self, size: int, align: nn.Module | None = None):
        super().__init__()
        self.size, self.align = at_least("size", size, 1), align

    def forward(self, hidden: Tensor, mask: Tensor | None = None, size: int | None = None) -> tuple[Tensor, Tensor]:
        """Merge groups, counted from the first token of each row, on whichever side it is padded.

        Args:
            hidden: Shape [batch, tokens, hidden size].
            mask: 1 or True for tokens, 0 for padding, shape [batch, tokens].
            size: Instead of that of the layer.

        Returns:
            Soft tokens, [batch, groups, hidden size], zero where there is none, and True where there is one,
            [batch, groups]. The last group of a row may have fewer tokens than `size`.
        """
        size = self.size if size is None else at_least("size", size, 1)
        real = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device) if mask is None else mask.bool()
        count = int(real.sum(1).max()) if real.numel() else 0
        if not count:
            raise ParameterError("mask: every token is padding")
        group = (real.long().cumsum(1) - 1).clamp(min=0) // size
        groups = -(-count // size)
        weight = real.to(torch.float32)
        sizes = torch.zeros(len(hidden), groups, device=hidden.device).scatter_add(1, group, weight)
        sums = torch.zeros(len(hidden), groups, hidden.shape[-1], device=hidden.device)
        index = group[..., None].expand_as(hidden)
        sums = sums.scatter_add(1, index, hidden.float().masked_fill(~real[..., None], 0.0))
        means = (sums / sizes.clamp(min=1)[..., None]).to(hidden.dtype)
        there = sizes > 0
        if self.align is not None:
            means = self.align(means, there)
        return means.masked_fill(~there[..., None], 0.0), there


class SemanticAlignment(nn.Module):
    """Copies of the lowest layers of a decoder, which bring means of last hidden states to what its first layer reads.

    Args:
        model: A causal language model of transformers, of the types that `MergedCache` takes. It stays as it is.
        layers: Number of layers that are copied.

    Raises:
        ParameterError: The model has fewer layers.
        UnsupportedError: The model has other attention, for one a sliding window.
    """

    def __init__(self, model: Any, layers: int = 1):
        super().__init__()
        check_model("semantic alignment", model, windows=False)
        decoder = model.base_model
        if at_least("layers", layers, 1) > len(decoder.layers):
            raise ParameterError(f"layers: the model has {len(decoder.layers)}, not {layers}")
        self.layers = nn.ModuleList(copy.deepcopy(decoder.layers[i]) for i in range(layers))
        self.rotary = copy.deepcopy(decoder.rotary_emb)

    def forward(self, means: Tensor, mask: Tensor) -> Tensor:
        """Return soft tokens, each of which sees those before it.

        Args:
            means: Shape [batch, groups, hidden size].
            mask: True where there is a group, shape [batch, groups]; padding is on the right.
        """
        count = means.shape[1]
        positions = torch.arange(count, device=means.device)[None]
        lowest = torch.finfo(means.dtype).min
        causal = torch.full((count, count), lowest, dtype=means.dtype, device=means.device).triu(1)
        additive = causal.expand(len(means), 1, -1, -1).masked_fill(~mask[:, None, None], lowest)
        embeddings = self.rotary(means, positions)
        hidden = means
        for layer in self.layers:
            found = layer(hidden, attention_mask=additive, position_ids=positions, position_embeddings=embeddings)
            hidden = found[0] if isinstance(found, tuple) else found
        return hidden
