"""StreamingLLM: the first tokens and the last ones (Xiao et al. 2024)."""

from __future__ import annotations

import torch

from ..layer import CompressedLayer

__all__ = ["StreamingLLM"]


class StreamingLLM(CompressedLayer):
    """Keep `sinks` first tokens and the last `budget - sinks`.

    Differs from the paper:
        Keys keep the positions of their tokens; the paper counts positions within the cache.
    """

    def compress(self) -> None:
        """Drop the oldest entries behind the sinks."""
        length = self.keys.shape[-2]
        order = torch.arange(length, dtype=torch.float32, device=self.keys.device)
        self.keep(self.best(order.expand(self.keys.shape[:-1])))
