"""Plan a calibration: which sums it will write, and what it takes; no weights are read."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch

from ..anatomy.settings.mixtures import COUNTS
from ..checkpoint import DTYPE_BY_NAME, plan_shards
from ..errors import OutputError
from ..jsonfile import os_reason
from ..statistics import COUNT, STATISTICS_NAME, CalibrationPlan, Choice, sum_name
from ..statistics.choice import BATCH_TOKENS
from .forward.forward import Output, run_alone
from .forward.skeleton import Skeleton
from .learning import Descent, plan_learning
from .learning import planned_coefficients as planned_learnt
from .preparation import Data, Prepared, check_given, prepare
from .reducers import REDUCERS, CrossGram, Reducer, products_of
from .reverse import GRADIENTS, LOSS_FILE, check_predicts
from .reverse.plan import plan_reverse, planned_sums
from .run import described, fits, without
from .taps import Tapped, Taps
from .within.fitting import COEFFICIENTS, planned_coefficients
from .within.pairs import CROSS_GRAM, planned_pairs
from .within.zipping import GROUPS, planned_groups
from .writer import Sum, file_name, write_about

__all__ = ["lay_out", "plan_calibration", "plan_prepared", "rate_of_sums"]

# resident memory of Python with torch and transformers
_RUNTIME = 500_000_000
# norms, activation functions and attention take about as long as a third of the products
_BESIDE_PRODUCTS = 1.3
_READ_RATE = 1e9
# within a merge the data pass through the merged blocks, too, and through the models' own to be compared with
_FORWARDS = {"own": 1.0, "prefix": 2.0, "merged": 3.0, "fitted": 3.0, "mean": 1.0, "zipped": 1.0, "end_to_end": 1.0}
# forward and backward of a step on one batch, and the weights made anew of all task vectors, as measured
_FIT_PASSES = 5.0
_STARTING = 4.0


def plan_calibration(
    model: str | Path,
    data: Data,
    *,
    statistics: str | Sequence[str] = ("gram",),
    sequences: int | None = None,
    length: int | None = None,
    seed: int = 0,
    tokens: str = "all",
    labels: str = "data",
    batch_tokens: int = BATCH_TOKENS,
    cache_dir: Path | None = None,
) -> CalibrationPlan:
    """Plan what `calibrate` with the same arguments would take; no weights are read, and nothing is written.

    Raises:
        MergeError: As for `calibrate`.
    """
    check_given(statistics)
    choice = Choice(sequences, length, seed, tokens)
    with prepare(
        model, data, statistics=statistics, choice=choice, labels=labels, batch_tokens=batch_tokens, cache_dir=cache_dir
    ) as prepared:
        return plan_prepared(prepared, str(model), Path(model).name)[0]


def plan_prepared(
    prepared: Prepared,
    model: str,
    name: str,
    inputs: str = "own",
    together: int = 1,
    descent: Descent | None = None,
    steps: int = 0,
    batch: int = 0,
) -> tuple[CalibrationPlan, list[list[Tapped]]]:
    """Plan a prepared calibration.

    Every kind of block runs once on a few tokens with weights that are zero, to see which matrices share their inputs.

    Args:
        prepared: From `prepare`.
        model: The model's name for the user.
        name: Name of the folder of its statistics.
        inputs: What computes the inputs, as in `FromData`.
        together: Number of models that are measured together.
        descent: The steps in which coefficients are learnt; None if none are.
        steps: The number of steps in which coefficients are fitted, block by block.
        batch: The number of sequences in such a step.

    Returns:
        The plan, and for every block the tensors that will have statistics; their sums have shapes, but no values.

    Raises:
        UnsupportedError: The blocks cannot be run one at a time, or there is no loss, and one is wanted.
        DataError: No token of the data is predicted, and a loss is wanted.
    """
    skeleton = prepared.skeleton
    if prepared.labels is not None or descent is not None:
        check_predicts(skeleton, prepared.batches())
    found = _block_sums(prepared)
    if inputs in ("merged", "mean"):
        found = [planned_pairs(skeleton, block) for block in found]
    if descent is not None:
        found = planned_learnt(skeleton, descent)
    if inputs == "fitted":
        found = [planned_coefficients(skeleton, block) for block in skeleton.blocks]
    if inputs == "zipped":
        found = [planned_groups(skeleton, block) for block in skeleton.blocks]
    inside = sum(_nbytes(skeleton, block.sources) for block in skeleton.blocks)
    outside = skeleton.outside(head=prepared.labels is not None)
    forward = _forward_operations(prepared)
    count = len(prepared.samples)
    forward *= _FORWARDS[inputs] + _FIT_PASSES * steps * min(batch, count) / count
    sums = sum(_sum_operations(prepared, tapped) for block in found for tapped in block)
    read = skeleton.checkpoint.nbytes + 2 * inside + _nbytes(skeleton, outside)
    memory, spool = _peak_memory(prepared, _loaded(skeleton, outside), found, inputs, together), _spool_bytes(prepared)
    stored = sum(_stored_bytes(tapped) for block in found for tapped in block)
    files = [file_name(number, len(found)) for number in range(1, len(found) + 1)]
    seconds = _STARTING
    if prepared.labels is not None:
        reverse = plan_reverse(skeleton, _gradients(prepared), prepared.samples, forward)
        forward, sums, read = forward + reverse.operations, sums + reverse.gram_operations, read + reverse.bytes_read
        memory, spool = max(memory, _RUNTIME + reverse.peak_memory), reverse.spool_bytes
        stored, seconds = stored + reverse.stored_bytes, seconds + reverse.adding
        files += reverse.sums
    if descent is not None:
        learning = plan_learning(skeleton, descent, prepared.samples, _forward_operations(prepared), together)
        forward, read = learning.operations, learning.bytes_read
        memory, spool = _RUNTIME + learning.peak_memory, learning.spool_bytes
    rate = partial(_rate, skeleton.dtype if descent is None else torch.float32, threads=torch.get_num_threads())
    seconds += read / _READ_RATE + _BESIDE_PRODUCTS * forward / rate(sums=False) + sums / rate(sums=True)
    return (
        CalibrationPlan(
            model=model,
            name=name,
            data=tuple(Path(file.path).name if Path(file.path).exists() else file.path for file in prepared.files),
            statistics=statistics_of(prepared, inputs),
            sequences=len(prepared.samples),
            tokens=prepared.tokens,
            counted=prepared.counted,
            bytes_read=read,
            forward_operations=forward,
            sum_operations=sums,
            seconds=seconds,
            peak_memory=memory,
            spool_bytes=spool,
            statistics_bytes=stored,
            files=(STATISTICS_NAME, *files),
            steps=0 if descent is None else descent.steps,
        ),
        found,
    )


def _gradients(prepared: Prepared) -> list[str]:
    """Return the statistics of gradients that are wanted."""
    return [name for name in prepared.statistics if name in GRADIENTS]


def statistics_of(prepared: Prepared, inputs: str) -> tuple[str, ...]:
    """Return the names of all statistics that are measured."""
    extra: tuple[str, ...] = ()
    if inputs in ("merged", "mean"):
        extra = (CROSS_GRAM,)
    elif inputs in ("fitted", "end_to_end"):
        extra = (COEFFICIENTS,)
    elif inputs == "zipped":
        extra = (GROUPS,)
    return (*prepared.statistics, *extra)


def lay_out(prepared: Prepared, blocks: Sequence[Sequence[Tapped]], folder: Path, inputs: str = "own") -> None:
    """Write statistics without values, for planning a merge that will take them: headers, and files of full size.

    Args:
        prepared: From `prepare`.
        blocks: From `plan_prepared`.
        folder: The folder to write; it must not exist.
        inputs: What computes the inputs, as in `FromData`.

    Raises:
        OutputError: It cannot be written.
    """
    tensors: dict[str, Any] = {}
    names = [file_name(number, len(blocks)) for number in range(1, len(blocks) + 1)]
    gradients: dict[str, list[str]] = {}
    try:
        folder.mkdir(parents=True)
        for name, block in zip(names, blocks, strict=True):
            sums = {sum_name(kind, own.names[0]): each for own in block for kind, each in own.sums.items()}
            _reserve(folder / name, sums)
            tensors |= described(block)
        reverse = {} if prepared.labels is None else _planned_sums(prepared)
        for name, planned in reverse.items():
            _reserve(
                folder / name, {sum_name(kind, own) if own else kind: each for (kind, own), each in planned.items()}
            )
            for kind, own in planned if name != LOSS_FILE else ():
                gradients.setdefault(own, []).append(kind)
    except OSError as error:
        raise OutputError(f"{folder}: cannot be written: {os_reason(error)}") from None
    about = {**prepared.about(hashing=False), "statistics": list(statistics_of(prepared, inputs)), "inputs": inputs}
    about |= {"without": without(prepared.skeleton, tensors), "files": [*names, *reverse], "tensors": tensors}
    about |= {"gradients": gradients, "without_gradients": []} if reverse else {}
    write_about(folder, about)


def _planned_sums(prepared: Prepared) -> Mapping[str, Mapping[tuple[str, str], Sum]]:
    return planned_sums(prepared.skeleton, _gradients(prepared), len(prepared.samples))


def _reserve(file: Path, sums: Mapping[str, Sum]) -> None:
    """Write the header of a file with these sums, and give it its size; all values are zero."""
    described_sums = [(key, DTYPE_BY_NAME[own.dtype], own.shape) for key, own in sums.items()]
    (shard,) = plan_shards(described_sums, 1 << 63, {}, stem=file.name.removesuffix(".safetensors"))
    with file.open("wb") as target:
        target.write(shard.header)
        target.truncate(shard.size)


def _block_sums(prepared: Prepared) -> list[list[Tapped]]:
    """Return the sums of every block, without values: each runs once on a few tokens, with weights that are zero."""
    skeleton, batch = prepared.skeleton, prepared.probe()
    before: dict[int, Output] = {}
    found: list[list[Tapped]] = []
    with skeleton.zeroed():
        for index, block in enumerate(skeleton.blocks):
            taps = Taps(skeleton, block, [each for each in prepared.statistics if each in REDUCERS], summed=False)
            with taps.watching():
                taps.begin(batch)
                before[block.stack] = run_alone(skeleton, index, batch, before)
            found.append([tapped for tapped in taps.results() if fits(skeleton, tapped)])
    return found


def _forward_operations(prepared: Prepared) -> float:
    """Return the floating-point operations of all blocks: two per weight and token, and the products of attention."""
    found = 0.0
    for block in prepared.skeleton.blocks:
        lengths = [len(sample.stacks[block.stack].ids) for sample in prepared.samples]
        weights = sum(p.numel() * _share(prepared.skeleton, name) for name, p in block.module.named_parameters())
        width = getattr(prepared.skeleton.model.config.get_text_config(), "hidden_size", 0)
        found += 2.0 * weights * sum(lengths) + 4.0 * width * sum(length**2 for length in lengths)
    return found


def _share(skeleton: Skeleton, name: str) -> float:
    """Return the share of a parameter that a token uses: of the experts of a mixture, those that are chosen."""
    config = skeleton.model.config.get_text_config()
    chosen = getattr(config, "num_experts_per_tok", None)
    for key in COUNTS:
        count = getattr(config, key, None)
        if ".experts." in f".{name}." and isinstance(count, int) and isinstance(chosen, int) and count:
            return chosen / count
    return 1.0


def _sum_operations(prepared: Prepared, tapped: Tapped) -> float:
    """Return the floating-point operations of the sums of one matrix."""
    name = prepared.skeleton.targets[tapped.names[0]].parameter
    rows = prepared.counted * _share(prepared.skeleton, name)
    # a Gram matrix is summed in panels, slightly more than its half
    return 2.0 * rows * _memory_of(tapped) / 8


def _spool_bytes(prepared: Prepared) -> int:
    """Return the bytes of hidden states on disk: before and after the block that runs, for each stack."""
    width = getattr(prepared.skeleton.model.config.get_text_config(), "hidden_size", 0)
    return 2 * prepared.tokens * width * prepared.skeleton.dtype.itemsize


def _peak_memory(
    prepared: Prepared, outside: int, blocks: Sequence[Sequence[Tapped]], inputs: str, together: int
) -> int:
    # of weights, within a merge: a block and as it is merged; or the blocks of both, each with what is outside
    skeleton = prepared.skeleton
    # for a fit the block's base, task vectors and gradient in float32, too
    wide = (together + 3) * 4 / skeleton.dtype.itemsize
    held = {
        "own": (1, 1),
        "prefix": (1, 2),
        "merged": (2, 3),
        "fitted": (2, 2 + wide),
        "mean": (together, together),
        "zipped": (together, together),
        "end_to_end": (1, 1),
    }[inputs]
    largest = max(_loaded(skeleton, block.sources) for block in skeleton.blocks)
    sums = max(sum(_memory(tapped) for tapped in block) for block in blocks) * (together if inputs == "mean" else 1)
    widest = max((tapped.width for block in blocks for tapped in block), default=0)
    # float32 rows of the widest input, its products in several steps, and one sum as it is stored
    fed = 4 * min(prepared.batch_tokens, prepared.tokens) * widest * 6
    return (
        _RUNTIME
        + held[0] * outside
        + round(held[1] * largest)
        + sums
        + fed
        + 4 * widest**2 * ("gram" in prepared.statistics)
    )


def _memory(tapped: Tapped) -> int:
    count = tapped.sums[COUNT].shape[0] if tapped.sums[COUNT].shape else 1
    return count * _memory_of(tapped)


def _memory_of(tapped: Tapped) -> int:
    """Return the bytes of the sums of one matrix, or of one expert, while they are computed."""
    kinds: dict[str, type[Reducer] | type[CrossGram]] = {**REDUCERS, CROSS_GRAM: CrossGram}
    return sum(kinds[kind].memory_of(tapped.width) for kind in tapped.sums if kind in kinds)


def _stored_bytes(tapped: Tapped) -> int:
    return sum(DTYPE_BY_NAME[own.dtype].nbytes(math.prod(own.shape)) for own in tapped.sums.values())


def _nbytes(skeleton: Skeleton, names: Iterable[str]) -> int:
    return sum(skeleton.checkpoint.tensors[name].nbytes_stored for name in names)


def _loaded(skeleton: Skeleton, names: Iterable[str]) -> int:
    """Return the bytes of tensors in memory, in the dtype of the model."""
    return sum(skeleton.checkpoint.tensors[name].numel for name in names) * skeleton.dtype.itemsize


def rate_of_sums(dtype: torch.dtype) -> float:
    """Return the floating-point operations per second of sums over the inputs of blocks in this dtype, as measured."""
    return _rate(dtype, sums=True, threads=torch.get_num_threads())


@lru_cache
def _rate(dtype: torch.dtype, *, sums: bool, threads: int) -> float:
    """Measure floating-point operations per second of products: of blocks in this dtype, or of sums over their inputs.

    It takes about a tenth of a second; the number of threads is an argument only because the rate depends on it.
    """
    width, rows = 1024, 256
    left, right = torch.ones(rows, width, dtype=dtype), torch.ones(width, width, dtype=dtype)
    best = math.inf
    for _ in range(4):
        # processor time, as other programs may be running
        start = time.process_time()
        if sums:
            with products_of(dtype):
                left.float().T @ left.float()
        else:
            torch.nn.functional.linear(left, right)
        best = min(best, (time.process_time() - start) / threads)
    return 2.0 * rows * width * width / max(best, 1e-9)
