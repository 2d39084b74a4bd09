"""Experts in a model of transformers: attention and MLPs of all tasks compute, and their outputs are summed with weights.

BAM: Zhang et al., "BAM! Just Like That: Simple and Efficient Parameter Upcycling for Mixture of Experts", 2024,
arXiv:2408.08274, sections 4.1 and 4.2.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ....errors import UnsupportedError
from ...libraries import cache_utils
from .experts import ROLES, Changes, expert_of, find_modules, with_shared_keys
from .routing import Routing, cache_in
from .settings import GateSettings

__all__ = ["ExpertModules"]

_FILLED = "_merganser_experts"
"""Attribute of a cache: whose keys and values it holds."""


@dataclass(frozen=True)
class _Place:
    """A module in whose place experts compute.

    Args:
        site: Its name.
        plain: What the shared model computes there.
        experts: Modules of all tasks.
    """

    site: str
    plain: Any
    experts: Sequence[Any]


class ExpertModules(Routing):
    """The attention and the MLPs of a model that have experts, and their gates.

    Each expert of an attention has its own layer in the key-value cache, or all have one where keys are shared.

    Args:
        model: A causal language model of transformers; the `forward` of its modules is replaced, its weights stay as they are.
        changes: Tensors of the tasks.
        settings: What gates read, and how scores become weights.
        tasks: Number of tasks.

    Raises:
        UnsupportedError: Models of this type have no experts here.
    """

    def __init__(self, model: Any, changes: Changes, settings: GateSettings, tasks: int) -> None:
        modules = find_modules(model, settings.where)
        super().__init__(model, settings, tasks)
        self._depth = int(model.config.num_hidden_layers)
        attention = {site: module for site, module in modules.items() if _role(site) == "attention"}
        if settings.keys == "shared":
            changes = with_shared_keys(changes, attention)
        held: dict[int, Tensor] = {}
        for site, module in modules.items():
            own = {name.removeprefix(f"{site}."): each for name, each in changes.items() if name.startswith(f"{site}.")}
            if not own:
                continue
            experts = [expert_of(module, {leaf: each[task] for leaf, each in own.items()}) for task in range(tasks)]
            place = _Place(site, module.forward, experts)
            module.forward = partial(self._attend if site in attention else self._feed, place)
            self.widths[site] = int(model.config.hidden_size)
            self.count += 1
            for each in own.values():
                held |= {id(change): change for change in _tensors(each)}
        self.nbytes: int = sum(each.numel() * model.dtype.itemsize for each in held.values())
        """Bytes of the experts' tensors, without those that are the shared model's."""
        self._attends = any(_role(site) == "attention" for site in self.widths)
        self._met: Any = None

    def _top(self, site: str) -> int | None:
        """Return how many weights of a site stay; None for all."""
        return self.settings.top if self.settings.top_where in ("all", _role(site)) else None

    def _begin(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Look at what is passed to the model, and at its cache."""
        super()._begin(module, args, kwargs)
        self._met = cache_in(args, kwargs)
        if self._met is not None and self._attends:
            self._meet(self._met)

    def _end(self, module: Any, args: tuple[Any, ...], output: Any) -> None:
        """Let go of the cache."""
        super()._end(module, args, output)
        self._met = None

    def _chosen(self) -> tuple[int, ...]:
        """Return the experts that compute; none of them where the shared model's own module does."""
        if self.told is None:
            return tuple(range(self.tasks))
        return tuple(self.told.nonzero().flatten().tolist())

    def _weights(self, site: str, x: Tensor) -> Tensor:
        """Return the weights of the experts for each token, shape [rows, length, tasks], float32."""
        return self._decide(site, self._scores_of(site, x).view(*self._running().mask.shape, self.tasks))

    def _attend(self, place: _Place, /, *args: Any, **kwargs: Any) -> Any:
        """Compute in place of an attention."""
        x = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        self._show(place.site, x)
        cache = cache_in((), kwargs)
        if cache is not self._met and cache is not None:
            # the model has made it in this call
            self._meet(cache, new=True)
            self._met = cache
        if self.told is not None:
            # the only one has the layer of the cache that the shared model would have
            chosen = self._chosen()
            return (place.experts[chosen[0]] if chosen else place.plain)(*args, **kwargs)
        weights = self._weights(place.site, x)
        total: Any = 0
        maps = []
        shared = _SharedKeys(cache)
        for task, expert in enumerate(place.experts):
            view = shared if self.settings.keys == "shared" else _OwnKeys(cache, task * self._depth)
            given = {name: view if each is cache and cache is not None else each for name, each in kwargs.items()}
            output, scores = expert(*args, **given)[:2]
            total = total + output * weights[..., task : task + 1]
            maps.append(scores)
        # asked for attention weights, a layer has the heads of all experts, one after the other
        return total.to(x.dtype), torch.cat(maps, 1) if all(isinstance(each, Tensor) for each in maps) else None

    def _feed(self, place: _Place, /, x: Tensor) -> Tensor:
        """Compute in place of an MLP; an expert computes the tokens for which it has a weight."""
        self._show(place.site, x)
        if self.told is not None:
            chosen = self._chosen()
            found: Tensor = (place.experts[chosen[0]] if chosen else place.plain)(x)
            return found
        weights = self._weights(place.site, x)
        flat, shares = x.reshape(-1, x.shape[-1]), weights.reshape(-1, self.tasks)
        total = flat.new_zeros(flat.shape, dtype=torch.promote_types(x.dtype, shares.dtype))
        for task, expert in enumerate(place.experts):
            rows = shares[:, task].nonzero().flatten()
            # while gates are trained, they must learn what the others would have given
            if len(rows) == len(flat) or shares.requires_grad:
                total = total + expert(x).reshape(flat.shape) * shares[:, task : task + 1]
            elif len(rows):
                own = expert(flat[rows].unsqueeze(0)).squeeze(0) * shares[rows, task : task + 1]
                total = total.index_add(0, rows, own.to(total.dtype))
        return total.view(x.shape).to(x.dtype)

    def _meet(self, cache: Any, *, new: bool = False) -> None:
        """Make room for the keys of all experts in a cache.

        Args:
            cache: The cache.
            new: Whether all that it holds is of this call.

        Raises:
            UnsupportedError: It is of another kind, or holds the keys of others.
        """
        holds = self._chosen()
        if not new and cache.get_seq_length():
            if getattr(cache, _FILLED, None) != holds:
                raise UnsupportedError(
                    "the cache holds the keys of another task, or of another model; only what began it can go on with it"
                )
            return
        utils = cache_utils()
        fits = isinstance(cache, utils.DynamicCache) and {type(each) for each in cache.layers} <= {
            utils.DynamicLayer,
            utils.DynamicSlidingWindowLayer,
        }
        if not fits:
            raise UnsupportedError(
                f"experts need a cache of the kind DynamicCache, which generate makes by default; this is {type(cache).__name__}"
            )
        if cache.offloading:
            raise UnsupportedError("experts need a cache that is not offloaded to the memory of the CPU")
        setattr(cache, _FILLED, holds)
        # a cache that was made without a config gets its layers when they are used
        if self.settings.keys == "own" and len(holds) > 1 and len(cache.layers) == self._depth:
            for _ in range(self.tasks - 1):
                cache.layers.extend(map(_emptied, cache.layers[: self._depth]))


