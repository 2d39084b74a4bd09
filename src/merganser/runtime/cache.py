"""The cache that `generate` takes: layers that merge entries, and hooks that give them queries and masks."""

from __future__ import annotations

import copy
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
from .window import WindowLayer

__all__ = ["MergedCache", "check_model"]

# their attention was compared with what is recomputed here
_MODELS = ("llama", "mistral", "qwen2", "qwen3")
# each kind of layer has rotary positions of its own
_MIXED = ("gemma3_text",)
_ATTENTION = ("eager", "sdpa")


class MergedCache(cache_utils().Cache):  # type: ignore[misc]
    """A key-value cache of bounded size, for one model.

        cache = MergedCache("kvmerger", model, budget=256)
        model.generate(**inputs, past_key_values=cache)

    A call sees all of its own tokens and what the cache held before; then each layer is compressed. Positions are those of
    the tokens seen. Until the budget is reached, tokens and logits are those of the model's own cache. Layers with a sliding
    window hold what that sees, as in the model's own cache; the methods are for the layers that attend to all tokens.

    Args:
        method: Name of a method; `LAYERS` has them.
        model: A causal language model of transformers of type llama, mistral, qwen2, qwen3 or gemma3_text, whose attention
            is eager or sdpa. It gets hooks, which act for calls with this cache alone, and go with the cache or `close`.
        options: Those of the method: `budget`, `sinks`, `window` and others.

    Raises:
        ParameterError: The method, or an option, is unknown or out of range.
        UnsupportedError: The model has other attention than these methods are right for. Calls raise it where rows of a
            batch are padded, their number changes, positions do not follow each other, or decoding goes back (assisted
            decoding).
    """

    def __init__(self, method: str, model: Any, **options: Any):
        if not isinstance(method, str) or method not in LAYERS:
            raise ParameterError(
                f"method: {method!r} is not a cache.{did_you_mean(method, LAYERS)} There are {', '.join(sorted(LAYERS))}"
            )
        kind = LAYERS[method]
        _check_options(method, kind, options)
        windows = check_model(method, model)
        _check_windows(method, windows)
        self.method = method
        whole = iter(kind.build(windows.count(None), options))
        super().__init__(layers=[next(whole) if each is None else WindowLayer(each) for each in windows])
        self._install(model)

    def _install(self, model: Any) -> None:
        self._announced: set[int] = set()
        self._model = weakref.ref(model)
        self._finalizer = weakref.finalize(self, _remove, _hooks(self, model))

    def __deepcopy__(self, memo: dict[int, Any]) -> MergedCache:
        """Return a cache of the same model that goes on from the same tokens, with hooks of its own."""
        model = self._model()
        if model is None or not self._finalizer.alive:
            raise UnsupportedError(f"{self.method}: this cache was closed, or its model is gone; it cannot be copied")
        # a layer may hold a part of the model, which is not copied
        memo.update((id(each), each) for each in (*model.modules(), *model.parameters()))
        made = copy.copy(self)
        made.layers = copy.deepcopy(self.layers, memo)
        made._install(model)
        return made

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
                f"{method}: {name!r} is not an option.{did_you_mean(name, known)} There are {', '.join(known)}"
            )
    for name, each in known.items():
        if each.default is each.empty and name not in options:
            raise ParameterError(f"{method}: {name} is missing")


def check_model(method: str, model: Any, *, windows: bool = True) -> list[int | None]:
    """Refuse a model whose attention is not that of Llama, and return the window of each layer, None without one.

    Args:
        method: What begins messages.
        model: The model.
        windows: Whether layers may have a sliding window.

    Raises:
        UnsupportedError: It is another one.
    """
    config = getattr(model, "config", None)
    name = getattr(config, "model_type", None)
    known = (*_MODELS, *_MIXED) if windows else _MODELS
    if name not in known:
        raise UnsupportedError(
            f"{method}: models of type {name or type(model).__name__!r} are not supported; {', '.join(known)} are"
        )
    if not hasattr(getattr(model, "base_model", None), "layers"):
        raise UnsupportedError(
            f"{method}: {type(model).__name__} wraps a model; give the model of transformers within it, in peft "
            "model.get_base_model()"
        )
    layers, sliding = cache_utils().DynamicCache(config=config).layers, cache_utils().DynamicSlidingWindowLayer
    kinds = (cache_utils().DynamicLayer, *([sliding] if windows else []))
    others = {type(each).__name__ for each in layers if type(each) not in kinds}
    if others or getattr(config, "use_bidirectional_attention", False):
        raise UnsupportedError(
            f"{method}: the model has layers {'' if windows else 'with a sliding window or '}without causal attention "
            f"({', '.join(sorted(others)) or 'use_bidirectional_attention'}); only layers that attend to all tokens before "
            f"them{' or to the last ones' if windows else ''} are supported"
        )
    _check_attention(method, config)
    return [each.sliding_window if type(each) is sliding else None for each in layers]


def _check_windows(method: str, windows: list[int | None]) -> None:
    """Refuse a model of which nothing is left to compress."""
    if None not in windows:
        raise UnsupportedError(
            f"{method}: all layers of the model have a sliding window, so its own cache does not grow; use that"
        )
    if method == "minicache" and windows.count(None) < len(windows):
        raise UnsupportedError(
            f"{method}: the model has layers with a sliding window; pairs of layers that attend to all tokens must be next to "
            "each other"
        )


def _check_attention(method: str, config: Any) -> None:
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
            _check_attention(own.method, module.config)
            _check_call(own, _tokens(args, kwargs), kwargs)

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
    # its name from transformers 5.24 on is `cache`
    return next((kwargs[name] for name in ("past_key_values", "cache") if kwargs.get(name) is not None), None)


def _tokens(args: Any, kwargs: dict[str, Any]) -> Tensor:
    """Return the tokens of a call, or their embeddings: shape [batch, new, ...]."""
    given = (args[0] if args else None, kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
    found: Tensor = next(each for each in given if each is not None)
    return found


def _remove(handles: list[Any]) -> None:
    for handle in handles:
        handle.remove()


def _check_call(cache: MergedCache, tokens: Tensor, kwargs: dict[str, Any]) -> None:
    """Refuse a call that a compressed cache would answer wrongly."""
    rows, new = tokens.shape[:2]
    held, seen = cache.layers[0].rows(), cache.get_seq_length()
    if held not in (0, rows):
        raise UnsupportedError(
            f"{cache.method}: the cache holds {held} {'row' if held == 1 else 'rows'}, and this call has {rows}; repeat or "
            "choose rows with batch_repeat_interleave or batch_select_indices, or begin with reset"
        )
    _check_mask(cache.method, kwargs.get("attention_mask"), seen + new)
    positions = kwargs.get("position_ids")
    if isinstance(positions, Tensor):
        expected = torch.arange(seen, seen + positions.shape[-1], device=positions.device)
        if not bool((positions == expected).all()):
            raise UnsupportedError(
                f"{cache.method}: positions must go on from the {seen} tokens seen, one by one, in every row"
            )


def _check_mask(method: str, mask: Any, tokens: int) -> None:
    if mask is None:
        return
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        raise UnsupportedError(f"{method}: attention masks other than one number per token are not supported")
    if not bool(mask.all()):
        raise UnsupportedError(
            f"{method}: rows are padded, and a compressed cache no longer knows where; use texts of equal length, or a batch "
            "of one"
        )
    if mask.shape[1] != tokens:
        raise UnsupportedError(
            f"{method}: the attention mask is for {mask.shape[1]} tokens, and with those of this call {tokens} were seen; "
            "leave it out, or give one number for each"
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
