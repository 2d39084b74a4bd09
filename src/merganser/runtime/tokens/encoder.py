"""Vision encoders of CLIP and SigLIP, whose layers merge tokens within a context."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ...errors import UnsupportedError
from ..merging import absorb, added
from .plan import Choose, Plan

__all__ = ["QWEN", "TokenMerging", "check", "installed", "parts", "replaced_forwards"]

# by name: each of these is one class of transformers, and others of the same families pool tokens in other ways
_CLIP = ("CLIPModel", "CLIPVisionModel", "CLIPVisionModelWithProjection")
_SIGLIP = ("SiglipModel", "SiglipVisionModel")
QWEN = ("Qwen2VisionTransformerPretrainedModel", "Qwen2_5_VisionTransformerPretrainedModel")
_ATTENTION = ("eager", "sdpa")


class TokenMerging:
    """What the merging of the latest images did.

    Attributes:
        sizes: Number of patches (and class tokens) in each token of the last layer, shape [batch, tokens], float32; they
            add up to the encoder's tokens. None before the first call.
        counts: Number of tokens behind each layer, which is the same for all images.
    """

    def __init__(self, choose: Choose, plan: Plan, first: int, layers: int):
        self.sizes: Tensor | None = None
        self.counts: list[int] = []
        self._choose, self._plan, self._first, self._layers = choose, plan, first, layers

    def begin(self, hidden: Tensor) -> None:
        """Start with tokens of size 1, shape [batch, tokens, hidden size]."""
        self.sizes = torch.ones(hidden.shape[:2], device=hidden.device)
        self.counts = []

    def bias(self) -> Tensor | None:
        """Return the logarithms of the sizes, shape [batch, tokens], which attention adds to logits; None if all are 1."""
        return self.sizes.log() if self.sizes is not None and (self.sizes > 1).any() else None

    def enter(self, hidden: Tensor) -> Tensor:
        """Return the tokens that a layer gets, shape [batch, tokens, hidden size]."""
        return hidden

    def merge(self, hidden: Tensor, metric: Tensor) -> Tensor:
        """Return the tokens behind a layer's attention, merged: shape [batch, fewer tokens, hidden size]."""
        layer, tokens = len(self.counts), hidden.shape[1]
        r = min(self._plan.number(layer, tokens), (tokens - self._first) // 2)
        self.counts.append(tokens - r)
        return self._without(hidden, metric, r, layer / self._layers)

    def _without(self, hidden: Tensor, metric: Tensor, r: int, depth: float) -> Tensor:
        """Merge `r` tokens into others, and add up sizes."""
        assert self.sizes is not None
        if r == 0:
            return hidden
        gone, into = self._choose(metric, r, self._first, depth)
        hidden, kept, target = absorb(hidden, self.sizes, gone, into)
        self.sizes = added(self.sizes, gone, kept, target)
        return hidden


@contextmanager
def installed(model: Any, merging: TokenMerging) -> Iterator[None]:
    """Let the layers of a model's vision encoder, and the head that pools, ask `merging`."""
    encoder, head, _ = parts(model)

    def on_encoder(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        merging.begin(kwargs["inputs_embeds"] if "inputs_embeds" in kwargs else args[0])

    handles = [encoder.register_forward_pre_hook(on_encoder, with_kwargs=True)]
    if head is not None:
        handles.append(head.attention.register_forward_pre_hook(_pooling(merging, head.attention), with_kwargs=True))
    with replaced_forwards(encoder.layers, lambda layer: _forward(layer, merging), handles):
        yield


@contextmanager
def replaced_forwards(layers: Iterable[Any], make: Callable[[Any], Any], handles: Sequence[Any]) -> Iterator[None]:
    """Let layers run what `make` returns for each in place of their `forward`; at the end, undo that and remove hooks.

    Args:
        layers: Modules.
        make: Gets a layer, and returns its function.
        handles: Handles of the hooks that are removed at the end.
    """
    try:
        for layer in layers:
            layer.forward = make(layer)
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)
        for handle in handles:
            handle.remove()


def parts(model: Any, caller: str = "merge_tokens") -> tuple[Any, Any, int]:
    """Return the encoder, the head that pools by attention if there is one, and the number of class tokens."""
    name = type(model).__name__
    if name not in (*_CLIP, *_SIGLIP):
        every = (*_CLIP, *_SIGLIP) if caller != "merge_tokens" else (*_CLIP, *_SIGLIP, *QWEN)
        raise UnsupportedError(f"{caller}: models of class {name} are not supported; {', '.join(every)} are")
    vision = getattr(model, "vision_model", model)
    check(vision.config, vision.encoder.layers, caller)
    return vision.encoder, getattr(vision, "head", None), int(name in _CLIP)


def check(config: Any, layers: Any, caller: str) -> None:
    """Refuse an encoder with other attention, or one that was changed.

    Raises:
        UnsupportedError: It is one of these; `caller` begins the message.
    """
    attention = getattr(config, "_attn_implementation", None)
    if attention not in _ATTENTION:
        raise UnsupportedError(
            f"{caller}: attention {attention!r} is not supported; load the model with attn_implementation='sdpa'"
        )
    if any("forward" in layer.__dict__ for layer in layers):
        raise UnsupportedError(f"{caller}: the layers of this model were changed already, by merge_tokens or others")


def _forward(layer: Any, merging: TokenMerging) -> Any:
    """Return a layer's forward with merging between its attention and its MLP."""
    # CLIP's of transformers 4 get a second mask, and return a tuple
    tuples = "causal_attention_mask" in inspect.signature(type(layer).forward).parameters

    def forward(hidden_states: Tensor, attention_mask: Tensor | None = None, *masks: Any, **kwargs: Any) -> Any:
        if any(each is not None for each in (attention_mask, *masks)):
            raise UnsupportedError("merge_tokens: attention masks over patches are not supported")
        hidden_states = merging.enter(hidden_states)
        attention = layer.self_attn
        normed = layer.layer_norm1(hidden_states)
        bias = merging.bias()
        mask = None if bias is None else bias[:, None, None].to(normed.dtype)
        if mask is not None:
            mask = mask.expand(-1, -1, normed.shape[1], -1)
        attended, *weights = attention(hidden_states=normed, attention_mask=mask, **kwargs)
        hidden = hidden_states + attended
        keys = attention.k_proj(normed)
        metric = keys.reshape(*keys.shape[:2], attention.num_heads, -1).mean(2)
        hidden = merging.merge(hidden, metric)
        merged: Tensor = hidden + layer.mlp(layer.layer_norm2(hidden))
        return (merged, *weights) if tuples else merged

    return forward


def _pooling(merging: TokenMerging, attention: Any) -> Any:
    """Return a hook that adds the logarithms of sizes to the logits of a head's attention."""

    def hook(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        bias = merging.bias()
        if bias is None:
            return None
        mask = bias.to(args[0].dtype).repeat_interleave(attention.num_heads, dim=0)[:, None]
        return args, {**kwargs, "attn_mask": mask}

    return hook
