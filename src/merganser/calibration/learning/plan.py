"""Plan how coefficients are learnt: how many steps, and what they take; no weights are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...method import MergeMethod
from ..data.batches import Sample
from ..forward import internals
from ..forward.skeleton import Skeleton
from ..reverse.backward import outside_parameters
from ..reverse.parameters import block_parameters
from ..sums.coefficients import coefficient_sums
from ..sums.taps import Tapped
from .columns import coefficient_shape, input_axes

__all__ = ["Descent", "LearningPlan", "descent_of", "learnt_coefficients", "plan_learning"]

_FLOAT32 = 4
# forward; once more behind it; and its reverse pass, which is twice as much
_BLOCK_WORK = 4
# logits and the gradients of what the head receives and of its weights
_HEAD_WORK = 3
# logits, their softmax, its logarithm, and the gradient; with a teacher its logits and their logarithm, too
_COPIES_OF_LOGITS, _COPIES_WITH_TEACHER = 4, 6


@dataclass(frozen=True, slots=True)
class Descent:
    """The steps of the optimiser.

    Args:
        steps: How many.
        batch: Sequences of every model in each.
        has_teacher: Whether the models run on their data, too.
        columns: Whether every column of a matrix has coefficients.
        chunks: How many pieces of any other tensor have.
        by_model: Whether the gradient of each model's loss is taken by itself.
    """

    steps: int
    batch: int
    has_teacher: bool
    columns: bool
    chunks: int
    by_model: bool


def descent_of(method: MergeMethod, parameters: Mapping[str, Any]) -> Descent | None:
    """Return the steps of a method with these parameters, by their names in recipes; None if it learns nothing."""
    learning = next((own.learning for own in method.from_data.values()), None)
    if learning is None:
        return None
    columns = learning.granularity(parameters) == "column"
    steps, batch = int(parameters["steps"]), int(parameters["batch"])
    return Descent(steps, batch, learning.has_teacher, columns, learning.chunks(parameters), learning.by_model)


@dataclass(frozen=True, slots=True)
class LearningPlan:
    """What one model's data take while coefficients are learnt.

    Args:
        bytes_read: Bytes of the model's files that are read.
        operations: Floating-point operations.
        peak_memory: Largest memory, bytes, without that of Python.
        spool_bytes: Disk space for what blocks return, bytes.
    """

    bytes_read: int
    operations: float
    peak_memory: int
    spool_bytes: int


def plan_learning(
    skeleton: Skeleton, nbytes: int, descent: Descent, samples: Sequence[Sample], forward: float, together: int
) -> LearningPlan:
    """Plan what one model's data take.

    Args:
        skeleton: The merged model.
        nbytes: Bytes of the model's files.
        descent: The steps.
        samples: Its sequences.
        forward: Floating-point operations of its blocks' forward on all of them.
        together: Number of models.
    """
    internals.tie(skeleton.model)
    head = skeleton.model.get_output_embeddings()
    batch = min(descent.batch, len(samples))
    # the share of the data that a step reads; one more forward at the end measures the loss
    share, used = batch / len(samples), min(descent.steps * batch, len(samples)) / len(samples)
    tokens = sum(len(sample.stacks[-1].ids) for sample in samples)
    longest = max(len(sample.stacks[-1].ids) for sample in samples)
    of_head = 2.0 * head.weight.numel() * tokens
    operations = share * (descent.steps * (_BLOCK_WORK * forward + _HEAD_WORK * of_head) + forward + of_head)
    # in each step forward, backward, and for the gradients of coefficients; the base's reads are shared out among the models
    read = round((3 * descent.steps + 1) * nbytes * (1 + 1 / together)) + nbytes
    if descent.has_teacher:
        operations += used * forward + share * (descent.steps + 1) * of_head
        entries = sum(own.numel for own in skeleton.checkpoint.tensors.values())
        read += nbytes + round((descent.steps + 1) * nbytes * head.weight.numel() / entries)
    width = int(getattr(skeleton.model.config.get_text_config(), "hidden_size", 0))
    rows = sum(len(sample.stacks[block.stack].ids) for block in skeleton.blocks for sample in samples)
    spool = _FLOAT32 * width * (share * rows + descent.has_teacher * 2 * used * tokens)
    copies = _COPIES_WITH_TEACHER if descent.has_teacher else _COPIES_OF_LOGITS
    memory = _weights_memory(skeleton, descent, together) + _FLOAT32 * copies * longest * int(head.weight.shape[0])
    return LearningPlan(read, operations, memory, round(spool))


def _weights_memory(skeleton: Skeleton, descent: Descent, together: int) -> int:
    """Return the bytes of weights and gradients that are held at once."""
    outside = outside_parameters(skeleton)
    block = max((_numel(block_parameters(own)) for own in skeleton.blocks), default=0)
    largest = max((own.numel() for own in skeleton.model.parameters()), default=0)
    # weights outside the blocks, and their gradient, or one for each loss; weights and gradient of one block; of one
    # tensor base, models, task vectors, a product, a sum and the result
    held = 1 + descent.has_teacher + (together if descent.by_model else 1)
    return _FLOAT32 * (held * _numel(outside) + 2 * block + (2 * together + 4) * largest)


def _numel(parameters: Mapping[str, nn.Parameter]) -> int:
    return sum(own.numel() for own in parameters.values())


def learnt_coefficients(skeleton: Skeleton, descent: Descent) -> list[list[Tapped]]:
    """Return the coefficients that tensors will have, without values: of every block, and of what is outside them."""
    found: list[list[Tapped]] = []
    axes = input_axes(skeleton) if descent.columns else {}
    for sources in (*(block.sources for block in skeleton.blocks), skeleton.outside(head=True)):
        tensors = {name: skeleton.checkpoint.tensors[name] for name in sources}
        found.append(
            [
                coefficient_sums(
                    name, own.shape, torch.empty(coefficient_shape(own.shape, axes.get(name), descent.chunks)), 0
                )
                for name, own in tensors.items()
                if own.shape and own.dtype.kind == "float"
            ]
        )
    return found
