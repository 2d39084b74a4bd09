"""A prompt with images, whose tokens are merged before a language model reads them."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...errors import ParameterError, UnsupportedError, did_you_mean
from .aim import aim
from .holitom import holitom
from .merge import merge_tokens

__all__ = ["merged_prompt"]

_INSIDE = ("tome", "pitome")
_METHODS = ("aim", "holitom", *_INSIDE)
_LLAVA = "LlavaForConditionalGeneration"
_QWEN = ("Qwen2VLForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration")
_INPUTS = {"input_ids", "attention_mask", "pixel_values"}
_QWEN_INPUTS = {"image_grid_thw", "pixel_values_videos", "video_grid_thw", "second_per_grid_ts", "mm_token_type_ids"}


@dataclass(frozen=True)
class _Left:
    """What is left of one image or video: features [n, d], their places among its tokens [n], and how many those were."""

    features: Tensor
    places: Tensor
    tokens: int


@dataclass(frozen=True)
class _How:
    method: str
    keep: float | None
    r: int | None
    ratio: float | None

    def inside(self, encoder: Any) -> Any:
        """Return the context in which an encoder merges, which gives None if it does not."""
        if self.method not in _INSIDE:
            return nullcontext()
        return merge_tokens(encoder, self.method, r=self.r, ratio=self.ratio)

    def behind(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Return what is left of the frames of one image or video, [frames, tokens, d], and its places in all of them."""
        frames, tokens = features.shape[:2]
        if self.method == "holitom":
            video = holitom(features) if self.keep is None else holitom(features, self.keep)
            return video.features, video.frames * tokens + video.places
        images = aim(features) if self.keep is None else aim(features, self.keep)
        first = torch.arange(0, frames * tokens, tokens, device=features.device)
        return images.features.flatten(0, 1), (images.places + first[:, None]).flatten()


def merged_prompt(
    model: Any,
    inputs: Mapping[str, Any],
    method: str = "aim",
    *,
    keep: float | None = None,
    r: int | None = None,
    ratio: float | None = None,
) -> dict[str, Tensor]:
    """Return what `generate` takes instead of a prompt with images, with fewer tokens for each image.

        prompt = merged_prompt(model, processor(images=image, text=text, return_tensors="pt"), "aim", keep=0.25)
        model.generate(**prompt, max_new_tokens=50)   # returns new tokens alone

    The images are encoded, their features are merged, and the embeddings of the prompt get one row for each feature that is
    left. With Qwen-VL each keeps the position of its frame, row and column, and the text behind an image the position that
    it had; elsewhere the positions of what is left follow each other.

    Args:
        model: LlavaForConditionalGeneration (for `tome` and `pitome` with an encoder of CLIP or SigLIP),
            Qwen2VLForConditionalGeneration or Qwen2_5_VLForConditionalGeneration of transformers; Qwen-VL needs
            transformers 5.
        inputs: What the model's processor returns for one prompt.
        method: `aim` (behind the encoder, within each image or frame), `holitom` (behind the encoder, videos of Qwen-VL
            alone), `tome` or `pitome` (within the encoder).
        keep: For `aim` and `holitom`, the share of the features that stays; the default is that of the method.
        r: For `tome` and `pitome`: as for `merge_tokens`.
        ratio: The same.

    Raises:
        ParameterError: The method or an option is not valid, or the prompt has not as many places as there are features.
        UnsupportedError: The model, or something in the inputs, is not supported.
    """
    how = _checked(method, keep, r, ratio)
    name = type(model).__name__
    if name != _LLAVA and name not in _QWEN:
        raise UnsupportedError(
            f"merged_prompt: models of class {name} are not supported; {', '.join((_LLAVA, *_QWEN))} are"
        )
    given = {key: value for key, value in inputs.items() if value is not None}
    if other := sorted(given.keys() - _INPUTS - (_QWEN_INPUTS if name in _QWEN else set())):
        raise UnsupportedError(f"merged_prompt: {', '.join(other)}: this input of {name} is not supported")
    tokens = given.get("input_ids")
    if tokens is None or tokens.shape[0] != 1:
        raise UnsupportedError(
            "merged_prompt: input_ids must hold one prompt; others are left with other numbers of tokens"
        )
    if "attention_mask" in given and not bool(given["attention_mask"].all()):
        raise UnsupportedError("merged_prompt: the prompt is padded; give it alone")
    with torch.no_grad():
        return (_qwen if name in _QWEN else _llava)(model, given, how)


def _checked(method: str, keep: float | None, r: int | None, ratio: float | None) -> _How:
    if method not in _METHODS:
        hint = did_you_mean(method, _METHODS)
        raise ParameterError(f"method: {method!r} merges no tokens of a prompt.{hint} {', '.join(_METHODS)} do")
    if method in _INSIDE and keep is not None:
        raise ParameterError(f"keep: {method} merges within the encoder; give r or ratio")
    if method not in _INSIDE and (r is not None or ratio is not None):
        raise ParameterError(f"r, ratio: {method} merges behind the encoder; give keep")
    return _How(method, keep, r, ratio)


