"""RazorAttention: heads that look far back keep everything, the others one token for all that is far (Tang et al. 2024)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...errors import ParameterError
from ..options import at_least, in_range, part
from .uneven import UnevenLayer

__all__ = ["RazorAttention"]


class RazorAttention(UnevenLayer):
    """Keep all tokens of retrieval heads; of other heads sinks, the last tokens, and one for the N that are dropped.

        k^ = mean k,  v^ = mean v,  with the weight N exp(q k^) in the softmax

    The heads are found once per model by `find_retrieval_heads`. There is no budget: what is held grows with the text in
    retrieval heads, and in the others once `share` of the tokens is more than `window`.

    Args:
        heads: What `find_retrieval_heads` returned, or `RetrievalHeads.load`.
        sinks: First tokens that stay in all heads.
        window: Least number of last tokens that stay in all heads.
        share: Share of all tokens that stay as last tokens in all heads, if that is more than `window`.
    """

    def __init__(self, *, heads: Any, sinks: int = 4, window: int = 4000, share: float = 0.2):
        super().__init__()
        self.sinks, self.window = at_least("sinks", sinks, 0), at_least("window", window, 1)
        self.share, self.key_heads = in_range("share", share, 0, 1), getattr(heads, "key_heads", None)
        self.whole: Sequence[int] = ()

    @classmethod
    def build(cls, layers: int, options: dict[str, Any]) -> list[Any]:
        """Return the layers of a model's cache, each with its retrieval heads."""
        heads = options["heads"]
        chosen = getattr(heads, "layers", None)
        if chosen is None:
            raise ParameterError(f"heads: must be what find_retrieval_heads returns, not {type(heads).__name__}")
        if len(chosen) != layers:
            raise ParameterError(
                f"heads: they are those of {len(chosen)} layers, and the model has {layers} that attend to all tokens"
            )
        made = [cls(**options) for _ in range(layers)]
        for layer, own in zip(made, chosen, strict=True):
            layer.whole = own
        return made

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add a call's keys and values, return what its attention sees, and drop what is far."""
        rows, heads = key_states.shape[:2]
        if heads != self.key_heads:
            raise ParameterError(f"heads: they are those of {self.key_heads} key heads, not {heads}")
        if self.order is None:
            self.lazy_initialization(key_states, value_states)
            order = [*self.whole, *(head for head in range(heads) if head not in self.whole)]
            shared = torch.tensor(order, device=key_states.device).expand(rows, -1)
            self.part(key_states, value_states, shared, len(self.whole))
        else:
            self.append(key_states, value_states)
        found = self.together("keys"), self.together("values")
        self.seen += key_states.shape[-2]
        with torch.no_grad():
            self._drop()
        return found

    def near(self, name: str) -> Tensor:
        """Return what attention sees in near heads, the mean of what was dropped first."""
        near = super().near(name)
        return torch.cat((self.held[f"mean {name}"].to(near.dtype), near), dim=-2) if self.far else near

    def _drop(self) -> None:
        """Put what is neither sink nor recent into the mean."""
        most = self.sinks + max(self.window, part(self.seen, self.share))
        extra = self.seen - self.far - most
        if extra <= 0:
            return
        for name in ("keys", "values"):
            near = self.held[f"near {name}"]
            far = near[:, :, self.sinks : self.sinks + extra].float().sum(-2, keepdim=True)
            if self.far:
                far = far + self.held[f"mean {name}"] * self.far
            self.held[f"mean {name}"] = far / (self.far + extra)
            self.held[f"near {name}"] = torch.cat((near[:, :, : self.sinks], near[:, :, self.sinks + extra :]), dim=-2)
        self.far += extra
