"""MiniCache: two layers next to each other share the directions of their keys and values (Liu et al. 2024)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..layer import RunningLayer, taken
from ..merging import highest
from ..options import at_least, in_range, part

__all__ = ["MiniCache"]


class MiniCache(RunningLayer):
    """Store one direction for two layers, and their lengths; the pairs that are least alike are stored as they are.

        e = sin((1 - t) W) / sin W * a / |a| + sin(t W) / sin W * b / |b|,   W: the angle between a and b
        a is restored as |a| e, b as |b| e

    a and b are keys, or values, of a token in a layer and in the next. From layer `start` on, layers are taken in pairs;
    those before, and a last one without a partner, are whole. There is no budget: all tokens stay, in fewer bytes.

    Differs from the paper:
        The paper keeps apart the tokens whose similarity is in the lowest `retained` of its range, which may be any
        number of them; here they are that share of a call's tokens, per head, so that all heads keep as many. A token
        that is generated alone is never kept apart.

    Args:
        t: Where between the two layers the direction is, from 0 to 1.
        retained: Share of a call's tokens that is kept as it is, from 0 to 1.
        start: First layer of the first pair; half of the layers by default.
    """

    def __init__(self, *, t: float = 0.6, retained: float = 0.05, start: int | None = None):
        super().__init__()
        for name, value in (("t", t), ("retained", retained)):
            in_range(name, value, 0, 1)
        self.pair: tuple[_Shared, _Shared] | None = None
        self.upper = False

    @classmethod
    def build(cls, layers: int, options: dict[str, Any]) -> list[Any]:
        """Return the layers of a model's cache, in pairs from `start` on."""
        start = options.get("start")
        start = layers // 2 if start is None else at_least("start", start, 0)
        made = [cls(**options) for _ in range(layers)]
        for lower, upper in zip(made[start::2], made[start + 1 :: 2], strict=False):
            shared = [_Shared(options.get("t", 0.6), options.get("retained", 0.05)) for _ in range(2)]
            lower.pair = upper.pair = (shared[0], shared[1])
            upper.upper = True
        return made

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add a call's keys and values, and return all of this layer, restored; the upper layer of a pair merges."""
        self.seen += key_states.shape[-2]
        if self.pair is None:
            keys, values = super().update(key_states, value_states, *args, **kwargs)
            return keys, values
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        found = []
        for shared, new in zip(self.pair, (key_states, value_states), strict=True):
            past = shared.restored(int(self.upper))
            found.append(new if past is None else torch.cat((past, new), dim=-2))
            with torch.no_grad():
                shared.add(new, upper=self.upper)
        return found[0], found[1]

    def kept(self) -> int:
        """Return the number of tokens."""
        return super().kept() if self.pair is None else self.pair[0].length()

    def _held(self) -> dict[str, Tensor]:
        if self.pair is None:
            return super()._held()
        if self.upper:
            return {}
        return {f"{i} {name}": each for i in (0, 1) for name, each in self.pair[i].tensors.items()}

    def _rows(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.pair is None:
            super()._rows(change)
        elif not self.upper:
            for shared in self.pair:
                shared.tensors = {name: change(each) for name, each in shared.tensors.items()}

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        for shared in self.pair or ():
            shared.tensors, shared.pending = {}, None


class _Shared:
    """Keys, or values, of two layers: one direction per token, a length per layer, and some tokens as they are.

    `tensors` holds directions [batch, heads, tokens, d]; lengths 0 and 1 [batch, heads, tokens]; which tokens are kept
    apart [batch, heads, n], and what they are in both layers [batch, heads, n, d].
    """

    def __init__(self, t: float, retained: float):
        self.t, self.retained = t, retained
        self.tensors: dict[str, Tensor] = {}
        self.pending: Tensor | None = None

    def length(self) -> int:
        return self.tensors["direction"].shape[-2] if self.tensors else 0

    def restored(self, layer: int) -> Tensor | None:
        """Return what is stored of a layer, 0 or 1: shape [batch, heads, tokens, d]."""
        if not self.tensors:
            return None
        all_ = self.tensors["direction"] * self.tensors[f"length {layer}"][..., None]
        apart = self.tensors["apart"][..., None].expand(-1, -1, -1, all_.shape[-1])
        return all_.scatter(-2, apart, self.tensors[f"exact {layer}"])

    def add(self, new: Tensor, *, upper: bool) -> None:
        """Take the lower layer's tokens of a call, then the upper layer's, and merge them."""
        if not upper:
            self.pending = new
            return
        assert self.pending is not None
        lower, self.pending = self.pending, None
        direction, cosine = between(lower.float(), new.float(), self.t)
        apart = highest(-cosine, part(new.shape[-2], self.retained))
        added = {
            "direction": direction.to(new.dtype),
            "length 0": lower.float().norm(dim=-1).to(new.dtype),
            "length 1": new.float().norm(dim=-1).to(new.dtype),
            "exact 0": taken(lower, apart),
            "exact 1": taken(new, apart),
            "apart": apart + self.length(),
        }
        old = self.tensors
        self.tensors = {name: torch.cat((old[name], each), dim=2) if old else each for name, each in added.items()}


def between(a: Tensor, b: Tensor, t: float) -> tuple[Tensor, Tensor]:
    """Return directions between those of `a` and `b`, on the great circle, and the cosines of their angles."""
    smallest = torch.finfo(a.dtype).tiny
    a, b = a / a.norm(dim=-1, keepdim=True).clamp(min=smallest), b / b.norm(dim=-1, keepdim=True).clamp(min=smallest)
    cosine = (a * b).sum(-1)
    # the angle from both chords, since the arc cosine loses small angles
    angle = 2 * torch.atan2((a - b).norm(dim=-1), (a + b).norm(dim=-1))
    sine = angle.sin()
    # almost equal or opposite: the formula divides by 0
    flat = sine < 1e-4
    sine = sine.masked_fill(flat, 1.0)
    first = torch.where(flat, 1.0, ((1 - t) * angle).sin() / sine)
    second = torch.where(flat, 0.0, (t * angle).sin() / sine)
    return first[..., None] * a + second[..., None] * b, cosine
