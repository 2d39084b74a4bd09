"""RazorAttention: heads that look far back keep everything, the others one token for all that is far (Tang et al. 2024)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...errors import ParameterError
from ..layer import RunningLayer, at_least

__all__ = ["RazorAttention"]


class RazorAttention(RunningLayer):
    """Keep all tokens of retrieval heads; of other heads sinks, the last tokens, and one for the N that are dropped.

        k^ = mean k,  v^ = mean v,  with the weight N exp(q k^) in the softmax

    The heads are found once per model by `find_retrieval_heads`. There is no budget: what is held grows with the text in
    retrieval heads, and in the others once `share` of the tokens is more than `window`. Keys and values of all heads are put
    together for each call, and exist as one tensor, with padding, in one layer at a time.

    Args:
        heads: What `find_retrieval_heads` returned, or `RetrievalHeads.load`.
        sinks: First tokens that stay in all heads.
        window: Least number of last tokens that stay in all heads.
        share: Share of all tokens that stay as last tokens in all heads, if that is more than `window`.
    """

    def __init__(self, *, heads: Any, sinks: int = 4, window: int = 4000, share: float = 0.2):
        super().__init__()
        self.sinks, self.window = at_least("sinks", sinks, 0), at_least("window", window, 1)
        if not isinstance(share, (int, float)) or not 0 <= share <= 1:
            raise ParameterError(f"share: must be a number from 0 to 1, not {share!r}")
        self.share, self.key_heads = share, getattr(heads, "key_heads", None)
        self.whole: Sequence[int] = ()

    @classmethod
    def build(cls, layers: int, options: dict[str, Any]) -> list[Any]:
        """Return the layers of a model's cache, each with its retrieval heads."""
        heads = options["heads"]
        chosen = getattr(heads, "layers", None)
        if chosen is None:
            raise ParameterError(f"heads: must be what find_retrieval_heads returns, not {type(heads).__name__}")
        if len(chosen) != layers:
            raise ParameterError(f"heads: they are those of {len(chosen)} layers, and the model has {layers}")
        made = [cls(**options) for _ in range(layers)]
        for layer, own in zip(made, chosen, strict=True):
            layer.whole = own
        return made

    def _clear(self) -> None:
        super()._clear()
        self.dropped = 0
        self.held: dict[str, Tensor] = {}

    def kept(self) -> int:
        """Return the entries that attention sees of the tokens so far, in the heads that have most."""
        return self.seen if self.whole or not self.dropped else self.seen - self.dropped + 1

    def bias(self) -> Tensor | None:
        """Return log N for the token that stands for the dropped ones, and what hides the padding before it."""
        if not self.dropped:
            return None
        keys = self.held["near keys"]
        rows, other = keys.shape[:2]
        bias = torch.zeros(rows, other + len(self.whole), self.kept(), device=keys.device)
        near = self._near(keys.device)
        first = self.kept() - (self.seen - self.dropped) - 1
        bias[:, near, :first] = float("-inf")
        bias[:, near, first] = math.log(self.dropped)
        return bias

    def _near(self, device: Any) -> Tensor:
        """Return the heads that drop tokens."""
        total = self.held["near keys"].shape[1] + len(self.whole)
        return torch.tensor([head for head in range(total) if head not in self.whole], dtype=torch.long, device=device)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add a call's keys and values, return what its attention sees, and drop what is far."""
        if key_states.shape[1] != self.key_heads:
            raise ParameterError(f"heads: they are those of {self.key_heads} key heads, not {key_states.shape[1]}")
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        length = self.kept() + key_states.shape[-2]
        whole = torch.tensor(self.whole, dtype=torch.long, device=key_states.device)
        near = torch.tensor([i for i in range(self.key_heads) if i not in self.whole], device=key_states.device).long()
        found = []
        for name, new in (("keys", key_states), ("values", value_states)):
            if self.whole:
                self._append(f"whole {name}", new[:, whole])
            self._append(f"near {name}", new[:, near])
            found.append(self._together(name, length, whole, near))
        self.seen += key_states.shape[-2]
        with torch.no_grad():
            self._drop()
        return found[0], found[1]

    def _append(self, name: str, new: Tensor) -> None:
        self.held[name] = torch.cat((self.held[name], new), dim=-2) if name in self.held else new

    def _together(self, name: str, length: int, whole: Tensor, near: Tensor) -> Tensor:
        """Return all heads, shape [batch, key heads, length, d]: near ones end with the last token."""
        some = self.held[f"near {name}"]
        if self.dropped:
            some = torch.cat((self.held[f"mean {name}"].to(some.dtype), some), dim=-2)
        result = some.new_zeros(some.shape[0], len(whole) + len(near), length, some.shape[-1])
        if self.whole:
            result[:, whole] = self.held[f"whole {name}"]
        result[:, near, length - some.shape[-2] :] = some
        return result

    def _drop(self) -> None:
        """Put what is neither sink nor recent into the mean."""
        most = self.sinks + max(self.window, int(self.share * self.seen))
        extra = self.seen - self.dropped - most
        if extra <= 0:
            return
        for name in ("keys", "values"):
            near = self.held[f"near {name}"]
            far = near[:, :, self.sinks : self.sinks + extra].float().sum(-2, keepdim=True)
            if self.dropped:
                far = far + self.held[f"mean {name}"] * self.dropped
            self.held[f"mean {name}"] = far / (self.dropped + extra)
            self.held[f"near {name}"] = torch.cat((near[:, :, : self.sinks], near[:, :, self.sinks + extra :]), dim=-2)
        self.dropped += extra

    def _held(self) -> dict[str, Tensor]:
        return self.held

    def _rows(self, change: Any) -> None:
        self.held = {name: change(each) for name, each in self.held.items()}
