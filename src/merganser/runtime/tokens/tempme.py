"""TempMe: neighbouring frames of a video are joined, and what they share is merged (Shen et al. 2025)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ...errors import ParameterError, UnsupportedError
from ..options import at_least, in_range, part
from .encoder import QWEN, TokenMerging, installed, parts
from .plan import Plan
from .tome import tome

__all__ = ["FrameMerging", "merge_frames"]


class FrameMerging(TokenMerging):
    """What the merging of the latest videos did.

    Attributes:
        sizes: Number of patches (and class tokens) in each token of the last layer, shape [clips, tokens], float32.
        counts: Number of tokens of a clip behind each layer.
        clips: Number of clips of each video behind each layer.
    """

    def __init__(
        self, frames: int, joins: Mapping[int, int], across: float, within: float, r: int, start: tuple[int, int]
    ):
        first, layers = start
        super().__init__(tome, Plan(r, None, layers), first, layers)
        self.clips: list[int] = []
        self._frames, self._joins, self._across, self._within = frames, joins, across, within
        self._each = first

    def begin(self, hidden: Tensor) -> None:
        """Start with one clip per frame: shape [videos * frames, tokens, hidden size]."""
        if hidden.shape[0] % self._frames:
            raise UnsupportedError(
                f"merge_frames: {hidden.shape[0]} images are not videos of {self._frames} frames; give all frames of each "
                "video, one after the other"
            )
        super().begin(hidden)
        self.clips, self._first = [], self._each

    def enter(self, hidden: Tensor) -> Tensor:
        """Join clips before a layer that does, and merge across their frames by hidden states."""
        layer = len(self.counts)
        before = self.clips[-1] if self.clips else self._frames
        count = self._joins.get(layer, 1)
        self.clips.append(before // count)
        if count == 1:
            return hidden
        assert self.sizes is not None
        hidden = self._joined(hidden, count)
        self.sizes = self._joined(self.sizes[..., None], count)[..., 0]
        self._first *= count
        r = self._number(self._across, hidden.shape[1])
        return self._without(hidden, hidden, r, 0.0)

    def merge(self, hidden: Tensor, metric: Tensor) -> Tensor:
        """Return the tokens behind a layer's attention, merged by keys."""
        layer, tokens = len(self.counts), hidden.shape[1]
        if layer < min(self._joins):
            return super().merge(hidden, metric)
        r = self._number(self._within, tokens)
        self.counts.append(tokens - r)
        return self._without(hidden, metric, r, 0.0)

    def _number(self, share: float, tokens: int) -> int:
        return min(part(tokens, share), (tokens - self._first) // 2)

    def _joined(self, tokens: Tensor, count: int) -> Tensor:
        """Return the tokens of neighbouring clips as those of one: class tokens first, then patches clip by clip."""
        clips = tokens.reshape(-1, count, *tokens.shape[1:])
        classes, patches = clips[:, :, : self._first], clips[:, :, self._first :]
        return torch.cat((classes.flatten(1, 2), patches.flatten(1, 2)), dim=1)


@contextmanager
def merge_frames(
    model: Any,
    *,
    frames: int,
    joins: Mapping[int, int] | None = None,
    across: float = 0.3,
    within: float = 0.1,
    r: int = 2,
) -> Iterator[FrameMerging]:
    """Let the vision encoder of one model join the frames of videos from layer to layer, and merge their tokens.

        with merge_frames(model, frames=12) as merging:
            features = model(pixel_values).pooler_output   # a row per video; pixel_values has videos * frames images

    Before a layer l of `joins`, `joins[l]` neighbouring clips (frames at first) become one, and the share `across` of its
    tokens is merged by ToMe's matching of hidden states. Behind the attention of that and every later layer the share
    `within` is merged by keys. A merged token is the mean of its patches, and attention adds the logarithm of its size.
    With CLIP, class tokens are never merged, and `pooler_output` is the mean of them, each normalised by the model's last
    layer norm. SigLIP's head pools all tokens of a clip.

    Differs from the paper:
        The paper trains adapters and embeddings of frame positions beside the merging. Here nothing is trained, and a
        model that was not fine-tuned this way sees tokens of several frames without their order. The paper scales the
        projected class tokens to length 1 before it averages them.

    Args:
        model: As for `merge_tokens`.
        frames: Number of frames of each video.
        joins: How many clips become one before each layer, counted from 0; by default {L - 4: 2, L - 3: 2, L - 2: 3} for
            12 frames and L layers (the paper's), for other numbers of frames none, and it must be given.
        across: Share of a joined clip's tokens that goes when it is joined, from 0 to 0.5.
        within: Share of a clip's tokens that goes in that and all later layers, from 0 to 0.5.
        r: Tokens of each frame that go in every layer before the first that joins.

    Raises:
        ParameterError: An option is out of range, or `joins` does not divide the frames.
        UnsupportedError: The model is another one, or already merges tokens. Calls raise it where the images are not whole
            videos.
    """
    if type(model).__name__ in QWEN:
        raise UnsupportedError(
            "merge_frames: a token that stands for several frames has no place in the prompt of Qwen-VL, which gives each "
            "the position of its frame; use merge_tokens(model), and holitom(features) over the frames"
        )
    encoder, _, first = parts(model, "merge_frames")
    layers = len(encoder.layers)
    joins = _checked(frames, joins, layers)
    for name, share in (("across", across), ("within", within)):
        in_range(name, share, 0, 0.5)
    merging = FrameMerging(frames, joins, across, within, at_least("r", r, 0), (first, layers))
    kept: list[Tensor] = []
    handles = []
    if first:
        vision = getattr(model, "vision_model", model)
        handles.append(encoder.register_forward_hook(lambda *call: kept.append(call[-1].last_hidden_state)))
        handles.append(vision.post_layernorm.register_forward_hook(_mean_of_classes(kept, merging)))
    try:
        with installed(model, merging):
            yield merging
    finally:
        for handle in handles:
            handle.remove()


def _checked(frames: int, joins: Mapping[int, int] | None, layers: int) -> Mapping[int, int]:
    at_least("frames", frames, 2)
    if joins is None:
        if frames != 12 or layers < 4:
            raise ParameterError(
                "joins: give the layers that join clips, such as {8: 2, 9: 2}; the default is for 12 frames"
            )
        joins = {layers - 4: 2, layers - 3: 2, layers - 2: 3}
    if not isinstance(joins, Mapping) or not joins:
        raise ParameterError(f"joins: must say for at least one layer how many clips become one, not {joins!r}")
    for layer, count in joins.items():
        if at_least("joins: a layer", layer, 0) >= layers:
            raise ParameterError(f"joins: there is no layer {layer}; the encoder has {layers}")
        at_least(f"joins: layer {layer}", count, 2)
    if frames % math.prod(joins.values()):
        raise ParameterError(f"joins: {frames} frames cannot be joined by {' x '.join(map(str, joins.values()))}")
    return joins


def _mean_of_classes(kept: list[Tensor], merging: FrameMerging) -> Any:
    """Return a hook of the last layer norm that gives the mean of all class tokens of a clip."""

    def hook(module: Any, args: Any, output: Tensor) -> Tensor:
        classes = kept[-1][:, : merging._first]
        kept.clear()
        mean: Tensor = module.forward(classes).mean(1)
        return mean

    return hook
