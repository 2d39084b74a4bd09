"""Which caches are compared, at equal bytes."""

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from merganser.runtime import LAYERS, MergedCache

from .prompts import Prompt

METHODS = sorted(name for name, layer in LAYERS.items() if "budget" in inspect.signature(layer).parameters)
"""Methods with a budget."""

POOLED = sorted(name for name in METHODS if "pool" in inspect.signature(LAYERS[name]).parameters)
"""Those that choose entries by scores, over which a maximum is taken."""

Make = Callable[[], MergedCache]


def budget(method: str, entries: int, width: int) -> int:
    """Entries that take the bytes of SnapKV's `entries`; `width` is the bytes of a key and a value."""
    beside = LAYERS[method](budget=99).first(torch.zeros(1, 1, 1, 1))
    return entries * width // (width + 4 * len(beside))


def width(model: Any) -> int:
    """Bytes of a key and a value of one head."""
    config = model.config
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * head * next(model.parameters()).element_size())


def caches(model: Any, entries: int, methods: Iterable[str], pools: Iterable[int] = ()) -> dict[str, Make]:
    """The whole cache, and methods with a budget at the bytes of SnapKV's `entries`; those with scores at other pools, too."""
    made: dict[str, Make] = {"whole": lambda: MergedCache("snapkv", model, budget=10**9)}
    for method in methods:
        own = budget(method, entries, width(model))
        made[method] = lambda method=method, own=own: MergedCache(method, model, budget=own)
        for pool in pools if method in POOLED else ():
            made[wide(method, pool)] = lambda method=method, own=own, pool=pool: MergedCache(
                method, model, budget=own, pool=pool
            )
    return made


class Field:
    """The caches of a comparison.

    Args:
        model: A causal language model.
        entries: Entries of SnapKV per layer and head.
        methods: Methods with a budget.
        free: Caches without a budget, by name. Each is set beside a SnapKV that takes as many bytes behind the prompt.
        pools: Further widths of the maximum over neighbours. Each is set beside the same method at its default.
    """

    def __init__(
        self, model: Any, entries: int, methods: Iterable[str], free: dict[str, Make], pools: Sequence[int] = ()
    ):
        self.model = model
        methods = sorted({*methods, "snapkv"})
        self.bounded = caches(model, entries, methods, pools)
        self.narrow = {wide(method, pool): method for method in methods for pool in pools}
        self.free = free

    def at(self, prompt: Prompt) -> dict[str, Make]:
        """All of them for one prompt, with the SnapKV that is as large as each cache without a budget."""
        made = {**self.bounded, **self.free}
        # layers with a sliding window hold the same in all caches
        beside = sum(each.stored_bytes() for each in prompt.windows.values())
        entry = len(prompt.layers) * self.model.config.num_key_value_heads * width(self.model)
        for name, make in self.free.items():
            entries = (prompt.into(make()).stored_bytes() - beside) // entry
            made[rival(name)] = lambda entries=entries: MergedCache("snapkv", self.model, budget=max(entries, 37))
        return made

    def against(self, name: str) -> str:
        """The cache of equal bytes that a cache is compared with."""
        return rival(name) if name in self.free else self.narrow.get(name, "snapkv")


def wide(method: str, pool: int) -> str:
    """The name of a method at another pool."""
    return f"{method}, pool {pool}"


def rival(name: str) -> str:
    """The name of the SnapKV that takes the bytes of a cache without a budget."""
    return f"snapkv at the bytes of {name}"
