"""The key-value caches of several experts as one, which `generate` carries from token to token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ....errors import UnsupportedError

__all__ = ["ExpertCaches"]


class ExpertCaches:
    """The weights of the experts for each row, and for each expert that has a weight the cache of its rows.

    Args:
        names: Names of the experts.
    """

    is_compileable = False

    def __init__(self, names: tuple[str, ...]) -> None:
        self._names = names
        self.length = 0
        self.weights = torch.empty(0)
        self.rows: list[Tensor] = []
        self.caches: list[Any] = []

    def begin(self, weights: Tensor, ran: dict[int, tuple[Tensor, Any]], length: int) -> None:
        """Keep what the prompts left behind.

        Args:
            weights: Of the experts, shape [rows, experts].
            ran: By expert, which rows it read, and its cache of them.
            length: Tokens of a prompt, with padding.

        Raises:
            UnsupportedError: An expert keeps its state in another way than as a cache of keys and values.
        """
        self.weights, self.length = weights, length
        self.rows, self.caches = [], []
        for number, name in enumerate(self._names):
            wanted = (weights[:, number] > 0).nonzero().flatten()
            self.rows.append(wanted)
            if not len(wanted):
                self.caches.append(None)
                continue
            rows, cache = ran[number]
            if not hasattr(cache, "batch_select_indices"):
                raise UnsupportedError(
                    f"{name}: keeps no cache of keys and values that can be divided by rows; give use_cache=False"
                )
            if len(wanted) < len(rows):
                cache.batch_select_indices(torch.searchsorted(rows, wanted))
            self.caches.append(cache)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the number of tokens that were read."""
        return self.length

    def batch_select_indices(self, indices: Tensor) -> None:
        """Make each row that of another one; rows may be repeated or left out.

        Args:
            indices: For each new row, the number of the one that it goes on from.
        """
        for number, cache in enumerate(self.caches):
            places = torch.full((len(self.weights),), -1, device=indices.device)
            places[self.rows[number]] = torch.arange(len(self.rows[number]), device=indices.device)
            picked = places[indices]
            self.rows[number] = (picked >= 0).nonzero().flatten()
            if cache is not None:
                if len(self.rows[number]):
                    cache.batch_select_indices(picked[self.rows[number]])
                else:
                    self.caches[number] = None
        self.weights = self.weights[indices]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let each beam go on from another one."""
        self.batch_select_indices(beam_idx)
