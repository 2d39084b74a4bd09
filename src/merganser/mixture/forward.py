"""Pass prompts and texts through the mixture's dense models, block by block, and see what its routers will read."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..calibration.data.batches import Batch, Sample, Tokens, make_batches, padding_token
from ..calibration.data.data import DataFile
from ..calibration.data.samples import choose_samples
from ..calibration.forward.forward import check_streamable
from ..calibration.forward.internals import TensorReader
from ..calibration.forward.skeleton import Block, Skeleton
from ..calibration.forward.stream import Stream
from ..calibration.single.preparation import read
from ..errors import CheckpointError, UnsupportedError
from ..inference.language_model import Tokenizer, positions_of
from ..recipe.fields.data import Data

__all__ = ["Run", "batches_of_data", "batches_of_prompts", "counted_rows", "router_inputs"]

_BATCH_TOKENS = 2048
_PROBE = 8
_HELD_OUT = 8


class Run:
    """Text that passes through one dense model.

    Args:
        batches: The text.
        source: The model's tensors.
    """

    def __init__(self, batches: Sequence[Batch], source: TensorReader) -> None:
        self.batches = batches
        self.source = source


Sink = Callable[[int, int, Batch, Tensor], None]
"""Called with a run's index, the number of a batch, the batch, and the inputs of its MLPs: [sequences, longest, hidden]."""


def router_inputs(
    skeleton: Skeleton,
    runs: Sequence[Run],
    sink: Sink,
    finished: Callable[[int], None],
    advance: Callable[[int, int], None] | None,
) -> None:
    """Run all texts through their models, a block at a time, and give the inputs of each block's MLP to `sink`.

    Args:
        skeleton: The dense model without weights.
        runs: Texts with the models that they pass through; the weights outside the blocks are those of the first.
        sink: Takes the inputs.
        finished: Called with the number of a layer when `sink` got all its inputs.
        advance: Called with the number of finished layers, and of all.

    Raises:
        UnsupportedError: The model cannot be run one block at a time.
        NonFiniteError: It produces NaN or infinity.
    """
    skeleton.fill_outside(source=runs[0].source)
    check_streamable(skeleton, _probe(runs[0].batches[0]), runs[0].source)
    with tempfile.TemporaryDirectory(prefix="merganser-") as root:
        streams = []
        for number, run in enumerate(runs):
            folder = Path(root, str(number))
            folder.mkdir()
            streams.append(Stream(skeleton, run.batches, folder))
        for layer, block in enumerate(skeleton.blocks):
            for number, (run, stream) in enumerate(zip(runs, streams, strict=True)):
                with skeleton.filled(block, run.source):
                    _advance(stream, block, number, sink)
            finished(layer)
            if advance is not None:
                advance(layer + 1, len(skeleton.blocks))


def _advance(stream: Stream, block: Block, run: int, sink: Sink) -> None:
    """Run a block on all batches of a text."""
    seen: list[Tensor] = []
    with _watched(block, seen):
        for number, batch in enumerate(stream.batches):
            seen.clear()
            stream.store(number, stream.output(number))
            if len(seen) != 1:
                raise UnsupportedError(f"{block.name}: its MLP runs {len(seen)} times per call; routers need once")
            sink(run, number, batch, seen[0])
    stream.finish()


@contextmanager
def _watched(block: Block, seen: list[Tensor]) -> Iterator[None]:
    module: Any = getattr(block.module, "mlp", None)
    if module is None:
        raise UnsupportedError(f"{block.name}: has no module mlp, whose inputs routers are made from")

    def look(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((args[0] if args else next(iter(kwargs.values()))).detach())

    handle = module.register_forward_pre_hook(look, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _probe(batch: Batch) -> Batch:
    padded = batch.stacks[0]
    ids = padded.ids[0][padded.valid[0]][:_PROBE].tolist()
    return make_batches([Sample((Tokens(tuple(ids), (True,) * len(ids)),), batch.where[0])], len(ids), 0)[0]


def batches_of_prompts(prompts: Sequence[tuple[str, str]], tokenizer: Tokenizer, skeleton: Skeleton) -> list[Batch]:
    """Return prompts as batches of one, in their order, so that each is found again.

    Args:
        prompts: The prompts, each with its place in the recipe.
        tokenizer: The model's tokenizer.
        skeleton: The model.

    Raises:
        CheckpointError: A prompt has no tokens, or the tokenizer does not fit the model.
    """
    config = skeleton.model.config
    longest = positions_of(config)
    rows = getattr(config.get_text_config(), "vocab_size", None)
    found: list[Batch] = []
    before = 0
    for prompt, where in prompts:
        ids = (*tokenizer.prefix, *tokenizer.ids(prompt))[:longest]
        if not ids:
            raise CheckpointError(f"{where}: the tokenizer gives no token for the prompt {prompt[:40]!r}")
        if rows is not None and max(ids) >= rows:
            raise CheckpointError(f"{where}: the tokenizer gives token {max(ids)}, and the model has {rows} embeddings")
        [batch] = make_batches([Sample((Tokens(ids, (True,) * len(ids)),), where)], len(ids), 0)
        found.append(_behind(batch, before))
        before += len(ids)
    return found


def batches_of_data(data: Data, tokenizer: Tokenizer, skeleton: Skeleton) -> tuple[list[Batch], int]:
    """Return the sequences that are drawn from data, and how many batches hold those that routers are fitted to.

    Every eighth sequence comes in the batches behind these: routers are tried on them. There are none of them if the
    data have a single sequence.

    Raises:
        DataError: The data, or the options for them, are not valid.
    """
    config = skeleton.model.config
    files: list[DataFile] = read(data.source)
    choice = data.choice.for_model(positions_of(config))
    pad_id = padding_token(config)
    samples = choose_samples(files, tokenizer, config, choice)
    budget = min(data.batch_tokens, _BATCH_TOKENS)
    held = samples[1::_HELD_OUT]
    fitted = make_batches([sample for at, sample in enumerate(samples) if at % _HELD_OUT != 1], budget, pad_id)
    before = sum(batch.stacks[0].rows for batch in fitted)
    return [*fitted, *(_behind(batch, before) for batch in make_batches(held, budget, pad_id))], len(fitted)


def _behind(batch: Batch, before: int) -> Batch:
    """Return a batch whose tokens are stored behind others."""
    return replace(batch, stacks=tuple(replace(padded, first=padded.first + before) for padded in batch.stacks))


def counted_rows(batch: Batch, inputs: Tensor) -> Tensor:
    """Return the inputs of the tokens that count, float32, shape [tokens, hidden]."""
    return inputs[batch.stacks[0].counted].to(torch.float32)
