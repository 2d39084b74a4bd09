"""AIM: similar features of an image are merged before a language model reads them (Zhong et al. 2025)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import ParameterError
from ..merging import absorb, added
from ..options import in_range, part
from .tome import tome

__all__ = ["ImageTokens", "aim"]


@dataclass(frozen=True)
class ImageTokens:
    """The tokens that are left of images, in the order of their places.

    Attributes:
        features: Shape [images, fewer, d].
        places: The place of each within its image; of a merged token, that of the one that others went into. Shape
            [images, fewer], int64.
        sizes: How many tokens each stands for. Shape [images, fewer], int64.
    """

    features: Tensor
    places: Tensor
    sizes: Tensor


def aim(features: Tensor, keep: float = 0.25) -> ImageTokens:
    """Merge the features of images, round by round, until a share of them is left.

    In each round tokens at even places look for the most similar one at an odd place, by the cosine of the features; of
    the most similar pairs, at most half of the tokens go. A token becomes the mean of itself and of those that went into
    it in this round, whatever they were the mean of.

    Differs from the paper:
        The merging before the language model only; the paper prunes tokens within it, too. Tokens stay in the order of
        their places, where the authors' code puts those that merged nothing first.

    Args:
        features: What an encoder or projector returned, without class tokens: shape [images, tokens, d].
        keep: Share of the tokens that stays, above 0 and up to 1; rounded up.

    Raises:
        ParameterError: The features have another shape, or `keep` is out of range.
    """
    if features.dim() != 3 or not features.shape[1]:
        raise ParameterError(f"features: must have the shape [images, tokens, d], not {list(features.shape)}")
    in_range("keep", keep, 0, 1, above=True)
    least = part(features.shape[1], keep, up=True)
    places = torch.arange(features.shape[1], device=features.device).expand(features.shape[:2])
    sizes = torch.ones_like(places)
    while features.shape[1] > least:
        tokens = features.shape[1]
        gone, into = tome(features, min(tokens - least, tokens // 2), 0, 0.0)
        features, kept, target = absorb(features, torch.ones(sizes.shape, device=sizes.device), gone, into)
        places, sizes = places.gather(1, kept), added(sizes, gone, kept, target)
    return ImageTokens(features, places, sizes)