def _role(site: str) -> str:
    return ROLES[site.rpartition(".")[2]]


def _tensors(changes: Sequence[Any]) -> list[Tensor]:
    each = [change if isinstance(change, tuple) else (change,) for change in changes if change is not None]
    return [tensor for own in each for tensor in own]


def _emptied(layer: Any) -> Any:
    """Return an empty layer of a cache like another one."""
    if not layer.is_sliding:
        return type(layer)()
    made = type(layer)(sliding_window=layer.sliding_window)
    if getattr(layer, "record_past", False):
        made.activate_past_recording()
    return made


class _OwnKeys:
    """The cache as one expert sees it: its layers follow those of the experts before it."""

    def __init__(self, cache: Any, shift: int) -> None:
        self._cache, self._shift = cache, shift

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Add keys and values, and return what attention sees."""
        return self._cache.update(keys, values, layer_idx + self._shift, *args, **kwargs)


class _SharedKeys:
    """The cache as all experts of a layer see it: what the first one adds is what all of them see."""

    def __init__(self, cache: Any) -> None:
        self._cache = cache
        self._held: Any = None

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Add keys and values the first time, and return what attention sees."""
        if self._held is None:
            self._held = self._cache.update(keys, values, layer_idx, *args, **kwargs)
        return self._held
