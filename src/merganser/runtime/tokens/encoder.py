"""A vision encoder whose layers merge tokens, within a context."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ...errors import ParameterError, UnsupportedError, did_you_mean
from ..merging import fold, shares
from .pitome import pitome
from .tome import tome

__all__ = ["Plan", "TokenMerging", "installed", "merge_tokens", "parts"]

_METHODS = {"tome": tome, "pitome": pitome}
_ELSEWHERE = {
    "tempme": "it joins the frames of a video: use merge_frames(model, frames=...)",
    "aim": "it merges what an encoder returns: use aim(features)",
    "holitom": "it merges what an encoder returns for the frames of a video: use holitom(features)",
}
# by name: each of these is one class of transformers, and others of the same families pool tokens in other ways
_CLIP = ("CLIPModel", "CLIPVisionModel", "CLIPVisionModelWithProjection")
_SIGLIP = ("SiglipModel", "SiglipVisionModel")
_ATTENTION = ("eager", "sdpa")


class TokenMerging:
    """What the merging of the latest images did.

    Attributes:
        sizes: Number of patches (and class tokens) in each token of the last layer, shape [batch, tokens], float32; they
            add up to the encoder's tokens. None before the first call.
        counts: Number of tokens behind each layer, which is the same for all images.
    """

    def __init__(self, method: str, plan: Plan, first: int, layers: int):
        self.sizes: Tensor | None = None
        self.counts: list[int] = []
        self._choose, self._plan, self._first, self._layers = _METHODS[method], plan, first, layers

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
        tokens = hidden.shape[1]
        gone, into = self._choose(metric, r, self._first, depth)
        stays = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device).scatter(1, gone, False)
        kept = torch.arange(tokens, device=hidden.device).expand_as(stays)[stays].reshape(len(hidden), -1)
        target = (stays.cumsum(1) - 1).gather(1, into)
        own, other = self.sizes.gather(1, kept), self.sizes.gather(1, gone)
        self.sizes = own.scatter_add(1, target, other)
        share, shared = shares(own, other, target)
        return fold(_rows(hidden, kept), _rows(hidden, gone), share, shared, target)


def _rows(hidden: Tensor, index: Tensor) -> Tensor:
    return hidden.gather(1, index[..., None].expand(-1, -1, hidden.shape[-1]))


class Plan:
    """How many tokens go in each layer: `r` of them, or all but the share `ratio`."""

    def __init__(self, r: int | Sequence[int] | None, ratio: float | None, layers: int):
        if (r is None) == (ratio is None):
            raise ParameterError(
                "r, ratio: give one of the two, the tokens that go or the share that stays in each layer"
            )
        if ratio is not None and not (isinstance(ratio, (int, float)) and 0 < ratio <= 1):
            raise ParameterError(f"ratio: must be a share above 0 and up to 1, not {ratio!r}")
        numbers = [] if r is None else [r] * layers if isinstance(r, int) else list(r)
        if any(not isinstance(each, int) or isinstance(each, bool) or each < 0 for each in numbers):
            raise ParameterError(f"r: must be a whole number of at least 0, or one per layer, not {r!r}")
        if ratio is None and len(numbers) != layers:
            raise ParameterError(f"r: the encoder has {layers} layers, and {len(numbers)} numbers were given")
        self.numbers, self.ratio = numbers, ratio

    def number(self, layer: int, tokens: int) -> int:
        """Return how many of a layer's tokens go."""
        return self.numbers[layer] if self.ratio is None else int(tokens - tokens * self.ratio)


