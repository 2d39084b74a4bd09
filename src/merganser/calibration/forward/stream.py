"""Pass data through a model block by block, with the hidden states on disk in between."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import NonFiniteError
from ..data.batches import Batch, Padded, pad
from ..output.torchfile import load_working, save_working
from .forward import Output, logits, run_on_text
from .skeleton import Block, Skeleton
from .spool import Spool

__all__ = ["Stream", "StreamState"]


@dataclass
class StreamState:
    """Progress of a stream; together with the files in its folder, enough to continue it.

    Args:
        done: Number of finished blocks.
        formats: By stack: width and dtype of its hidden states, and whether its blocks return a tuple.
    """

    done: int = 0
    formats: dict[int, tuple[int, str, bool]] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the state as plain data."""
        return {"done": self.done, "formats": {str(stack): list(own) for stack, own in self.formats.items()}}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> StreamState:
        """Return the state that `to_json` stored."""
        return cls(data["done"], {int(stack): (own[0], own[1], own[2]) for stack, own in data["formats"].items()})


class Stream:
    """Data that is passed through one model, block by block.

    Args:
        skeleton: The model, with the weights outside its blocks loaded.
        batches: The data.
        folder: Folder for hidden states; it must exist.
        state: State of an interrupted stream in this folder, to continue it.
        keep: Whether to keep the outputs of all blocks, for `before`; otherwise those of the last one of each stack.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        batches: Sequence[Batch],
        folder: Path,
        state: StreamState | None = None,
        *,
        keep: bool = False,
    ) -> None:
        self.skeleton = skeleton
        self.batches = batches
        self.folder = folder
        self.state = state or StreamState()
        self._keep = keep
        # width and dtype of what is stored, and whether the block returns a tuple
        self._written = (0, "", False)

    def advance(self, begin: Callable[[Batch], None]) -> None:
        """Run the next block, whose weights must be loaded, on all batches.

        Args:
            begin: Called before each batch.

        Raises:
            OutputError: The disk is full or failed.
            UnsupportedError: The block does not return hidden states.
            NonFiniteError: The block returns NaN or infinity for a token.
        """
        for number, batch in enumerate(self.batches):
            begin(batch)
            self.store(number, self.output(number))
        self.finish()

    def output(self, number: int) -> Output:
        """Run the next block, whose weights must be loaded, on one batch, and return what it computes.

        Raises:
            UnsupportedError: The block does not return hidden states.
            NonFiniteError: The block returns NaN or infinity for a token.
        """
        block, batch = self.skeleton.blocks[self.state.done], self.batches[number]
        output = run_on_text(self.skeleton, self.state.done, batch, self.before(number, self.state.done))
        _check_finite(output.hidden, batch, block)
        return output

    def store(self, number: int, output: Output) -> None:
        """Store what the next block computes for one batch.

        Raises:
            OutputError: The disk is full or failed.
        """
        index = self.state.done
        stack = self.skeleton.blocks[index].stack
        padded = self.batches[number].stacks[stack]
        rows = _rows(output.hidden, padded)
        with Spool(self._hidden_file(index)) as spool:
            spool.write(padded.first, rows)
        if output.rest is not None:
            self._write_rest(index, number, output.rest)
        self._written = (rows.shape[1], str(rows.dtype).removeprefix("torch."), output.rest is not None)

    def finish(self) -> None:
        """Go on to the block after the next one, once what the next one computes is stored for all batches."""
        stack = self.skeleton.blocks[self.state.done].stack
        self.state = StreamState(self.state.done + 1, {**self.state.formats, stack: self._written})

    def logits(self, number: int) -> Tensor:
        """Return the logits of a batch, once all blocks are done and the head is loaded.

        Returns:
            Shape [sequences, longest, vocabulary].
        """
        return logits(self.skeleton, self.batches[number], self.before(number, self.state.done))

    def before(self, number: int, index: int) -> dict[int, Output]:
        """Return the stored output of each stack's last block before a block, for a batch.

        Args:
            number: Index of the batch.
            index: Index of the block; the number of finished blocks, or if all outputs are kept, any up to that.
        """
        last = {block.stack: own for own, block in enumerate(self.skeleton.blocks[:index])}
        found: dict[int, Output] = {}
        for stack, index in last.items():
            padded = self.batches[number].stacks[stack]
            width, dtype, has_rest = self.state.formats[stack]
            with Spool(self._hidden_file(index)) as spool:
                rows = spool.read(padded.first, padded.rows, width, getattr(torch, dtype))
            hidden = pad(rows, padded.valid)
            found[stack] = Output(hidden, self._read_rest(index, number) if has_rest else None)
        return found

    def _hidden_file(self, index: int) -> Path:
        return self.folder / f"hidden-{self._file_key(index)}.bin"

    def _rest_file(self, index: int, number: int) -> Path:
        return self.folder / f"rest-{self._file_key(index)}-{number}.pt"

    def _file_key(self, index: int) -> str:
        # alternate between two files per stack, so that a block never overwrites its own input
        return f"{self.skeleton.blocks[index].stack}-{index if self._keep else index % 2}"

    def _write_rest(self, index: int, number: int, rest: tuple[Any, ...]) -> None:
        save_working(rest, self._rest_file(index, number))

    def _read_rest(self, index: int, number: int) -> tuple[Any, ...]:
        rest: tuple[Any, ...] = load_working(self._rest_file(index, number))
        return rest


def _check_finite(hidden: Tensor, batch: Batch, block: Block) -> None:
    finite = hidden.isfinite().all(-1) | ~batch.stacks[block.stack].valid
    if not bool(finite.all()):
        sample = int((~finite).any(-1).nonzero()[0])
        raise NonFiniteError(
            f"{batch.where[sample]}: the model produces NaN or infinity for this text, in {block.name}; leave this text out, "
            "and if others fail too, the model is damaged"
        )


def _rows(hidden: Tensor, padded: Padded) -> Tensor:
    """Return the rows of hidden states that belong to tokens, shape [tokens, width]."""
    rows = hidden.flatten(0, 1) if padded.full else hidden[padded.valid]
    return rows.contiguous()
