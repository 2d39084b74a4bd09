"""Hidden states between the blocks of a model: kept on disk where they are needed, and compared."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import UnsupportedError
from ...process import release_freed_memory
from ..data.batches import Batch
from ..forward.forward import check_streamable
from ..forward.skeleton import Block, Skeleton
from ..forward.spool import Spool
from ..forward.stream import Stream
from ..reverse import check_predicts
from ..single.preparation import Prepared

__all__ = ["Kept", "Likelihood", "blocks_to", "likelihood", "received", "run_and_keep", "start"]


@dataclass
class Kept:
    """Hidden states of one model on disk.

    A boundary i is what block i receives; the one after the last block is what the final norm receives.

    Args:
        folder: Where they are.
        widths: Width of those of each boundary that is kept.
        likelihood: How well the model predicts the text; None if it was not run to its end.
    """

    folder: Path
    widths: dict[int, int] = field(default_factory=dict)
    likelihood: Likelihood | None = None

    def write(self, boundary: int, batch: Batch, hidden: Tensor) -> None:
        """Keep the hidden states of a batch, shape [sequences, longest, width].

        Raises:
            OutputError: The disk is full or failed.
        """
        padded = batch.stacks[0]
        with Spool(self._file(boundary)) as spool:
            spool.write(padded.first, hidden[padded.valid].float().contiguous())
        self.widths[boundary] = hidden.shape[-1]

    def read(self, boundary: int, batch: Batch) -> Tensor:
        """Return the hidden states of a batch's tokens that count, float32, shape [tokens, width].

        Raises:
            OutputError: The disk failed.
        """
        padded = batch.stacks[0]
        with Spool(self._file(boundary)) as spool:
            rows = spool.read(padded.first, padded.rows, self.widths[boundary], torch.float32)
        return rows[padded.counted[padded.valid]]

    def _file(self, boundary: int) -> Path:
        return self.folder / f"boundary-{boundary}.bin"


@dataclass(frozen=True)
class Likelihood:
    """How well a model predicts text.

    Args:
        nats: Negative log-likelihood of each sequence, in the order of the batches.
        tokens: Number of tokens that are predicted in each.
    """

    nats: tuple[float, ...]
    tokens: tuple[int, ...]

    def perplexity(self, chosen: Collection[int] | None = None) -> float:
        """Return the perplexity over all sequences, or over those with these numbers."""
        numbers = range(len(self.nats)) if chosen is None else chosen
        tokens = sum(self.tokens[i] for i in numbers)
        mean = sum(self.nats[i] for i in numbers) / max(tokens, 1)
        return float(torch.tensor(mean, dtype=torch.float64).exp())


def start(prepared: Prepared) -> None:
    """Load what is outside the blocks, and check that the model can be run block by block.

    Raises:
        UnsupportedError: It cannot, or does not predict a next token.
        NonFiniteError: It produces NaN or infinity.
    """
    skeleton = prepared.skeleton
    if skeleton.is_encoder_decoder:
        raise UnsupportedError(f"{prepared.source.reference}: is an encoder-decoder; seams are examined in decoders")
    check_predicts(skeleton, prepared.batches())
    skeleton.fill_outside(head=True)
    check_streamable(skeleton, prepared.probe())


def run_and_keep(
    prepared: Prepared,
    boundaries: Collection[int],
    folder: Path,
    *,
    to_end: bool = True,
    progress: Callable[[], None] | None = None,
) -> Kept:
    """Run text through a model, and keep its hidden states at some boundaries.

    Args:
        prepared: Model and text, from `start`.
        boundaries: The boundaries.
        folder: Folder for hidden states; it must not exist.
        to_end: Whether to run to the end and measure the likelihood of the text.
        progress: Called after each block.

    Raises:
        OutputError: The disk is full or failed.
        NonFiniteError: A block produces NaN or infinity.
    """
    skeleton, batches = prepared.skeleton, prepared.batches()
    folder.mkdir()
    kept = Kept(folder)
    stream = Stream(skeleton, batches, folder)
    count = len(skeleton.blocks)
    for index in range(count if to_end else blocks_to(prepared, boundaries)):
        block = skeleton.blocks[index]
        with skeleton.filled(block), received(block) as inputs:
            for number, batch in enumerate(batches):
                output = stream.output(number)
                stream.store(number, output)
                if index in boundaries:
                    kept.write(index, batch, inputs[-1])
                if index + 1 == count and count in boundaries:
                    kept.write(count, batch, output.hidden)
                inputs.clear()
        stream.finish()
        release_freed_memory()
        if progress is not None:
            progress()
    if to_end:
        kept.likelihood = likelihood(skeleton, batches, stream)
    return kept


def blocks_to(prepared: Prepared, boundaries: Collection[int]) -> int:
    """Return how many blocks of a model must run until hidden states at all these boundaries are known."""
    return min(max(boundaries) + 1, len(prepared.skeleton.blocks))


@contextmanager
def received(block: Block) -> Iterator[list[Tensor]]:
    """Collect the hidden states that a block receives within the context, call by call."""
    found: list[Tensor] = []

    def look(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs.get("hidden_states")
        if not isinstance(hidden, Tensor):
            raise UnsupportedError(f"{block.name}: receives no hidden states as its first argument")
        # a copy, as the block may work in place
        found.append(hidden.clone())

    handle = block.module.register_forward_pre_hook(look, with_kwargs=True)
    try:
        yield found
    finally:
        handle.remove()


@torch.no_grad()
def likelihood(skeleton: Skeleton, batches: Sequence[Batch], stream: Stream) -> Likelihood:
    """Return how well a model predicts the tokens that count, each given those before it.

    Args:
        skeleton: The model, with its head loaded.
        batches: The text.
        stream: The text on its way, with all blocks done.
    """
    nats: list[float] = []
    tokens: list[int] = []
    for number, batch in enumerate(batches):
        logits = stream.logits(number)
        padded = batch.stacks[0]
        for sequence, counted in enumerate(padded.counted):
            chosen = counted[1:]
            scores = torch.log_softmax(logits[sequence, :-1][chosen].float(), dim=-1)
            picked = scores.gather(1, padded.ids[sequence, 1:][chosen][:, None])
            nats.append(-picked.sum(dtype=torch.float64).item())
            tokens.append(int(chosen.sum()))
    return Likelihood(tuple(nats), tuple(tokens))