@contextmanager
def merge_tokens(
    model: Any, method: str = "tome", *, r: int | Sequence[int] | None = None, ratio: float | None = None
) -> Iterator[TokenMerging]:
    """Let the vision encoder of one model merge tokens between attention and MLP of every layer.

        with merge_tokens(model, r=8) as merging:
            features = model(pixel_values).pooler_output

    A merged token is the mean of its patches; attention, also that which pools, adds the logarithm of a token's size to
    its logits, so equal patches count as often as they are there. `last_hidden_state` has fewer tokens, in the order of
    the patches that they are named after.

    Args:
        model: CLIPModel, CLIPVisionModel, CLIPVisionModelWithProjection, SiglipModel or SiglipVisionModel of
            transformers, whose attention is eager or sdpa.
        method: `tome` or `pitome`.
        r: Tokens that go in every layer, or one number per layer; never more than half of the tokens.
        ratio: Instead of r, the share of tokens that stays in every layer.

    Raises:
        ParameterError: The method or a number is not valid.
        UnsupportedError: The model is another one, or already merges tokens.
    """
    if method in _ELSEWHERE:
        raise ParameterError(f"method: {method!r} does not merge within each image; {_ELSEWHERE[method]}")
    if method not in _METHODS:
        raise ParameterError(f"method: {method!r} merges no tokens.{did_you_mean(method, _METHODS)} tome and pitome do")
    encoder, _, first = parts(model)
    merging = TokenMerging(method, Plan(r, ratio, len(encoder.layers)), first, len(encoder.layers))
    with installed(model, merging):
        yield merging


@contextmanager
def installed(model: Any, merging: TokenMerging) -> Iterator[None]:
    """Let the layers of a model's vision encoder, and the head that pools, ask `merging`."""
    encoder, head, _ = parts(model)

    def on_encoder(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        merging.begin(kwargs["inputs_embeds"] if "inputs_embeds" in kwargs else args[0])

    handles = [encoder.register_forward_pre_hook(on_encoder, with_kwargs=True)]
    if head is not None:
        handles.append(head.attention.register_forward_pre_hook(_pooling(merging, head.attention), with_kwargs=True))
    try:
        for layer in encoder.layers:
            layer.forward = _forward(layer, merging)
        yield
    finally:
        for layer in encoder.layers:
            layer.__dict__.pop("forward", None)
        for handle in handles:
            handle.remove()


def parts(model: Any) -> tuple[Any, Any, int]:
    """Return the encoder, the head that pools by attention if there is one, and the number of class tokens."""
    name = type(model).__name__
    if name not in (*_CLIP, *_SIGLIP):
        raise UnsupportedError(
            f"merge_tokens: models of class {name} are not supported; {', '.join((*_CLIP, *_SIGLIP))} are"
        )
    vision = getattr(model, "vision_model", model)
    attention = getattr(vision.config, "_attn_implementation", None)
    if attention not in _ATTENTION:
        raise UnsupportedError(
            f"merge_tokens: attention {attention!r} is not supported; load the model with attn_implementation='sdpa'"
        )
    if any("forward" in layer.__dict__ for layer in vision.encoder.layers):
        raise UnsupportedError("merge_tokens: the layers of this model were changed already, by merge_tokens or others")
    return vision.encoder, getattr(vision, "head", None), int(name in _CLIP)


def _forward(layer: Any, merging: TokenMerging) -> Any:
    """Return a layer's forward with merging between its attention and its MLP."""

    def forward(hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        if attention_mask is not None:
            raise UnsupportedError("merge_tokens: attention masks over patches are not supported")
        hidden_states = merging.enter(hidden_states)
        attention = layer.self_attn
        normed = layer.layer_norm1(hidden_states)
        bias = merging.bias()
        mask = None if bias is None else bias[:, None, None].to(normed.dtype)
        if mask is not None:
            mask = mask.expand(-1, -1, normed.shape[1], -1)
        hidden = hidden_states + attention(hidden_states=normed, attention_mask=mask, **kwargs)[0]
        keys = attention.k_proj(normed)
        metric = keys.reshape(*keys.shape[:2], attention.num_heads, -1).mean(2)
        hidden = merging.merge(hidden, metric)
        merged: Tensor = hidden + layer.mlp(layer.layer_norm2(hidden))
        return merged

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
