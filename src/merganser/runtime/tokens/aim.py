"""AIM: similar features of an image are merged before a language model reads them (Zhong et al. 2025)."""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import ParameterError
from ..merging import fold, shares
from .tome import tome

__all__ = ["aim"]


def aim(features: Tensor, keep: float = 0.25) -> tuple[Tensor, Tensor]:
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

    Returns:
        The features that are left, [images, fewer, d], and how many tokens each stands for, int64.

    Raises:
        ParameterError: The features have another shape, or `keep` is out of range.
    """
    if features.dim() != 3:
        raise ParameterError(f"features: must have the shape [images, tokens, d], not {list(features.shape)}")
    if not isinstance(keep, (int, float)) or isinstance(keep, bool) or not 0 < keep <= 1:
        raise ParameterError(f"keep: must be a share above 0 and up to 1, not {keep!r}")
    least = -int(-features.shape[1] * keep // 1)
    sizes = torch.ones(features.shape[:2], dtype=torch.int64, device=features.device)
    while features.shape[1] > least:
        tokens = features.shape[1]
        gone, into = tome(features, min(tokens - least, tokens // 2), 0, 0.0)
        stays = torch.ones(features.shape[:2], dtype=torch.bool, device=features.device).scatter(1, gone, False)
        target = (stays.cumsum(1) - 1).gather(1, into)
        left = features[stays].reshape(len(features), -1, features.shape[-1])
        other = features.gather(1, gone[..., None].expand(-1, -1, features.shape[-1]))
        ones = torch.ones(left.shape[:2], device=features.device)
        own, shared = shares(ones, torch.ones(gone.shape, device=features.device), target)
        features = fold(left, other, own, shared, target)
        sizes = sizes[stays].reshape(len(sizes), -1).scatter_add(1, target, sizes.gather(1, gone))
    return features, sizes
