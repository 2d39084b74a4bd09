"""Layers of which some key heads hold all tokens, and the others fewer."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..layer import RunningLayer

__all__ = ["UnevenLayer", "by_order"]


class UnevenLayer(RunningLayer):
    """A layer whose heads hold different numbers of entries, from when `part` says which.

    Whole heads hold the keys and values of all tokens; near ones hold fewer, the last of which is the last token. Both are
    in `held`, as "whole keys", "near keys" and so on. For each call they are put together, and exist as one tensor, with
    padding before what near heads hold, in one layer at a time.
    """

    def _clear(self) -> None:
        super()._clear()
        # key heads, whole ones first, shape [batch, key heads]; None before heads are parted
        self.order: Tensor | None = None
        self.held: dict[str, Tensor] = {}
        # tokens that the first entry of each near head stands for, beside its own entries
        self.far = 0

    def part(self, keys: Tensor, values: Tensor, order: Tensor, whole: int) -> None:
        """Take keys and values, and from now on hold heads apart: the first `whole` of `order`, and the others."""
        self.order = order
        for name, states in (("keys", keys), ("values", values)):
            states = by_order(states, order)
            self.held[f"whole {name}"] = states[:, :whole].contiguous()
            self.held[f"near {name}"] = states[:, whole:].contiguous()

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Add a call's keys and values to what all heads hold."""
        assert self.order is not None
        whole = self.held["whole keys"].shape[1]
        for name, new in (("keys", keys), ("values", values)):
            new = by_order(new, self.order)
            for part, some in (("whole", new[:, :whole]), ("near", new[:, whole:])):
                self.held[f"{part} {name}"] = torch.cat((self.held[f"{part} {name}"], some), dim=-2)

    def near(self, name: str) -> Tensor:
        """Return the keys or values that attention sees in near heads, shape [batch, near heads, entries, d]."""
        return self.held[f"near {name}"]

    def together(self, name: str) -> Tensor:
        """Return the keys or values of all heads in the model's order, shape [batch, key heads, entries, d]."""
        whole, near = self.held[f"whole {name}"], self.near(name)
        if whole.shape[1]:
            near = torch.cat((whole, pad(near, (0, 0, whole.shape[-2] - near.shape[-2], 0))), dim=1)
        return self._of_model(near)

    def kept(self) -> int:
        """Return the entries that attention sees of the tokens so far, in the heads that have most."""
        if self.order is None:
            return super().kept()
        return (self.held["whole keys"] if self.held["whole keys"].shape[1] else self.near("keys")).shape[-2]

    def bias(self) -> Tensor | None:
        """Return what hides the padding of near heads, and the logarithm of `far` for their first entries."""
        if self.order is None:
            return None
        near, whole = self.near("keys"), self.held["whole keys"].shape[1]
        padding = self.kept() - near.shape[-2]
        if not padding and not self.far:
            return None
        bias = torch.zeros(*self.order.shape, self.kept(), device=near.device)
        bias[:, whole:, :padding] = float("-inf")
        if self.far:
            bias[:, whole:, padding] = math.log(self.far)
        return self._of_model(bias)

    def _of_model(self, states: Tensor) -> Tensor:
        """Bring heads from `order` into the order of the model."""
        assert self.order is not None
        return by_order(states, self.order.argsort(-1))

    def _held(self) -> dict[str, Tensor]:
        return super()._held() if self.order is None else self.held

    def _rows(self, change: Callable[[Tensor], Tensor]) -> None:
        if self.order is None:
            super()._rows(change)
            return
        self.order = change(self.order)
        self.queries = None if self.queries is None else change(self.queries)
        self.held = {name: change(each) for name, each in self.held.items()}


def by_order(states: Tensor, order: Tensor) -> Tensor:
    """Return heads in another order for each row: states [batch, heads, ...], order [batch, heads]."""
    index = order.reshape(*order.shape, *[1] * (states.dim() - 2)).expand_as(states)
    return states.gather(1, index)
