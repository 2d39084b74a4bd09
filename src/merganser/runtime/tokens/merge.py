"""The context in which the vision encoder of a model merges tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from . import qwen
from .encoder import TokenMerging, installed, parts
from .plan import Plan, chosen
from .qwen import CellMerging

__all__ = ["merge_tokens"]


@contextmanager
def merge_tokens(
    model: Any, method: str = "tome", *, r: int | Sequence[int] | None = None, ratio: float | None = None
) -> Iterator[TokenMerging | CellMerging]:
    """Let the vision encoder of one model merge tokens between attention and MLP of every layer.

        with merge_tokens(model, r=8) as merging:
            features = model(pixel_values).pooler_output

    A merged token is the mean of its patches; attention, also that which pools, adds the logarithm of a token's size to
    its logits, so equal patches count as often as they are there. `last_hidden_state` has fewer tokens, in the order of
    the patches that they are named after.

    Qwen-VL's encoders make one token of each cell of 2 x 2 patches at their end, so there whole cells are merged: those
    of one window with each other (Qwen2.5-VL), or of one frame (Qwen2-VL). `r` and `ratio` count the cells of each window
    or frame, and `pooler_output` has a row for every cell that is left; `merging.places` says which those are.

    Args:
        model: CLIPModel, CLIPVisionModel, CLIPVisionModelWithProjection, SiglipModel, SiglipVisionModel,
            Qwen2VisionTransformerPretrainedModel or Qwen2_5_VisionTransformerPretrainedModel (`model.model.visual` of
            Qwen-VL) of transformers, whose attention is eager or sdpa.
        method: `tome` or `pitome`.
        r: Tokens that go in every layer, or one number per layer; never more than half of the tokens.
        ratio: Instead of r, the share of tokens that stays in every layer.

    Raises:
        ParameterError: The method or a number is not valid.
        UnsupportedError: The model is another one, or already merges tokens.
    """
    choose = chosen(method)
    if qwen.fits(model):
        cells = CellMerging(choose, Plan(r, ratio, len(model.blocks)), model)
        with qwen.installed(model, cells):
            yield cells
        return
    encoder, _, first = parts(model)
    merging = TokenMerging(choose, Plan(r, ratio, len(encoder.layers)), first, len(encoder.layers))
    with installed(model, merging):
        yield merging
