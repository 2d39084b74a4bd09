"""Pass text through a model block by block, and see what its layers of experts receive."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...calibration.data.batches import Batch
from ...calibration.forward.experts import observed_experts
from ...calibration.forward.forward import check_streamable, replaced
from ...calibration.forward.stream import Stream
from ...calibration.single.preparation import Prepared
from ...errors import UnsupportedError
from ...process import release_freed_memory
from .experts import Observed
from .layers import Layer

__all__ = ["observe"]


class _Watch:
    """What one layer of experts receives, batch by batch."""

    def __init__(self, layer: Layer) -> None:
        self._layer = layer
        self._counted = torch.empty(0)
        self._inputs: list[Tensor] = []
        self._gates: list[Tensor] = []
        self._chosen: list[Tensor] = []

    def begin(self, batch: Batch) -> None:
        self._counted = batch.stacks[0].counted.flatten()

    @contextmanager
    def watching(self) -> Iterator[None]:
        forward = observed_experts(self._layer.module, lambda _: None)

        def look(hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
            if len(hidden) != len(self._counted):
                raise UnsupportedError(f"{self._layer.name}: does not receive one row per token")
            self._add(hidden[self._counted], index[self._counted], weights[self._counted])
            return forward(hidden, index, weights)

        with replaced({self._layer.module: look}):
            yield

    def _add(self, hidden: Tensor, index: Tensor, weights: Tensor) -> None:
        self._inputs.append(hidden.float())
        gates = torch.zeros(len(index), self._layer.count)
        self._gates.append(gates.scatter_(1, index, weights.float()))
        chosen = torch.zeros(len(index), self._layer.count, dtype=torch.bool)
        self._chosen.append(chosen.scatter_(1, index, True))

    def observed(self, stored: Callable[[str], Tensor]) -> Observed:
        inputs = torch.cat(self._inputs)
        weight, *biases = (stored(name).float() for name in self._layer.router)
        logits = inputs @ weight.T
        for name, bias in zip(self._layer.router[1:], biases, strict=True):
            if name.endswith(".bias"):
                logits = logits + bias
        return Observed(inputs, logits, torch.cat(self._gates), torch.cat(self._chosen))


def observe(
    prepared: Prepared,
    layers: Sequence[Layer],
    folder: Path,
    sink: Callable[[Layer, Observed], None],
    advance: Callable[[int, int], None] | None = None,
) -> None:
    """Run the text through the model, and give what each layer of experts received to `sink`, a layer at a time.

    Args:
        prepared: Model and text.
        layers: The layers of experts.
        folder: Folder for hidden states.
        sink: Takes a layer and what it received; the layer's weights are not loaded at that time.
        advance: Called with the number of finished blocks, and of all.

    Raises:
        UnsupportedError: The model cannot be run block by block.
        NonFiniteError: It produces NaN or infinity.
    """
    skeleton = prepared.skeleton
    skeleton.fill_outside()
    check_streamable(skeleton, prepared.probe())
    by_block: dict[int, Layer] = {layer.block: layer for layer in layers}
    stream = Stream(skeleton, prepared.batches(), folder)
    last = max(by_block)
    for index, block in enumerate(skeleton.blocks[: last + 1]):
        layer = by_block.get(index)
        watch = None if layer is None else _Watch(layer)
        with skeleton.filled(block):
            if watch is None:
                stream.advance(_nothing)
            else:
                with watch.watching():
                    stream.advance(watch.begin)
        if layer is not None and watch is not None:
            sink(layer, watch.observed(skeleton.stored))
            release_freed_memory()
        if advance is not None:
            advance(index + 1, last + 1)


def _nothing(_: Any) -> None:
    """Prepare nothing for a batch."""
