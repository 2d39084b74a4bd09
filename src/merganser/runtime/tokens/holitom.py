"""HoliTom: what stays the same over the frames of a video is merged, then what is alike within them (Shao et al. 2025)."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from ...errors import ParameterError
from ..merging import highest
from ..options import at_least, exact, in_range, part

__all__ = ["VideoTokens", "holitom", "segments"]


@dataclass(frozen=True)
class VideoTokens:
    """The tokens that are left of a video, in the order of frames, then places.

    Attributes:
        features: Shape [n, d].
        frames: The frame of each; of a token that is the same over several frames, the first. Shape [n], int64.
        places: The place of each within its frame; of a merged token, that of its centre. Shape [n], int64.
        sizes: How many tokens each stands for. Shape [n], int64.
        segments: The first and the last frame of each segment.
    """

    features: Tensor
    frames: Tensor
    places: Tensor
    sizes: Tensor
    segments: tuple[tuple[int, int], ...]


def holitom(
    features: Tensor,
    keep: float = 0.1,
    *,
    similarity: float = 0.8,
    neighbours: int = 7,
    attention: Tensor | None = None,
    merged: float = 0.0,
) -> VideoTokens:
    """Merge the features of a video's frames, in time and then in space.

    Frames are cut into segments so that most tokens can go: a place whose cosines between neighbouring frames are all
    above `similarity` becomes one token per segment, the mean over its frames. Of the tokens of a frame that are left,
    and of those of a segment, a share stays as centres (density peaks of the k nearest neighbours), and every other one
    is merged into the nearest, by a plain mean. The share is that which leaves `keep` of all tokens. With `attention`,
    the most attended tokens of each frame stay as they are, and all but `merged` of that frame's share are such.

    Differs from the paper:
        The merging before the language model only; the paper merges within it, too. Ties between equal tokens are broken
        by place, where the authors' code adds noise; a segment keeps at least one of its tokens that stay the same.

    Args:
        features: Features of the frames of one video, without class tokens: shape [frames, tokens, d].
        keep: Share of all tokens that stays, above 0 and up to 1, up to rounding in every frame and segment.
        similarity: Least cosine of tokens that are the same, from -1 to 1.
        neighbours: Nearest tokens, itself among them, whose distances give a token's density.
        attention: What each token is attended to in its frame, shape [frames, tokens]. Without it, all of the tokens that
            do not stay are merged into centres, and sizes add up.
        merged: With `attention`, the share of a frame's tokens that are centres, from 0 to 1; the tokens that are neither
            attended nor merged are dropped, so with 0, the authors' default, all others of that frame are.

    Raises:
        ParameterError: A shape is another one, or an option is out of range.
    """
    _check(features, keep, similarity, merged, attention)
    at_least("neighbours", neighbours, 1)
    count, tokens = features.shape[:2]
    same = cosine_similarity(features[:-1].float(), features[1:].float(), dim=-1) > similarity
    cuts, saved = segments(same)
    share = min(exact(keep) * count * tokens / (count * tokens - saved), Fraction(1))
    rows: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    for first, last in cuts:
        still = (
            same[first:last].all(0) if last > first else torch.zeros(tokens, dtype=torch.bool, device=features.device)
        )
        places = torch.arange(tokens, device=features.device)
        found = [
            (
                frame,
                *_moving(features[frame, ~still], places[~still], share, neighbours, attention, frame, still, merged),
            )
            for frame in range(first, last + 1)
        ]
        mean = features[first : last + 1, still].float().mean(0).to(features.dtype)
        static = _clustered(mean, places[still], max(1, round(int(still.sum()) * share)), neighbours)
        found.append((first, static[0], static[1], static[2] * (last - first + 1)))
        rows += [(own, torch.full_like(at, frame), at, size) for frame, own, at, size in found]
    joined = [torch.cat(each) for each in zip(*rows, strict=True)]
    order = (joined[1] * tokens + joined[2]).argsort(stable=True)
    left, frames, at, sizes = (each[order] for each in joined)
    return VideoTokens(left, frames, at, sizes, tuple(cuts))


def segments(same: Tensor) -> tuple[list[tuple[int, int]], int]:
    """Cut a video so that the most tokens go, and return the first and last frame of each segment and that number.

    A segment of n frames in which m places stay the same throughout saves m (n - 1) tokens.

    Args:
        same: Whether each place is the same in a frame and the next, shape [frames - 1, tokens], bool.
    """
    frames = len(same) + 1
    best, start = [0] * (frames + 1), [0] * (frames + 1)
    # best[e]: the most that the first e frames save; a segment reaches back as far as anything stays the same
    for end in range(1, frames + 1):
        best[end], start[end] = best[end - 1], end - 1
        still = torch.ones(same.shape[1], dtype=torch.bool, device=same.device)
        for begin in range(end - 2, -1, -1):
            still = still & same[begin]
            count = int(still.sum())
            if not count:
                break
            if best[begin] + count * (end - 1 - begin) > best[end]:
                best[end], start[end] = best[begin] + count * (end - 1 - begin), begin
    cuts, end = [], frames
    while end:
        cuts.append((start[end], end - 1))
        end = start[end]
    return cuts[::-1], best[frames]


def _moving(
    own: Tensor,
    places: Tensor,
    share: Fraction,
    neighbours: int,
    attention: Tensor | None,
    frame: int,
    still: Tensor,
    merged: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return features, places and sizes of what stays of a frame's tokens that are not the same in the next."""
    count = part(len(own), share, up=True)
    if attention is None:
        return _clustered(own, places, count, neighbours)
    attended = round(count * (1 - exact(merged)))
    chosen = highest(attention[frame, ~still], attended).sort().values
    rest = torch.ones(len(own), dtype=torch.bool, device=own.device).scatter(0, chosen, False)
    if count == attended:
        return own[chosen], places[chosen], torch.ones_like(chosen)
    centres = _clustered(own[rest], places[rest], count - attended, neighbours)
    stays = own[chosen], places[chosen], torch.ones_like(chosen)
    features, at, sizes = (torch.cat(pair) for pair in zip(stays, centres, strict=True))
    return features, at, sizes


