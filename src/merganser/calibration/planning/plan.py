"""Plan a calibration: which sums it will write, and what it takes; no weights are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ...checkpoint import DTYPE_BY_NAME, plan_shards
from ...errors import OutputError
from ...jsonfile import os_reason
from ...statistics import STATISTICS_NAME, CalibrationPlan, Choice, sum_name
from ...statistics.choice import BATCH_TOKENS
from ..forward.forward import Output, run_alone
from ..learning import plan_learning
from ..output.writer import Sum, file_name, write_about
from ..reverse import GRADIENTS, LOSS_FILE, check_predicts
from ..reverse.plan import plan_reverse, planned_sums
from ..single.preparation import Data, Prepared, check_given, prepare
from ..single.run import described, fits, without
from ..sums.reducers import REDUCERS
from ..sums.taps import Tapped, Taps
from .cost import cost_of_forward, forward_operations
from .kinds import KINDS
from .mode import ALONE, Mode

__all__ = ["lay_out", "plan_calibration", "plan_prepared"]


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
    prepared: Prepared, model: str, name: str, mode: Mode = ALONE
) -> tuple[CalibrationPlan, list[list[Tapped]]]:
    """Plan a prepared calibration.

    Every kind of block runs once on a few tokens with weights that are zero, to see which matrices share their inputs.

    Args:
        prepared: From `prepare`.
        model: The model's name for the user.
        name: Name of the folder of its statistics.
        mode: How they are measured.

    Returns:
        The plan, and for every block the tensors that will have statistics; their sums have shapes, but no values.

    Raises:
        UnsupportedError: The blocks cannot be run one at a time, or there is no loss, and one is wanted.
        DataError: No token of the data is predicted, and a loss is wanted.
    """
    if prepared.labels is not None or mode.descent is not None:
        check_predicts(prepared.skeleton, prepared.batches())
    # run also where others take the place of these sums, since this refuses blocks that cannot be run one at a time
    sums, kind = _block_sums(prepared), KINDS[mode.inputs]
    blocks = kind.planned(prepared.skeleton, sums, mode)
    files = [file_name(number, len(blocks)) for number in range(1, len(blocks) + 1)]
    cost = cost_of_forward(prepared, blocks, mode)
    if prepared.labels is not None:
        reverse = plan_reverse(prepared.skeleton, _gradients(prepared), prepared.samples, cost.forward)
        cost = cost.with_reverse(reverse)
        files += reverse.sums
    if mode.descent is not None:
        forward = forward_operations(prepared)
        nbytes = prepared.checkpoint.nbytes
        learning = plan_learning(prepared.skeleton, nbytes, mode.descent, prepared.samples, forward, mode.together)
        cost = cost.with_learning(learning)
    plan = CalibrationPlan(
        model=model,
        name=name,
        data=tuple(Path(file.path).name if Path(file.path).exists() else file.path for file in prepared.files),
        statistics=kind.statistics(prepared.statistics),
        sequences=len(prepared.samples),
        tokens=prepared.tokens,
        counted=prepared.counted,
        bytes_read=cost.read,
        forward_operations=cost.forward,
        sum_operations=cost.sums,
        seconds=cost.seconds(prepared.skeleton.dtype if mode.descent is None else torch.float32),
        peak_memory=cost.memory,
        spool_bytes=cost.spool,
        statistics_bytes=cost.stored,
        files=(STATISTICS_NAME, *files),
        steps=0 if mode.descent is None else mode.descent.steps,
    )
    return plan, blocks


def _gradients(prepared: Prepared) -> list[str]:
    """Return the statistics of gradients that are wanted."""
    return [name for name in prepared.statistics if name in GRADIENTS]


def lay_out(prepared: Prepared, blocks: Sequence[Sequence[Tapped]], folder: Path, mode: Mode = ALONE) -> None:
    """Write statistics without values, for planning a merge that will take them: headers, and files of full size.

    Args:
        prepared: From `prepare`.
        blocks: From `plan_prepared`.
        folder: The folder to write; it must not exist.
        mode: How they are measured.

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
    statistics = list(KINDS[mode.inputs].statistics(prepared.statistics))
    about = {**prepared.about(hashing=False), "statistics": statistics, "inputs": mode.inputs}
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
