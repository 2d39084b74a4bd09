"""SkillPacks: low-rank task vectors, whose less important singular vectors are stored in fewer bits."""

from collections.abc import Iterator
from typing import Annotated, Literal

import torch
from torch import Tensor

from ..method import (
    Count,
    Embeddings,
    Encoded,
    Fraction,
    Kept,
    Lossless,
    Number,
    Part,
    PerModel,
    Scale,
    Sidecar,
    Weight,
    default,
    merge_method,
)
from ..ops import check_total, deltas, leading, pack_codes, packed_size, rank_of, unpack_codes, weighted_sum

Ranks = Annotated[int, Number(0, search=(0, 64))]

_CLIPS = [1.0 - 0.05 * step for step in range(13)]


def from_base(origin: str) -> bool:
    """Return whether restoring needs the base."""
    return origin == "base"


def widths(rank: int, ranks_16bit: int, ranks_8bit: int, ranks_4bit: int) -> Iterator[tuple[int, int, int]]:
    """Yield each bit width, with the start and end of the range of singular vectors that are stored in it."""
    start = 0
    for bits, count in ((16, ranks_16bit), (8, ranks_8bit), (4, ranks_4bit), (2, rank)):
        end = min(start + count, rank)
        if end > start:
            yield bits, start, end
        start = end


def quantise(vectors: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor]:
    """Round vectors to the nearest of 2^bits evenly spaced levels, symmetric about 0, in groups of entries.

    The step of each group has the smallest squared error among several: the widest, which reaches the largest entry,
    and smaller ones, which clip.

    Args:
        vectors: Shape [k, m].
        bits: Bits of a code.
        group: Number of entries of a vector that share a step.

    Returns:
        Codes, shape [k, m], int32, and steps, shape [k, ceil(m / group)], exactly representable in bfloat16.
    """
    k, m = vectors.shape
    padded = torch.nn.functional.pad(vectors, (0, -m % group)).view(k, -1, group)
    inside = torch.nn.functional.pad(torch.ones_like(vectors), (0, -m % group)).view(k, -1, group)
    half = (2**bits - 1) / 2
    # slightly wider, so that rounding the step to bfloat16 does not clip the largest entry
    widest = padded.abs().amax(dim=2) / half * (1 + 2.0**-8)
    best = torch.full_like(widest, torch.inf)
    steps = torch.zeros_like(widest)
    codes = torch.zeros_like(padded)
    for clip in _CLIPS:
        step = (widest * clip).bfloat16().to(vectors.dtype).unsqueeze(2)
        divisor = torch.where(step > 0, step, 1.0)
        tried = (padded / divisor + half).round().clamp(0, 2 * half)
        error = (inside * ((tried - half) * step - padded)).square().sum(dim=2)
        better = error < best
        best, steps = torch.where(better, error, best), torch.where(better, step.squeeze(2), steps)
        codes = torch.where(better.unsqueeze(2), tried, codes)
    return codes.view(k, -1)[:, :m].to(torch.int32), steps


def restore_vectors(codes: Tensor, steps: Tensor, bits: int, group: int) -> Tensor:
    """Return the vectors that codes and steps of `quantise` stand for, shape [k, m]."""
    m = codes.shape[1]
    values: Tensor = (codes - (2**bits - 1) / 2) * steps.repeat_interleave(group, dim=1)[:, :m]
    return values