def _clustered(own: Tensor, places: Tensor, count: int, neighbours: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return means of tokens around `count` centres, the centres' places, and sizes."""
    if not count or not len(own):
        return own[:0], places[:0], places[:0]
    # without products of matrices the distances are symmetric to the bit, and ties are ties
    exact = "donot_use_mm_for_euclid_dist"
    distance = torch.cdist(own.float(), own.float(), compute_mode=exact) / own.shape[-1] ** 0.5
    nearest = distance.topk(min(neighbours, count), largest=False).values
    density = (-nearest.square().mean(-1)).exp()
    before = torch.arange(len(own), device=own.device)
    denser = (density > density[:, None]) | ((density == density[:, None]) & (before < before[:, None]))
    parent = distance.masked_fill(~denser, float(distance.max())).amin(-1)
    centres = (parent * density).argsort(descending=True, stable=True)[:count].sort().values
    target = distance[:, centres].argmin(-1)
    # a centre is its own, also where another centre is equal to it
    target[centres] = torch.arange(count, device=own.device)
    sizes = torch.zeros(count, dtype=torch.int64, device=own.device).scatter_add(0, target, torch.ones_like(target))
    sums = torch.zeros(count, own.shape[-1], device=own.device).index_add(0, target, own.float())
    return (sums / sizes[:, None]).to(own.dtype), places[centres], sizes


def _check(features: Tensor, keep: float, similarity: float, merged: float, attention: Tensor | None) -> None:
    if features.dim() != 3 or not features.shape[0] or not features.shape[1]:
        raise ParameterError(f"features: must have the shape [frames, tokens, d], not {list(features.shape)}")
    in_range("keep", keep, 0, 1, above=True)
    in_range("similarity", similarity, -1, 1, what="cosine")
    in_range("merged", merged, 0, 1)
    if attention is not None and attention.shape != features.shape[:2]:
        raise ParameterError(
            f"attention: must have the shape {list(features.shape[:2])} of frames and tokens, not {list(attention.shape)}"
        )
    if attention is None and merged:
        raise ParameterError("merged: says what is merged beside attended tokens, and needs attention")
