"""Plan a reverse pass: which sums it will write, and what it takes beside the forward; no weights are read."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import nn

from ...checkpoint import DTYPE_BY_NAME
from ...statistics import LOSS, LOSSES, PREDICTIONS
from ..data.batches import Sample
from ..forward import internals
from ..forward.skeleton import Block, Skeleton
from ..output.writer import Sum
from ..sums.reducers import Gram
from .backward import outside_parameters
from .parameters import Part, block_parameters, likely_parts
from .run import LOSS_FILE, gradient_files
from .sums import ELEMENTWISE, PIECE, most_waiting, tables

__all__ = ["ReversePlan", "plan_reverse", "planned_sums"]

# gradients, sums of gradients and hidden states of a reverse pass
_FLOAT32, _FLOAT64 = 4, 8
# a block's forward has been counted; it is computed once more, and its reverse pass is twice as much
_BLOCK_WORK = 3
# the head is computed for the losses; with the gradients of what it received and of its weights that is three times as much
_HEAD_WORK, _HEAD_WORK_WITH_GRADIENTS = 1, 3
# logits, their softmax, its logarithm, and the gradient
_COPIES_OF_LOGITS = 4
# for every output of a matrix: itself, the activation computed from it, and the gradients of both
_COPIES_OF_OUTPUTS = 4

Sums = Mapping[tuple[str, str], Sum]
"""Sums by statistic and tensor; they have shapes, but no values."""


@dataclass(frozen=True, slots=True)
class ReversePlan:
    """What a reverse pass will do.

    Args:
        sums: The sums that each of its files will have.
        bytes_read: Bytes of the model's files that are read, once more after the forward.
        operations: Floating-point operations, without those of Gram matrices.
        gram_operations: Floating-point operations of Gram matrices.
        adding: Seconds that the sums over sequences take, by a short measurement.
        peak_memory: Largest memory of weights, gradients and sums, bytes.
        spool_bytes: Disk space for what all blocks returned and for gradients, bytes.
    """

    sums: Mapping[str, Sums]
    bytes_read: int
    operations: float
    gram_operations: float
    adding: float
    peak_memory: int
    spool_bytes: int

    @property
    def stored_bytes(self) -> int:
        """The size of all sums."""
        every = (own for sums in self.sums.values() for own in sums.values())
        return sum(DTYPE_BY_NAME[own.dtype].nbytes(math.prod(own.shape)) for own in every)


def planned_sums(skeleton: Skeleton, statistics: Sequence[str], sequences: int) -> dict[str, Sums]:
    """Return the sums of gradients that each file will have, the loss first.

    Tensors whose values turn out not to be in the model as they are stored will have none; that needs their values.

    Args:
        skeleton: The model.
        statistics: The statistics of gradients; if there are none, only the loss is summed.
        sequences: Number of sequences.
    """
    of_model = {
        (LOSS, ""): _sum((), "float64"),
        (PREDICTIONS, ""): _sum((), "int64"),
        (LOSSES, ""): _sum((sequences,), "float64"),
    }
    found: dict[str, Sums] = {LOSS_FILE: of_model}
    if statistics:
        files = gradient_files(len(skeleton.blocks))
        for file, block in zip(files, skeleton.blocks, strict=False):
            parts = likely_parts(skeleton, block.sources, block_parameters(block))
            found[file] = {
                **_elementwise(skeleton, parts, statistics),
                **(_grams(block, parts) if "gradient_gram" in statistics else {}),
            }
        parts = likely_parts(skeleton, skeleton.outside(head=True), outside_parameters(skeleton))
        found[files[-1]] = _elementwise(skeleton, parts, statistics)
    return found


def _elementwise(skeleton: Skeleton, parts: Mapping[str, Part], statistics: Sequence[str]) -> Sums:
    found: dict[tuple[str, str], Sum] = {}
    for source in parts:
        shape = skeleton.checkpoint.tensors[source].shape
        found |= {(name, source): _sum(shape, "float32") for name in ELEMENTWISE if name in statistics}
        found |= {("sensitivity", source): _sum((), "float64")} if "sensitivity" in statistics else {}
    return found


def _grams(block: Block, parts: Mapping[str, Part]) -> Sums:
    widths = _output_widths(block)
    return {
        ("gradient_gram", source): _sum(Gram.shape_of(widths[part.parameter]), Gram.stored_as)
        for source, part in parts.items()
        if part.parameter in widths and part.length is None and part.index is None
    }


def _sum(shape: Sequence[int], dtype: str) -> Sum:
    return Sum(tuple(shape), dtype, lambda: torch.zeros(tuple(shape)))


def _output_widths(block: Block) -> dict[str, int]:
    """Return the number of outputs of each matrix of a block, by the name of its parameter."""
    found: dict[str, int] = {}
    for kind, axis in internals.linear_classes().items():
        for name, module in block.module.named_modules():
            if isinstance(module, kind) and isinstance(module.weight, nn.Parameter):
                found[f"{block.name}.{name}.weight"] = module.weight.shape[1 - axis]
    return found


def plan_reverse(
    skeleton: Skeleton, statistics: Sequence[str], samples: Sequence[Sample], forward: float
) -> ReversePlan:
    """Plan the reverse pass of a model.

    Args:
        skeleton: The model.
        statistics: The statistics of gradients; if there are none, only the loss is computed.
        samples: The sequences.
        forward: Floating-point operations of its blocks' forward on them.
    """
    # otherwise a head that shares the embedding would be counted twice
    internals.tie(skeleton.model)
    head = skeleton.model.get_output_embeddings()
    tokens = sum(len(sample.stacks[-1].ids) for sample in samples)
    longest = max(len(sample.stacks[-1].ids) for sample in samples)
    width = int(getattr(skeleton.model.config.get_text_config(), "hidden_size", 0))
    of_head = 2.0 * head.weight.numel() * tokens
    logits = _FLOAT32 * _COPIES_OF_LOGITS * longest * int(head.weight.shape[0])
    outputs = sum(len(sample.stacks[block.stack].ids) for block in skeleton.blocks for sample in samples)
    spool = _FLOAT32 * width * outputs
    sums = planned_sums(skeleton, statistics, len(samples))
    outside = _numel(outside_parameters(skeleton))
    if not statistics:
        return ReversePlan(
            sums=sums,
            bytes_read=0,
            operations=_HEAD_WORK * of_head,
            gram_operations=0.0,
            adding=0.0,
            peak_memory=_FLOAT32 * outside + logits,
            spool_bytes=spool,
        )
    count = len(tables(statistics))
    of_outside = _FLOAT64 * count * outside + (most_waiting(outside) if count else 0)
    blocks = [_numel(block_parameters(block)) for block in skeleton.blocks]
    held = [
        _FLOAT32 * outside
        + (_FLOAT32 + _FLOAT64 * count) * own
        + (most_waiting(own) if count else 0)
        + _FLOAT32 * _formed(block)
        + _activations(block, longest)
        + _gram_bytes(sums[file])
        for own, block, file in zip(blocks, skeleton.blocks, gradient_files(len(blocks)), strict=False)
    ]
    # with the first block, what is outside the blocks gets the rest of its sums
    held[0] += of_outside
    # the rows of a table of tokens that every sequence uses
    rows = sum(len(own.ids) for each in samples for own in each.stacks)
    widths = [own.shape[0] for file in sums.values() for (kind, _), own in file.items() if kind == "gradient_gram"]
    return ReversePlan(
        sums=sums,
        # each block is loaded again, and all tensors are compared with the parameters that they fill
        bytes_read=skeleton.checkpoint.nbytes + sum(_stored(skeleton, block) for block in skeleton.blocks),
        operations=_BLOCK_WORK * forward + (_HEAD_WORK_WITH_GRADIENTS if count else 2 * _HEAD_WORK) * of_head,
        gram_operations=sum(float(tokens) * own**2 for own in widths),
        adding=len(samples) * (sum(blocks) + outside) * count / _adding_rate(torch.get_num_threads()),
        peak_memory=max(*held, _FLOAT32 * outside + of_outside + logits),
        spool_bytes=spool + (2 + bool(count)) * _FLOAT32 * width * rows + _FLOAT64 * count * outside,
    )


def _numel(parameters: Mapping[str, nn.Parameter]) -> int:
    return sum(own.numel() for own in parameters.values())


def _stored(skeleton: Skeleton, block: Block) -> int:
    return sum(skeleton.checkpoint.tensors[name].nbytes_stored for name in block.sources)


def _gram_bytes(sums: Sums) -> int:
    return sum(Gram.memory_of(own.shape[0]) for (kind, _), own in sums.items() if kind == "gradient_gram")


def _formed(block: Block) -> int:
    """Return the number of entries whose gradient is formed as a whole: of experts, norms and biases."""
    every = block_parameters(block)
    return sum(own.numel() for name, own in every.items() if name not in _output_widths(block))


def _activations(block: Block, longest: int) -> int:
    """Return the bytes of what a block computes for one sequence, kept for its reverse pass."""
    heads = int(getattr(getattr(block.module, "config", None), "num_attention_heads", 0))
    return _FLOAT32 * _COPIES_OF_OUTPUTS * longest * (sum(_output_widths(block).values()) + heads * longest)


@lru_cache
def _adding_rate(threads: int) -> float:
    """Measure how many squares are added to float64 sums in a second; `threads` only because it depends on them."""
    total, gradient = torch.zeros(1 << 21, dtype=torch.float64), torch.ones(1 << 21)
    best = math.inf
    for _ in range(3):
        # processor time, as other programs may be running
        start = time.process_time()
        for first in range(0, len(total), PIECE * threads):
            last = first + PIECE * threads
            ELEMENTWISE["fisher"](total[first:last], gradient[first:last].double())
        best = min(best, (time.process_time() - start) / threads)
    return len(total) / max(best, 1e-9)
