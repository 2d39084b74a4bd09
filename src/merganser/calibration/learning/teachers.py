"""What the models themselves predict on their own data, for losses that compare the merged model with them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ..data.batches import Batch
from ..forward.skeleton import Skeleton, Weights
from ..forward.stream import Stream, StreamState
from ..within.weights import ModelTensors

__all__ = ["Teachers"]


class Teachers:
    """The models on their own data: hidden states are kept, and the head is computed when logits are wanted.

    Args:
        skeleton: The merged model; the models have the same tensors.
        sources: The weights of each model.
        batches: The data of each, one sequence each.
        folders: Where the hidden states of each are kept; they must exist.
        states: States of interrupted streams; None to begin.
    """

    def __init__(
        self,
        skeleton: Skeleton,
        sources: Sequence[ModelTensors],
        batches: Sequence[Sequence[Batch]],
        folders: Sequence[Path],
        states: Sequence[Mapping[str, Any]] | None,
    ) -> None:
        self._skeleton = skeleton
        self._sources = sources
        found = [StreamState()] * len(batches) if states is None else [StreamState.from_json(own) for own in states]
        self._streams = [
            Stream(skeleton, own, folder, state) for own, folder, state in zip(batches, folders, found, strict=True)
        ]
        self._open: tuple[int, Weights] | None = None

    @property
    def states(self) -> list[dict[str, Any]]:
        """The states of all streams."""
        return [stream.state.to_json() for stream in self._streams]

    def run(self, note: Callable[[], None]) -> None:
        """Run what is left of every model's forward.

        Args:
            note: Called after each block, to store the states.
        """
        for stream, source in zip(self._streams, self._sources, strict=True):
            left = self._skeleton.blocks[stream.state.done :]
            if left and stream.batches:
                self._skeleton.fill_outside(source=source)
            for block in left if stream.batches else ():
                with self._skeleton.filled(block, source):
                    stream.advance(lambda batch: None)
                note()

    def logits(self, model: int, number: int) -> Tensor:
        """Return the logits of one of a model's sequences, shape [1, longest, vocabulary].

        What is outside the blocks of the merged model must be loaded. That of the model asked last stays in memory.
        """
        merged = self._skeleton.loaded()
        try:
            if self._open is None or self._open[0] != model:
                self._open = None
                self._skeleton.fill_outside(head=True, source=self._sources[model])
                self._open = model, self._skeleton.loaded()
            self._skeleton.use(self._open[1])
            return self._streams[model].logits(number)
        finally:
            self._skeleton.use(merged)
