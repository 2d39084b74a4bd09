"""Calibrate: run one model on data, and write a folder of statistics."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import xxhash

from ..adapters import open_reference
from ..errors import DataError, UnsupportedError, did_you_mean
from ..inference.language_model import open_tokenizer, positions_of
from ..inference.sources import Source, open_source
from ..process import release_freed_memory
from ..statistics import (
    COUNT,
    LOSS,
    STATISTICS_FORMAT,
    STATISTICS_KIND,
    Statistics,
    open_statistics,
    sum_name,
)
from ..version import __version__
from .batches import Batch, Sample, Tokens, make_batches
from .data import DataFile, read_data
from .forward import check_streamable
from .reducers import REDUCERS
from .reverse import GRADIENTS, LABELS, Loss, Reverse, check_predicts
from .samples import Choice, choose_samples
from .skeleton import Skeleton
from .stream import Stream, StreamState
from .taps import Tapped, Taps
from .target import Target, check_absent
from .writer import file_name, write_about, write_sums

__all__ = ["STATISTICS", "calibrate"]

STATISTICS = (COUNT, *REDUCERS, *GRADIENTS, LOSS)
"""Names of all statistics."""

Progress = Callable[[int, int], None]
"""Called with the number of finished blocks and the number of all blocks."""

# a small batch is enough to check that a model can be streamed
_PROBE_SAMPLES, _PROBE_TOKENS = 2, 8


def calibrate(
    model: str | Path,
    data: Sequence[str | Path],
    out: str | Path,
    *,
    statistics: Sequence[str] = ("gram",),
    sequences: int | None = None,
    length: int | None = None,
    seed: int = 0,
    tokens: str = "all",
    labels: str = "data",
    batch_tokens: int = 2048,
    cache_dir: Path | None = None,
    progress: Progress | None = None,
) -> Statistics:
    """Run a model on text, with one block in memory at a time, and write statistics of what it computes.

    An interrupted calibration continues at its block when it is called again with the same arguments.

    Args:
        model: A checkpoint: a folder, a file of weights, or a Hub id.
        data: Files: texts (.txt), or objects with text, prompt and completion, or messages (.jsonl, .parquet).
        out: The folder to write; it must not exist.
        statistics: Names of the statistics to sum. Of the inputs of matrices: `gram`, `second_moment`, `magnitude`;
            `count` is always included. Of the gradients of the loss: `fisher`, `gradient`, `absolute_gradient`,
            `sensitivity`, `gradient_gram`; `loss` is then included, and can be had alone.
        sequences: Number of sequences drawn from the data; None for 64, or fewer if the data has fewer.
        length: Largest number of tokens of a sequence; None for 256, or the model's context window if it is smaller.
        seed: Seed of the draw.
        tokens: Which tokens count: `all`, or those of `completions` alone.
        labels: The tokens whose likelihood is the loss: the next ones of the `data`, or `sampled` ones.
        batch_tokens: Largest number of tokens of a batch, with padding. For a loss each sequence is its own batch.
        cache_dir: Folder for models from the Hub.
        progress: Called with the number of finished blocks and of all blocks.

    Returns:
        The statistics.

    Raises:
        DataError: The data, or the options for them, are not valid.
        CheckpointError: The model is missing, damaged, or has no tokenizer.
        UnsupportedError: transformers does not know the model, or it cannot be run one block at a time.
        NonFiniteError: The model produces NaN or infinity.
        OutputError: `out` exists or cannot be written.
    """
    target_path = Path(out)
    check_absent(target_path)
    wanted = _statistics(statistics)
    choice = Choice(sequences, length, seed, tokens)
    choice.check()
    if batch_tokens < 1:
        raise DataError(f"batch_tokens: must be at least 1, found {batch_tokens}")
    if labels not in LABELS:
        raise DataError(f"labels: must be {' or '.join(LABELS)}, found {labels!r}")
    with_loss = LOSS in wanted
    files = read_data(data)
    with ExitStack() as stack:
        source = open_source(model, stack, cache_dir=cache_dir)
        if source.kind != "checkpoint":
            raise UnsupportedError(
                f"{model}: only checkpoints can be calibrated on; write the {source.kind} out as a checkpoint first"
            )
        dtype = torch.float32 if with_loss else None
        skeleton = stack.enter_context(Skeleton(open_reference(str(model), cache_dir=cache_dir), dtype))
        config = skeleton.model.config
        tokenizer = open_tokenizer(source)
        choice = choice.for_model(positions_of(config))
        samples = choose_samples(files, tokenizer, config, choice)
        pad = config.get_text_config().pad_token_id
        pad_id = pad if isinstance(pad, int) and pad >= 0 else 0
        batches = make_batches(samples, 1 if with_loss else batch_tokens, pad_id)
        if with_loss:
            check_predicts(skeleton, batches)
        skeleton.fill_outside(head=with_loss)
        check_streamable(skeleton, _probe(samples, pad_id))
        about = {
            **_about(source, skeleton, tokenizer.hash),
            "statistics": list(wanted),
            "parts": [_part(files, samples, choice)],
        }
        if with_loss:
            about["labels"] = labels
        with Target(target_path, _fingerprint(about, 1 if with_loss else batch_tokens)) as target:
            loss = Loss(labels, seed) if with_loss else None
            found = _stream(skeleton, batches, wanted, loss, target, progress)
            without = _without(skeleton, found["tensors"])
            write_about(target.folder, {**about, "without": without, **found})
            target.publish()
    return open_statistics(target_path)


def _about(source: Source, skeleton: Skeleton, tokenizer: str) -> dict[str, Any]:
    """Return the description of model and tokenizer for statistics.json."""
    return {
        "kind": STATISTICS_KIND,
        "format": STATISTICS_FORMAT,
        "merganser": __version__,
        "model": {
            "reference": source.reference,
            "hash": source.hash,
            "architecture": type(skeleton.model).__name__,
            "dtype": str(skeleton.dtype).removeprefix("torch."),
        },
        "tokenizer": tokenizer,
    }


def _statistics(names: Sequence[str]) -> tuple[str, ...]:
    for name in names:
        if name not in STATISTICS:
            raise DataError(
                f"statistics: unknown statistic {name!r}.{did_you_mean(name, STATISTICS)} "
                f"Known are {', '.join(STATISTICS)}"
            )
    included = {COUNT, *names, *([LOSS] if any(name in GRADIENTS for name in names) else [])}
    return tuple(name for name in STATISTICS if name in included)


def _probe(samples: Sequence[Sample], pad_id: int) -> Batch:
    """Return a batch of a few tokens of the data, of equal length."""
    chosen = samples[:_PROBE_SAMPLES]
    lengths = [
        min(_PROBE_TOKENS, *(len(own.ids) for own in stack)) for stack in zip(*(s.stacks for s in chosen), strict=True)
    ]
    short = [
        Sample(
            tuple(Tokens(t.ids[:n], t.counted[:n]) for t, n in zip(sample.stacks, lengths, strict=True)), sample.where
        )
        for sample in chosen
    ]
    return make_batches(short, len(short) * max(lengths), pad_id)[0]


def _part(files: Sequence[DataFile], samples: Sequence[Sample], choice: Choice) -> dict[str, Any]:
    """Return the description of one pass over the data for statistics.json."""
    return {
        "data": [{"file": Path(file.path).name, "hash": file.hash, "bytes": file.nbytes} for file in files],
        "length": choice.length,
        "seed": choice.seed,
        "tokens_counted": choice.tokens,
        "sequences": len(samples),
        "tokens": sum(len(tokens.ids) for sample in samples for tokens in sample.stacks),
        "counted": sum(sum(tokens.counted) for sample in samples for tokens in sample.stacks),
    }


def _fingerprint(about: Mapping[str, Any], batch_tokens: int) -> str:
    """Return a hash of everything that affects the result; only a run with the same hash is continued."""
    return xxhash.xxh3_128_hexdigest(json.dumps([about, batch_tokens], sort_keys=True).encode())


def _stream(
    skeleton: Skeleton,
    batches: Sequence[Batch],
    statistics: Sequence[str],
    loss: Loss | None,
    target: Target,
    progress: Progress | None,
) -> dict[str, Any]:
    """Run all blocks forward, and for a loss backward; write the sums of each, and return their description."""
    count = len(skeleton.blocks)
    files = [file_name(number, count) for number in range(1, count + 1)]
    spool = target.folder / "hidden"
    state = StreamState.from_json(target.state["stream"]) if target.state else None
    tensors: dict[str, Any] = dict(target.state.get("tensors", {}))
    stream = Stream(skeleton, batches, spool, state, keep=loss is not None)

    def note(reverse: Mapping[str, Any]) -> None:
        target.note({"stream": stream.state.to_json(), "tensors": tensors, "reverse": dict(reverse)})

    wanted = [name for name in statistics if name in GRADIENTS]
    reverse = None if loss is None else Reverse(skeleton, stream, wanted, loss, target, note)
    files += [] if reverse is None else reverse.files
    steps = count + (0 if reverse is None else reverse.steps)
    target.claim(["hidden/", *files])
    spool.mkdir(exist_ok=True)
    for index in range(stream.state.done, count):
        if progress is not None:
            progress(index, steps)
        if index + 1 < count:
            skeleton.will_need(skeleton.blocks[index + 1])
        taps = Taps(skeleton, skeleton.blocks[index], [name for name in statistics if name in REDUCERS])
        with skeleton.filled(skeleton.blocks[index]), taps.watching():
            stream.advance(taps.begin)
        found = [tapped for tapped in taps.results() if _fits(skeleton, tapped)]
        sums = {sum_name(name, tapped.names[0]): own for tapped in found for name, own in tapped.sums.items()}
        write_sums(target.folder / file_name(index + 1, count), sums)
        tensors |= {name: {"axis": own.axis, "stored": own.names[0]} for own in found for name in own.names}
        note({})
        release_freed_memory()
    about: dict[str, Any] = {"files": files, "tensors": tensors}
    if reverse is not None:

        def told(done: int) -> None:
            if progress is not None:
                progress(count + done, steps)

        about |= reverse.run(target.state.get("reverse", {}), told)
    shutil.rmtree(spool)
    return about


def _fits(skeleton: Skeleton, tapped: Tapped) -> bool:
    """Return whether the tensors have the layout of the model's parameters, so that `axis` is right for them."""
    shapes = [skeleton.checkpoint.tensors[name].shape for name in tapped.names]
    return all(tapped.axis < len(shape) and shape[tapped.axis] == tapped.width for shape in shapes)


def _without(skeleton: Skeleton, tensors: Mapping[str, Any]) -> list[str]:
    """Return the matrices in the blocks for which there are no statistics."""
    names = (name for block in skeleton.blocks for name in block.sources)
    return [name for name in names if name not in tensors and len(skeleton.checkpoint.tensors[name].shape) > 1]
