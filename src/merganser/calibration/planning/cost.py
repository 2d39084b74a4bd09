"""What a calibration takes: bytes, operations, memory, and the time for them on this machine; no weights are read."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial

import torch

from ...anatomy.settings.mixtures import COUNTS
from ...checkpoint import DTYPE_BY_NAME
from ...statistics import COUNT
from ..forward.skeleton import Skeleton
from ..learning import LearningPlan
from ..reverse.plan import ReversePlan
from ..single.preparation import Prepared
from ..sums.reducers import REDUCERS, CrossGram, Reducer, products_of
from ..sums.taps import Tapped
from ..within.pairs import CROSS_GRAM
from .kinds import KINDS
from .mode import Mode

__all__ = ["Cost", "cost_of_forward", "forward_operations", "rate_of_sums"]

# resident memory of Python with torch and transformers
_RUNTIME = 500_000_000
# norms, activation functions and attention take about as long as a third of the products
_BESIDE_PRODUCTS = 1.3
_READ_RATE = 1e9
# a step on one batch, in forward passes, as measured: forward, backward, and merging the weights anew
_FIT_PASSES = 5.0
_STARTING = 4.0


@dataclass(frozen=True, slots=True)
class Cost:
    """What a calibration takes.

    Args:
        read: Bytes of weights that are read.
        forward: Floating-point operations of passes through the model.
        sums: Floating-point operations of sums over inputs.
        memory: Largest resident memory, bytes.
        spool: Bytes of hidden states on disk.
        stored: Bytes of statistics.
        beside: Seconds beside reading and these operations.
    """

    read: int
    forward: float
    sums: float
    memory: int
    spool: int
    stored: int
    beside: float = _STARTING

    def seconds(self, dtype: torch.dtype) -> float:
        """Return the seconds that all of it takes on this machine, with a model in this dtype."""
        rate = partial(_rate, dtype, threads=torch.get_num_threads())
        return (
            self.beside
            + self.read / _READ_RATE
            + _BESIDE_PRODUCTS * self.forward / rate(sums=False)
            + self.sums / rate(sums=True)
        )

    def with_reverse(self, reverse: ReversePlan) -> Cost:
        """Return what it takes with the reverse pass behind the forward."""
        return Cost(
            read=self.read + reverse.bytes_read,
            forward=self.forward + reverse.operations,
            sums=self.sums + reverse.gram_operations,
            memory=max(self.memory, _RUNTIME + reverse.peak_memory),
            spool=reverse.spool_bytes,
            stored=self.stored + reverse.stored_bytes,
            beside=self.beside + reverse.adding,
        )

    def with_learning(self, learning: LearningPlan) -> Cost:
        """Return what it takes where coefficients are learnt by passes through the whole model."""
        return replace(
            self,
            read=learning.bytes_read,
            forward=learning.operations,
            memory=_RUNTIME + learning.peak_memory,
            spool=learning.spool_bytes,
        )


def cost_of_forward(prepared: Prepared, blocks: Sequence[Sequence[Tapped]], mode: Mode) -> Cost:
    """Return what passing the data through the blocks takes, with the sums over their inputs."""
    skeleton = prepared.skeleton
    outside = skeleton.outside(head=prepared.labels is not None)
    inside = sum(_nbytes(skeleton, block.sources) for block in skeleton.blocks)
    count = len(prepared.samples)
    # the skeleton may be the merged model, whose weights have other dtypes than those of the model that is read
    share = prepared.checkpoint.nbytes / max(skeleton.checkpoint.nbytes, 1)
    passes = KINDS[mode.inputs].forwards + _FIT_PASSES * mode.steps * min(mode.batch, count) / count
    return Cost(
        read=round(share * (skeleton.checkpoint.nbytes + 2 * inside + _nbytes(skeleton, outside))),
        forward=forward_operations(prepared) * passes,
        sums=sum(_sum_operations(prepared, tapped) for block in blocks for tapped in block),
        memory=_peak_memory(prepared, _loaded(skeleton, outside), blocks, mode),
        spool=_spool_bytes(prepared),
        stored=sum(_stored_bytes(tapped) for block in blocks for tapped in block),
    )


def forward_operations(prepared: Prepared) -> float:
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


def _peak_memory(prepared: Prepared, outside: int, blocks: Sequence[Sequence[Tapped]], mode: Mode) -> int:
    skeleton, kind = prepared.skeleton, KINDS[mode.inputs]
    held = kind.held(mode.together, skeleton.dtype.itemsize)
    largest = max(_loaded(skeleton, block.sources) for block in skeleton.blocks)
    sums = max(sum(_memory(tapped) for tapped in block) for block in blocks) * (
        mode.together if kind.sums_of_all else 1
    )
    widest = max((tapped.width for block in blocks for tapped in block), default=0)
    # float32 rows of the widest input, its products in several steps, and one sum as it is stored
    fed = 4 * min(prepared.batch_tokens, prepared.tokens) * widest * 6
    return (
        _RUNTIME
        + round(held[0] * outside + held[1] * largest)
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
