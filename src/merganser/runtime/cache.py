"""The cache that `generate` takes: layers that merge, and hooks that tell them what they must know."""

from __future__ import annotations

import inspect
import weakref
from typing import Any

import torch
from torch import Tensor

from ..errors import ParameterError, UnsupportedError, did_you_mean
from .attention import causal_mask, queries_of
from .caches import LAYERS
from .layer import RunningLayer
from .libraries import cache_utils

__all__ = ["MergedCache", "check_model"]

# their attention was compared with what is recomputed here
_MODELS = ("llama", "mistral", "qwen2", "qwen3")
_ATTENTION = ("eager", "sdpa")


class MergedCache(cache_utils().Cache):  # type: ignore[misc]
    """A key-value cache of bounded size, for one model.

        cache = MergedCache("kvmerger", model, budget=256)
        model.generate(**inputs, past_key_values=cache)

    A call sees all of its own tokens and what the cache held before; then each layer is compressed. Positions are those of
    the tokens seen. Until the budget is reached, tokens and logits are those of the model's own cache.

    Args:
        method: Name of a method; `LAYERS` has them.
        model: A causal language model of transformers of type llama, mistral, qwen2 or qwen3, whose attention is eager
            or sdpa. It gets hooks, which act for calls with this cache alone, and go with the cache or `close`.
        options: Those of the method: `budget`, `sinks`, `window` and others.

    Raises:
        ParameterError: The method, or an option, is unknown or out of range.
        UnsupportedError: The model has other attention than these methods are right for. Calls raise it where rows of a
            batch are padded, positions do not follow each other, or decoding goes back (assisted decoding).
    """

    def __init__(self, method: str, model: Any, **options: Any):
        if method not in LAYERS:
            raise ParameterError(
                f"method: {method!r} is no cache.{did_you_mean(method, LAYERS)} There are {', '.join(sorted(LAYERS))}"
            )
        kind = LAYERS[method]
        _check_options(method, kind, options)
        check_model(method, model)
        self.method = method
        super().__init__(layers=kind.build(model.config.num_hidden_layers, options))
        self._announced: set[int] = set()
        self._handles = _hooks(self, model)
        self._finalizer = weakref.finalize(self, _remove, self._handles)

    def close(self) -> None:
        """Take the hooks out of the model; the cache can no longer be used."""
        self._finalizer()

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        """Add keys and values of a layer, and return what its attention sees."""
        if not self._finalizer.alive:
            raise UnsupportedError(f"{self.method}: this cache was closed")
        if layer_idx not in self._announced:
            raise UnsupportedError(f"{self.method}: this cache was made for another model; make one for each model")
        self._announced.discard(layer_idx)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)

    def stored_bytes(self) -> int:
        """Return the bytes that keys, values and what is held beside them take."""
        return sum(layer.stored_bytes() for layer in self.layers)

    def kept(self) -> list[int]:
        """Return the number of entries of each layer."""
        return [layer.kept() for layer in self.layers]


def _check_options(method: str, kind: type[RunningLayer], options: dict[str, Any]) -> None:
    known = inspect.signature(kind).parameters
    for name in options:
        if name not in known:
            raise ParameterError(
                f"{method}: {name!r} is no option.{did_you_mean(name, known)} There are {', '.join(known)}"
            )
    for name, each in known.items():
        if each.default is each.empty and name not in options:
            raise ParameterError(f"{method}: {name} is missing")


def check_model(method: str, model: Any) -> None:
    """Refuse a model whose attention is not that of Llama over all tokens.

    Raises:
        UnsupportedError: It is another one; `method` begins the message.
    """
    config = getattr(model, "config", None)
    name = getattr(config, "model_type", None)
    if name not in _MODELS:
        raise UnsupportedError(
            f"{method}: models of type {name or type(model).__name__!r} are not supported; {', '.join(_MODELS)} are"
        )
    if not hasattr(getattr(model, "base_model", None), "layers"):
        raise UnsupportedError(
            f"{method}: {type(model).__name__} wraps a model; give the model of transformers within it, in peft "
            "model.get_base_model()"
        )
    layer, library = cache_utils().DynamicLayer, cache_utils().DynamicCache
    others = {type(each).__name__ for each in library(config=config).layers if type(each) is not layer}
    if others:
        raise UnsupportedError(
            f"{method}: the model has layers with a sliding window or without attention ({', '.join(sorted(others))}); "
            "only layers that attend to all tokens are supported"
        )
    attention = getattr(config, "_attn_implementation", None)
    if attention not in _ATTENTION:
        raise UnsupportedError(
            f"{method}: attention {attention!r} is not supported; load the model with attn_implementation='sdpa'"
        )


def _hooks(cache: MergedCache, model: Any) -> list[Any]:
    """Register hooks that see the arguments of the model and of each attention module."""
    mine = weakref.ref(cache)

    def on_model(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        own = mine()
        if own is not None and _cache(kwargs) is own:
            _check_call(own, kwargs)

    def on_attention(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        own = mine()
        if own is None or _cache(kwargs) is not own:
            return None
        own._announced.add(module.layer_idx)
        return args, _prepared(own.layers[module.layer_idx], module, kwargs)

    decoder = model.base_model
    handles = [decoder.register_forward_pre_hook(on_model, with_kwargs=True)]
    handles += [layer.self_attn.register_forward_pre_hook(on_attention, with_kwargs=True) for layer in decoder.layers]
    return handles


def _cache(kwargs: dict[str, Any]) -> Any:
    return kwargs.get("past_key_values", kwargs.get("cache"))


def _remove(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()


def _check_call(cache: MergedCache, kwargs: dict[str, Any]) -> None:
    mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
    if isinstance(mask, dict) or (isinstance(mask, Tensor) and mask.dim() != 2):
        raise UnsupportedError(f"{cache.method}: attention masks other than one number per token are not supported")
    if isinstance(mask, Tensor) and not bool(mask.all()):
        raise UnsupportedError(
            f"{cache.method}: rows are padded, and a compressed cache no longer knows where; use texts of equal length, or a "
            "batch of one"
        )
    if isinstance(positions, Tensor):
        start = cache.get_seq_length()
        expected = torch.arange(start, start + positions.shape[-1], device=positions.device)
        if not bool((positions == expected).all()):
            raise UnsupportedError(
                f"{cache.method}: positions must go on from the {start} tokens seen, one by one, in every row"
            )


def _prepared(layer: RunningLayer, attention: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Give a layer the queries of a call, and return the call's arguments with the layer's mask."""
    hidden = kwargs["hidden_states"]
    new = hidden.shape[1]
    layer.meet(attention)
    with torch.no_grad():
        bias = layer.bias()
        if layer.queries_wanted():
            last = min(layer.queries_wanted(), new)
            layer.observe(queries_of(attention, hidden, kwargs["position_embeddings"], last), attention.scaling)
    if bias is None:
        return kwargs
    return {**kwargs, "attention_mask": causal_mask(new, bias, attention.num_key_value_groups, hidden.dtype)}
