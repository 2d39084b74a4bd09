"""Calibrate: run one model on data, and write a folder of statistics."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...errors import suggest_keywords
from ...process import release_freed_memory
from ...statistics import Choice, Statistics, open_statistics, sum_name
from ...statistics.choice import BATCH_TOKENS
from ..data.batches import Batch, longest_first
from ..forward.forward import check_streamable
from ..forward.skeleton import Skeleton
from ..forward.stream import Stream, StreamState
from ..output.target import Target, check_absent
from ..output.writer import file_name, write_about, write_sums
from ..reverse import GRADIENTS, Loss, Reverse, check_predicts
from ..sums.reducers import REDUCERS
from ..sums.taps import Tapped, Taps, check_inputs
from .preparation import STATISTICS, Data, Prepared, check_given, fingerprint, prepare

__all__ = ["STATISTICS", "calibrate", "run_prepared"]

Progress = Callable[[int, int], None]
"""Called with the number of finished blocks and the number of all blocks."""

_SPOOL = "hidden"


@suggest_keywords
def calibrate(
    model: str | Path,
    data: Data,
    out: str | Path,
    *,
    statistics: str | Sequence[str] = ("gram",),
    sequences: int | None = None,
    length: int | None = None,
    seed: int = 0,
    tokens: str = "all",
    labels: str = "data",
    batch_tokens: int = BATCH_TOKENS,
    cache_dir: Path | None = None,
    progress: Progress | None = None,
) -> Statistics:
    """Run a model on text, with one block in memory at a time, and write statistics of what it computes.

    An interrupted calibration continues at its block when it is called again with the same arguments.

    Args:
        model: A checkpoint: a folder, a file of weights, or a Hub id.
        data: Files: texts (.txt), or objects with text, prompt and completion, or messages (.jsonl, .parquet). Or a
            `merganser.statistics.Dataset`, which the library `datasets` opens.
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
    check_absent(Path(out))
    check_given(statistics)
    choice = Choice(sequences, length, seed, tokens)
    with prepare(
        model, data, statistics=statistics, choice=choice, labels=labels, batch_tokens=batch_tokens, cache_dir=cache_dir
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
    skeleton, batches = prepared.skeleton, prepared.batches()
    loss = None if prepared.labels is None else Loss(prepared.labels, prepared.choice.seed)
    if loss is not None:
        check_predicts(skeleton, batches)
    skeleton.fill_outside(head=loss is not None)
    check_streamable(skeleton, prepared.probe())
    check_inputs(skeleton, prepared.statistics)
    about, order = prepared.about(), longest_first(prepared.samples)
    with Target(out, fingerprint(about, prepared.batch_tokens)) as target:
        if not target.finished:
            written = _stream(skeleton, batches, prepared.statistics, loss, order, target, progress)
            write_about(target.folder, {**about, "without": without(skeleton, written["tensors"]), **written})
        target.publish([_SPOOL])
    return open_statistics(out)


def _stream(
    skeleton: Skeleton,
    batches: Sequence[Batch],
    statistics: Sequence[str],
    loss: Loss | None,
    order: Sequence[int],
    target: Target,
    progress: Progress | None,
) -> dict[str, Any]:
    """Run all blocks forward, and for a loss backward; write the sums of each, and return their description."""
    count = len(skeleton.blocks)
    files = [file_name(number, count) for number in range(1, count + 1)]
    spool = target.folder / _SPOOL
    state = StreamState.from_json(target.state["stream"]) if target.state else None
    tensors: dict[str, Any] = dict(target.state.get("tensors", {}))
    stream = Stream(skeleton, batches, spool, state, keep=loss is not None)

    def note(reverse: Mapping[str, Any]) -> None:
        target.note({"stream": stream.state.to_json(), "tensors": tensors, "reverse": dict(reverse)})

    wanted = [name for name in statistics if name in GRADIENTS]
    reverse = None if loss is None else Reverse(skeleton, stream, wanted, loss, target, note, order)
    files += [] if reverse is None else reverse.files
    steps = count + (0 if reverse is None else reverse.steps)
    target.claim([f"{_SPOOL}/", *files])
    spool.mkdir(exist_ok=True)
    for index in range(stream.state.done, count):
        if progress is not None:
            progress(index, steps)
        if index + 1 < count:
            skeleton.will_need(skeleton.blocks[index + 1])
        taps = Taps(skeleton, skeleton.blocks[index], [name for name in statistics if name in REDUCERS])
        with skeleton.filled(skeleton.blocks[index]), taps.watching():
            stream.advance(taps.begin)
        found = [tapped for tapped in taps.results() if fits(skeleton, tapped)]
        sums = {sum_name(name, tapped.names[0]): own for tapped in found for name, own in tapped.sums.items()}
        write_sums(target.folder / file_name(index + 1, count), sums)
        tensors |= described(found)
        note({})
        release_freed_memory()
    about: dict[str, Any] = {"files": files, "tensors": tensors}
    if reverse is not None:

        def told(done: int) -> None:
            if progress is not None:
                progress(count + done, steps)

        about |= reverse.run(target.state.get("reverse", {}), told)
    return about


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
