"""Calibrate: run one model on data, and write a folder of statistics."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..process import release_freed_memory
from ..statistics import Choice, Statistics, open_statistics, sum_name
from ..statistics.choice import BATCH_TOKENS
from .batches import Batch
from .forward import check_streamable
from .preparation import STATISTICS, Data, Prepared, fingerprint, prepare
from .skeleton import Skeleton
from .stream import Stream, StreamState
from .taps import Tapped, Taps
from .target import Target, check_absent
from .writer import file_name, write_about, write_sums

__all__ = ["STATISTICS", "calibrate", "run_prepared"]

Progress = Callable[[int, int], None]
"""Called with the number of finished blocks and the number of all blocks."""


def calibrate(
    model: str | Path,
    data: Data,
    out: str | Path,
    *,
    statistics: Sequence[str] = ("gram",),
    sequences: int | None = None,
    length: int | None = None,
    seed: int = 0,
    tokens: str = "all",
    batch_tokens: int = BATCH_TOKENS,
    cache_dir: Path | None = None,
    progress: Progress | None = None,
) -> Statistics:
    """Run a model on text, with one block in memory at a time, and write statistics of the inputs of its matrices.

    An interrupted calibration continues at its block when it is called again with the same arguments.

    Args:
        model: A checkpoint: a folder, a file of weights, or a Hub id.
        data: Files: texts (.txt), or objects with text, prompt and completion, or messages (.jsonl, .parquet). Or a
            `merganser.statistics.Dataset`, which the library `datasets` opens.
        out: The folder to write; it must not exist.
        statistics: Names of the statistics to sum: `gram`, `second_moment`, `magnitude`; `count` is always included.
        sequences: Number of sequences drawn from the data; None for 64, or fewer if the data has fewer.
        length: Largest number of tokens of a sequence; None for 256, or the model's context window if it is smaller.
        seed: Seed of the draw.
        tokens: Which tokens count: `all`, or those of `completions` alone.
        batch_tokens: Largest number of tokens of a batch, with padding.
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
    check_absent(Path(out))
    choice = Choice(sequences, length, seed, tokens)
    with prepare(
        model, data, statistics=statistics, choice=choice, batch_tokens=batch_tokens, cache_dir=cache_dir
    ) as prepared:
        return run_prepared(prepared, Path(out), progress)


def run_prepared(prepared: Prepared, out: Path, progress: Progress | None = None) -> Statistics:
    """Run a prepared calibration, or continue it.

    Args:
        prepared: From `prepare`; it can be run once.
        out: The folder to write; it must not exist.
        progress: Called with the number of finished blocks and of all blocks.

    Raises:
        MergeError: As for `calibrate`.
    """
    skeleton = prepared.skeleton
    skeleton.fill_outside()
    check_streamable(skeleton, prepared.probe())
    about = prepared.about()
    with Target(out, fingerprint(about, prepared.batch_tokens)) as target:
        tensors = _stream(skeleton, prepared.batches(), prepared.statistics, target, progress)
        names = [file_name(number, len(skeleton.blocks)) for number in range(1, len(skeleton.blocks) + 1)]
        write_about(target.folder, {**about, "without": without(skeleton, tensors), "files": names, "tensors": tensors})
        target.publish()
    return open_statistics(out)


def _stream(
    skeleton: Skeleton, batches: Sequence[Batch], statistics: Sequence[str], target: Target, progress: Progress | None
) -> dict[str, Any]:
    """Run all blocks, write the sums of each, and return the description of every tensor with statistics."""
    count = len(skeleton.blocks)
    target.claim(["hidden/", *(file_name(number, count) for number in range(1, count + 1))])
    spool = target.folder / "hidden"
    spool.mkdir(exist_ok=True)
    state = StreamState.from_json(target.state["stream"]) if target.state else None
    tensors: dict[str, Any] = dict(target.state.get("tensors", {}))
    stream = Stream(skeleton, batches, spool, state)
    for index in range(stream.state.done, count):
        if progress is not None:
            progress(index, count)
        if index + 1 < count:
            skeleton.will_need(skeleton.blocks[index + 1])
        taps = Taps(skeleton, skeleton.blocks[index], statistics)
        with skeleton.filled(skeleton.blocks[index]), taps.watching():
            stream.advance(taps.begin)
        found = [tapped for tapped in taps.results() if fits(skeleton, tapped)]
        sums = {sum_name(name, tapped.names[0]): own for tapped in found for name, own in tapped.sums.items()}
        write_sums(target.folder / file_name(index + 1, count), sums)
        tensors |= described(found)
        target.note({"stream": stream.state.to_json(), "tensors": tensors})
        release_freed_memory()
    shutil.rmtree(spool)
    return tensors


def described(block: Sequence[Tapped]) -> dict[str, Any]:
    """Return what statistics.json says of the tensors of a block."""
    return {name: {"axis": own.axis, "stored": own.names[0]} for own in block for name in own.names}


def fits(skeleton: Skeleton, tapped: Tapped) -> bool:
    """Return whether the tensors have the layout of the model's parameters, so that `axis` is right for them."""
    shapes = [skeleton.checkpoint.tensors[name].shape for name in tapped.names]
    return all(tapped.axis < len(shape) and shape[tapped.axis] == tapped.width for shape in shapes)


def without(skeleton: Skeleton, tensors: Mapping[str, Any]) -> list[str]:
    """Return the matrices in the blocks for which there are no statistics."""
    names = (name for block in skeleton.blocks for name in block.sources)
    return [name for name in names if name not in tensors and len(skeleton.checkpoint.tensors[name].shape) > 1]