def _llava(model: Any, given: dict[str, Any], how: _How) -> dict[str, Tensor]:
    """Return the prompt of LLaVA, whose images all have the same number of tokens, at positions that follow each other."""
    if how.method == "holitom":
        raise UnsupportedError(
            "merged_prompt: holitom merges the frames of a video; only those of Qwen-VL are supported"
        )
    if how.method in _INSIDE and not isinstance(model.config.vision_feature_layer, int):
        raise UnsupportedError(f"merged_prompt: {how.method}: this model reads features of several layers; use aim")
    images = []
    if "pixel_values" in given:
        with how.inside(model.model.vision_tower) as merging:
            found = model.model.get_image_features(given["pixel_values"])
        features = list(found if isinstance(found, (Tensor, list, tuple)) else found.pooler_output)
        images = [_Left(*how.behind(each[None]), len(each)) for each in features if not merging]
        if merging:
            classes = model.config.vision_feature_select_strategy == "default"
            tokens = int(merging.sizes[0].sum()) - classes
            # where positions follow each other, it is the number of places alone that counts
            images = [_Left(each, torch.arange(len(each), device=each.device), tokens) for each in features]
    return _embedded(model, given["input_ids"], {model.config.image_token_id: images})[0]


def _qwen(model: Any, given: dict[str, Any], how: _How) -> dict[str, Tensor]:
    """Return the prompt of Qwen-VL, whose images differ in size, with the positions of what is left."""
    if not hasattr(model, "_prepare_position_ids_for_generation"):
        raise UnsupportedError("merged_prompt: with Qwen-VL, generate takes positions from transformers 5 on alone")
    if how.method == "holitom" and "pixel_values" in given:
        raise UnsupportedError("merged_prompt: holitom merges the frames of a video; this prompt has images, too")
    kinds = {
        model.config.image_token_id: ("pixel_values", "image_grid_thw"),
        model.config.video_token_id: ("pixel_values_videos", "video_grid_thw"),
    }
    ids = given["input_ids"]
    found = {token: _images(model.model.visual, given, *keys, how) for token, keys in kinds.items()}
    result, keep = _embedded(model, ids, found)
    if bool(torch.isin(ids[0, -1], torch.tensor(list(kinds), device=ids.device))):
        raise ParameterError("input_ids: the prompt must end with text, whose position what is generated goes on from")
    types = sum((ids == token).long() * number for number, token in enumerate(kinds, 1))
    more = {key: given[key] for key in ("image_grid_thw", "video_grid_thw", "second_per_grid_ts") if key in given}
    positions = model.model.get_rope_index(ids, mm_token_type_ids=types, **more)[0][:, :, keep]
    count = torch.arange(positions.shape[-1], device=positions.device).expand(1, 1, -1)
    return {**result, "position_ids": torch.cat((count, positions))}


def _images(visual: Any, given: dict[str, Any], pixels: str, grids: str, how: _How) -> list[_Left]:
    """Return what is left of the images, or of the videos, of a prompt of Qwen-VL."""
    if (pixels in given) != (grids in given):
        raise ParameterError(f"{pixels}, {grids}: a prompt has both or none")
    if pixels not in given:
        return []
    grid = given[grids]
    with how.inside(visual) as merging:
        output = visual(given[pixels].type(visual.dtype), grid_thw=grid)
    counts = (grid.prod(-1) // visual.spatial_merge_size**2).tolist()
    features, images, start = output.pooler_output, [], 0
    if merging:
        for count in counts:
            own = (merging.places >= start) & (merging.places < start + count)
            images.append(_Left(features[own], merging.places[own] - start, count))
            start += count
        return images
    for frames, own in zip(grid[:, 0].tolist(), features.split(counts), strict=True):
        images.append(_Left(*how.behind(own.unflatten(0, (frames, -1))), len(own)))
    return images


def _embedded(model: Any, ids: Tensor, found: dict[int, list[_Left]]) -> tuple[dict[str, Tensor], Tensor]:
    """Return embeddings with the features that are left, and which tokens of the prompt stay, shape [tokens]."""
    places = torch.isin(ids, torch.tensor(list(found), device=ids.device))
    embeddings = model.get_input_embeddings()(ids.masked_fill(places, 0))[0]
    keep = ~places[0]
    for token, images in found.items():
        own, total = (ids[0] == token).nonzero().flatten(), sum(each.tokens for each in images)
        if total != len(own):
            raise ParameterError(
                f"input_ids: the prompt has {len(own)} places for features of images, and there are {total}"
            )
        for image, at in zip(images, torch.split(own, [each.tokens for each in images]), strict=True):
            keep[at[image.places]] = True
            embeddings[at[image.places]] = image.features.to(embeddings.dtype)
    mask = torch.ones(1, int(keep.sum()), dtype=torch.long, device=ids.device)
    return {"inputs_embeds": embeddings[None, keep], "attention_mask": mask}, keep
