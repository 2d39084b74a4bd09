"""The reverse pass over all sequences: the head, then the blocks from the last to the first."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import DataError, UnsupportedError
from ...process import release_freed_memory
from ...statistics import LOSS, LOSSES, PREDICTIONS, sum_name
from ..data.batches import Batch
from ..forward.skeleton import Skeleton
from ..forward.stream import Stream
from ..output.target import Target
from ..output.writer import Sum, file_name, write_sums
from .backward import block_backward, head_backward, head_loss, outside_parameters
from .gradient import Gradient, part_gradients
from .loss import Loss, predicted
from .parameters import block_parameters, find_parts
from .sums import ELEMENTWISE, GradientSums, tables
from .taps import GradientTaps
from .upstream import Upstream, UpstreamFiles

__all__ = ["GRADIENTS", "LOSS_FILE", "Reverse", "check_predicts", "gradient_files"]

GRADIENTS = (*ELEMENTWISE, "sensitivity", "gradient_gram")
"""Names of all statistics of gradients."""

LOSS_FILE = "loss.safetensors"
"""Name of the file with the loss of the model."""

# the file with sums over what the head contributes
_TOTALS = "totals"

_HEADS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")


def check_predicts(skeleton: Skeleton, batches: Sequence[Batch]) -> None:
    """Check that a model has a loss on the data.

    Raises:
        UnsupportedError: The model does not predict the next token.
        DataError: No token of the data is predicted and counts.
    """
    name = type(skeleton.model).__name__
    if not name.endswith(_HEADS) or skeleton.model.get_output_embeddings() is None:
        raise UnsupportedError(
            f"{skeleton.checkpoint.reference}: {name} does not predict the next token, so it has no loss whose gradient "
            "could be taken; statistics of its activations can be had (gram, second_moment, magnitude)"
        )
    if not any(bool(batch.stacks[-1].counted[:, 1:].any()) for batch in batches):
        raise DataError(
            f"{batches[0].where[0]}: no token that counts follows another one, so there is no loss; give longer texts"
        )


def gradient_files(blocks: int) -> list[str]:
    """Return the names of the files with sums of gradients: one for each block, and one for what is outside them."""
    return [file_name(number, blocks + 1, "gradients") for number in range(1, blocks + 2)]


class Reverse:
    """The reverse pass of a model.

    Args:
        skeleton: The model, in float32, with all weights outside its blocks loaded.
        stream: Its forward; it keeps the outputs of all blocks, and each of its batches is one sequence.
        statistics: The statistics of gradients to sum; if there are none, only the loss is computed.
        loss: The loss.
        target: Where sums and the state are written.
        note: Stores the state of the reverse pass, so that it can be continued.
        order: For each sequence, its place in the draw.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        stream: Stream,
        statistics: Sequence[str],
        loss: Loss,
        target: Target,
        note: Callable[[Mapping[str, Any]], None],
        order: Sequence[int],
    ) -> None:
        self._skeleton = skeleton
        self._stream = stream
        self._statistics = statistics
        self._loss = loss
        self._target = target
        self._note = note
        self._order = order
        self._upstream = UpstreamFiles(stream.folder)
        # Gram matrices are those of blocks alone
        self._outside = outside_parameters(skeleton) if tables(statistics) else {}

    @property
    def files(self) -> list[str]:
        """The names of the files that it writes: the loss, one for what is outside the blocks, one for each block."""
        return [LOSS_FILE, *(gradient_files(len(self._skeleton.blocks)) if self._statistics else [])]

    @property
    def steps(self) -> int:
        """The number of steps: the head, and if gradients are wanted, each block."""
        return 1 + (len(self._skeleton.blocks) if self._statistics else 0)

    def run(self, state: Mapping[str, Any], progress: Callable[[int], None]) -> dict[str, Any]:
        """Run what is left of the reverse pass.

        Args:
            state: The state noted last; empty at the start.
            progress: Called with the number of finished steps: the head, and each block.

        Returns:
            For statistics.json: `gradients`, the tensors that have them, and `without_gradients`.

        Raises:
            NonFiniteError: A loss or a gradient is NaN or infinite.
            OutputError: The disk is full or failed.
        """
        for own in self._outside.values():
            own.requires_grad_(True)
        about: dict[str, Any] = dict(state) or {"visited": -1, "formed": [], "gradients": {}, "without_gradients": []}
        while about["visited"] + 1 < self.steps:
            about["visited"] += 1
            progress(about["visited"])
            if not about["visited"]:
                self._visit_head(about)
            else:
                self._visit_block(len(self._skeleton.blocks) - about["visited"], about)
            self._note(about)
            release_freed_memory()
        return {key: about[key] for key in ("gradients", "without_gradients")}

    def _visit_head(self, about: dict[str, Any]) -> None:
        """Compute the losses, the gradients for the last block, and the sums of gradients that no block adds to."""
        losses, tokens = torch.zeros(len(self._order), dtype=torch.float64), 0
        total = 0.0
        count = len(self._skeleton.blocks)
        sums = self._outside_sums({"without_gradients": []})
        for number, batch in enumerate(self._stream.batches):
            last = self._stream.before(number, count)
            if self._statistics:
                value, upstream, uses = head_backward(self._skeleton, batch, last, self._loss, self._outside)
                self._upstream.write(0, number, upstream)
                formed, rest = part_gradients(uses, self._outside)
                sums.add(formed, batch.where[0])
                self._upstream.keep(f"head-{number}", rest)
                about["formed"] = sorted({*about["formed"], *formed})
            else:
                value = head_loss(self._skeleton, batch, last, self._loss)
            total += value
            losses[self._order[number]] = value
            tokens += int(predicted(batch.stacks[-1]).sum())
        if self._statistics:
            self._upstream.keep(_TOTALS, dict(sums.totals()))
        written = {
            LOSS: Sum((), "float64", lambda: torch.tensor(total, dtype=torch.float64)),
            PREDICTIONS: Sum((), "int64", lambda: torch.tensor(tokens)),
            LOSSES: Sum(tuple(losses.shape), "float64", lambda: losses),
        }
        write_sums(self._target.folder / LOSS_FILE, written)

    def _visit_block(self, index: int, about: dict[str, Any]) -> None:
        """Take the gradients of one block over all sequences; with the first block, of what is outside the blocks."""
        skeleton, block = self._skeleton, self._skeleton.blocks[index]
        visited = about["visited"] - 1
        if index:
            skeleton.will_need(skeleton.blocks[index - 1])
        with skeleton.filled(block):
            own = block_parameters(block)
            for each in own.values():
                each.requires_grad_(True)
            sums = self._sums(block.sources, own, about, block.name)
            rest = None if index else self._outside_sums(about, self._upstream.kept(_TOTALS))
            taps = GradientTaps(block, sums.parts)
            with taps.watching() if "gradient_gram" in self._statistics else contextlib.nullcontext():
                for number, batch in enumerate(self._stream.batches):
                    before, upstream = self._stream.before(number, index), self._upstream.read(visited, number)
                    upstream, found = block_backward(skeleton, index, batch, before, upstream, own | self._outside)
                    sums.add({name: found.pop(name) for name in own if name in found}, batch.where[0])
                    for name, gradient in found.items():
                        upstream.add_outside(name, gradient, self._outside[name])
                    if rest is None:
                        self._upstream.write(visited + 1, number, upstream)
                        continue
                    kept = self._upstream.kept(f"head-{number}")
                    rest.add(self._added(upstream, kept, about["formed"]), batch.where[0])
            self._write(index + 1, sums, taps.results(), about)
            if rest is not None:
                self._write(len(skeleton.blocks) + 1, rest, {}, about)

    def _added(
        self, upstream: Upstream, kept: Mapping[str, tuple[Tensor, Tensor]], formed: Collection[str]
    ) -> dict[str, Gradient]:
        """Return the gradients of a sequence's loss with respect to parameters outside the blocks that have no sums yet.

        Args:
            upstream: Has what all blocks contribute.
            kept: What the head contributes.
            formed: The parameters that have sums already, but for the rows that are kept.
        """
        found: dict[str, Gradient] = {}
        for name, parameter in self._outside.items():
            rows = upstream.outside.get(name)
            if name in formed and rows is not None and not bool(torch.isin(rows[0], kept[name][0]).all()):
                raise UnsupportedError(
                    f"{self._skeleton.checkpoint.reference}: {type(self._skeleton.model).__name__} uses {name} in its "
                    "blocks and in its head, other than as a table of tokens; its gradients cannot be had"
                )
            gradient = Gradient(rows=kept.get(name))
            if rows is not None:
                gradient.add_rows(*rows)
            if gradient.rows is not None and len(gradient.rows[0]) == (parameter.shape or (1,))[0]:
                gradient = Gradient(dense=gradient.whole(parameter))
            found |= {} if gradient.rows is None and gradient.dense is None else {name: gradient}
        return found

    def _outside_sums(
        self, about: dict[str, Any], totals: Mapping[str, Mapping[str, Tensor]] | None = None
    ) -> GradientSums:
        return self._sums(self._skeleton.outside(head=True), self._outside, about, "its embeddings or head", totals)

    def _sums(
        self,
        sources: Sequence[str],
        parameters: Mapping[str, nn.Parameter],
        about: dict[str, Any],
        place: str,
        totals: Mapping[str, Mapping[str, Tensor]] | None = None,
    ) -> GradientSums:
        parts, missing = find_parts(self._skeleton, sources, parameters)
        about["without_gradients"] += missing
        return GradientSums(parameters, parts, self._statistics, place, totals)

    def _write(
        self, number: int, sums: GradientSums, grams: Mapping[tuple[str, str], Sum], about: dict[str, Any]
    ) -> None:
        found = {**sums.results(), **grams}
        write_sums(
            self._target.folder / gradient_files(len(self._skeleton.blocks))[number - 1],
            {sum_name(statistic, tensor): own for (statistic, tensor), own in found.items()},
        )
        for statistic, tensor in found:
            about["gradients"].setdefault(tensor, []).append(statistic)