def parts(
    shape: tuple[int, ...], rank: Tensor, ranks_16bit: int, ranks_8bit: int, ranks_4bit: int, group: int
) -> dict[str, Part]:
    """Declare what is stored for a task and a matrix: singular values, and codes and steps of singular vectors."""
    k = rank_of(shape, rank)
    declared = {"values": Part((k,), "float32")}
    for side, size in zip(("left", "right"), shape, strict=True):
        bits = list(widths(k, ranks_16bit, ranks_8bit, ranks_4bit))
        declared[side] = Part((sum(packed_size((end - start) * size, b) for b, start, end in bits),), "uint8")
        declared[f"{side}_steps"] = Part((k, -(-size // group)), "bfloat16")
    return declared


def encode(
    base: Tensor,
    models: list[Tensor],
    merged: Tensor,
    *,
    origin: Literal["base", "merged"] = "base",
    rank: Fraction = default(0.25),
    ranks_16bit: Ranks = 0,
    ranks_8bit: Ranks = 20,
    ranks_4bit: Ranks = 180,
    group: Count = 128,
    others: Kept = "own",
    embeddings: Embeddings = "others",
) -> Encoded:
    """Return the quantised singular triplets of the difference between each model and the origin."""
    encoded: dict[str, list[Tensor]] = {name: [] for name in ("values", "left", "left_steps", "right", "right_steps")}
    start = base if from_base(origin) else merged
    k = rank_of(base.shape, rank)
    for model in models:
        left, values, right = leading(model - start, k)
        encoded["values"].append(values)
        for side, vectors in (("left", left.T), ("right", right.T)):
            codes, steps = (
                [vectors.new_zeros(0, dtype=torch.uint8)],
                [vectors.new_zeros(0, -(-vectors.shape[1] // group))],
            )
            for bits, first, end in widths(k, ranks_16bit, ranks_8bit, ranks_4bit):
                code, step = quantise(vectors[first:end], bits, group)
                codes.append(pack_codes(code, bits))
                steps.append(step)
            encoded[side].append(torch.cat(codes))
            encoded[f"{side}_steps"].append(torch.cat(steps))
    return dict(encoded)


def factors(
    shape: tuple[int, ...],
    values: Tensor,
    left: Tensor,
    left_steps: Tensor,
    right: Tensor,
    right_steps: Tensor,
    ranks_16bit: int,
    ranks_8bit: int,
    ranks_4bit: int,
    group: int,
) -> tuple[Tensor, Tensor]:
    """Return the decoded factors of the difference from the origin, shapes [rows, k] and [k, columns]."""
    k = len(values)
    sides = []
    for size, packed, steps in zip(shape, (left, right), (left_steps, right_steps), strict=True):
        vectors, at = [steps.new_zeros(0, size)], 0
        for bits, first, end in widths(k, ranks_16bit, ranks_8bit, ranks_4bit):
            nbytes = packed_size((end - first) * size, bits)
            codes = unpack_codes(packed[at : at + nbytes], bits, (end - first) * size).view(-1, size)
            vectors.append(restore_vectors(codes, steps[first:end], bits, group))
            at += nbytes
        sides.append(torch.cat(vectors))
    return sides[0].T * values, sides[1]


def decode(
    base: Tensor | None,
    merged: Tensor,
    values: Tensor,
    left: Tensor,
    left_steps: Tensor,
    right: Tensor,
    right_steps: Tensor,
    origin: str,
    ranks_16bit: int,
    ranks_8bit: int,
    ranks_4bit: int,
    group: int,
) -> Tensor:
    """Return the origin plus the decoded low-rank difference."""
    start = merged if base is None or not from_base(origin) else base
    stored = (values, left, left_steps, right, right_steps)
    low_rank = factors(merged.shape, *stored, ranks_16bit, ranks_8bit, ranks_4bit, group)
    return start + low_rank[0] @ low_rank[1]


@merge_method(
    family="sidecars",
    cite="du2025graftllm",
    validate=check_total,
    sidecar=Sidecar(
        parts,
        encode,
        decode,
        scope="matrix",
        base=from_base,
        matrices=True,
        lossless=Lossless({"rank": 1.0, "ranks_16bit": 1 << 20, "embeddings": "matrix"}, tolerance=3e-5),
        factors=factors,
    ),
)
def skillpack(
    base: Tensor, models: list[Tensor], *, weight: PerModel[Weight] = default(1.0), lambda_: Scale = default(1.0)
) -> Tensor:
    """Average the task vectors, and store each of them in low rank and few bits.

        merged  = base + lambda * sum_i weight_i * delta_i / sum_i weight_i,   delta_i = model_i - base

    For each matrix of each model its leading singular vectors are stored, the first in more bits than the last:

        delta_i ~ U diag(s) V^T of rank k = floor(rank * min(rows, columns))
        model_i ~ base + Q(U) diag(s) Q(V)^T,   Q: nearest of 2^bits levels, in groups of entries

    Use when:
        Large changes from long training should be stored, more accurately than by signs, at a tenth to a fifth of a
        copy.

    Args:
        weight: Share of each task vector in the merged model; restoring does not depend on it.
        lambda_: Factor of the average; restoring does not depend on it.
        origin: What is subtracted from the models: the base, as in the paper, or the merged model; then restoring does
            not need the base.
        rank: Stored rank, as a share of the full one. The authors keep 1000 of 4096 in attention, 1400 in feed-forward
            layers; filters can set such ranks.
        ranks_16bit: Number of leading singular vectors in 16 bits.
        ranks_8bit: Number of the following ones in 8 bits.
        ranks_4bit: Number of the following ones in 4 bits; the rest is in 2 bits.
        group: Number of entries of a vector that share a step.
        embeddings: Whether embeddings and head are stored like the tensors that are not matrices, or compressed.

    Differs from the paper:
        Without data: entries are rounded to the nearest level, with the step of least squared error. The authors
        quantise by GPTQ, which needs the inputs of each layer and loses less at the same size.
        Levels are symmetric about 0, and a group lies along a singular vector.
        The authors also prune embedding and head by magnitude; here they are stored, or compressed like the rest.
        The merged model is an average; the paper has none, and grafts packs onto the base.
    """
    return base + lambda_ * (weighted_sum(deltas(base, models), weight) / weight.sum())
