"""Stream tensors through a merge method: read, compute, write, on several threads at once.

Every worker takes a task, reads its blocks into its own buffer, runs the method and writes the result to its final
position. Reading, arithmetic and writing of different workers overlap, since all three release the GIL. Memory holds
one block of every input per worker, and the inputs that are cached for later passes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ...checkpoint import Reader
from ...checkpoint.float8 import encode_float8
from ...errors import CheckpointError, NonFiniteError
from ..kernels.blocks import TensorRun
from ..kernels.data import Data
from ..kernels.sums import Sum
from ..output.digests import block_digests, digest, digest_cuts
from ..plan.tensor import PlannedTensor
from .buffers import BundleInputs, CachedInputs, InputBuffer
from .bundle import are_alike, merge_alike, merge_together
from .data import block_data
from .groups import Group, Task
from .sample import measure_columns, measure_samples
from .schedule import GroupState


class Stopped(Exception):
    """Raised in a worker when the run is stopped."""


class Output(Protocol):
    """Receives the output's bytes."""

    def write(self, shard: int, offset: int, data: memoryview) -> None:
        """Write bytes at their final position in a shard."""


@dataclass(frozen=True, slots=True)
class Context:
    """What all workers of a process share.

    Args:
        reader: Reads inputs.
        output: Receives the output.
        device: Where kernels run.
        advance: Called with additional bytes read, bytes written and tensors completed.
        stopping: Returns whether workers should stop after their current block.
        allow_nonfinite: Merge NaN and infinity.
        recorded: Whether to hash and measure what is read and written, for the run record.
    """

    reader: Reader
    output: Output
    device: torch.device
    advance: Callable[[int, int, int], None]
    stopping: Callable[[], bool]
    allow_nonfinite: bool
    recorded: bool = True


@dataclass(frozen=True, slots=True)
class Done:
    """The result of a task.

    Args:
        sums: For a measuring task: one per tensor of the group, or a single one if it is over the model.
        entry: For a combining task that is recorded: its journal entry, with hashes of what was read and written.
    """

    sums: Sequence[Sum] = ()
    entry: dict[str, Any] | None = None


class Worker:
    """Runs tasks on one thread, with a buffer of its own."""

    def __init__(self, context: Context) -> None:
        self._c = context
        self._buffer = InputBuffer(context.reader, pinned=context.device.type == "cuda")
        self._stream = torch.cuda.Stream(context.device) if context.device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def do(self, state: GroupState, task: Task) -> Done:
        """Run a task.

        Raises:
            Stopped: The run was asked to stop.
            MergeError: An input is invalid, or the target cannot be written.
        """
        if self._stream is None:
            return self._do(state, task)
        with torch.cuda.stream(self._stream):
            return self._do(state, task)

    def _do(self, state: GroupState, task: Task) -> Done:
        if task.pass_number not in (-1, len(state.measurements)):
            return Done(sums=self._measure_group(state, task))
        if state.group.bundle:
            return Done(entry=self._combine_bundle(state, measure=task.pass_number == -1))
        run = state.runs[0]
        assert run is not None
        return Done(entry=self._combine_segment(state, task, run))

    def _ranges(self, run: TensorRun, group: Group, segment: int) -> Sequence[tuple[int, int]]:
        first, end = group.segments[segment]
        return run.ranges if group.bundle else run.ranges[first:end]

    def _measure_group(self, state: GroupState, task: Task) -> list[Sum]:
        """Measure a segment of every tensor of a group."""
        name, index, over = state.measurements[task.pass_number]
        largest = any(run is not None and run.kernels.round(name, index).largest for run in state.runs)
        sums = [Sum(largest=largest) for _ in (state.runs[:1] if over == "model" else state.runs)]
        for i, (tensor, run) in enumerate(zip(state.group.tensors, state.runs, strict=True)):
            # some of the tensors may know theirs after an earlier round
            if run is not None and tensor.size and name not in state.known[i]:
                ranges = self._ranges(run, state.group, task.segment)
                total: Tensor | None = None
                for range_ in ranges:
                    inputs = self._read(tensor, *range_, state.kept)
                    sent, data = self._split(tensor, inputs), self._data(tensor, run, range_)
                    total, finite = run.measure(name, index, state.known[i], range_, *sent, total, data)
                    if not finite:
                        self._refuse(tensor, inputs)
                assert total is not None
                sums[0 if over == "model" else i].add((tensor.name, task.segment), total)
        return sums

    def _combine_segment(self, state: GroupState, task: Task, run: TensorRun) -> dict[str, Any] | None:
        group, known, recorded = state.group, state.known[0], self._c.recorded
        tensor = group.tensors[0]
        ranges = self._ranges(run, group, task.segment)
        for other in tensor.inputs if state.kept is None else ():
            size = other.dtype.itemsize
            self._c.reader.will_need(other, ranges[0][0] * size, (ranges[-1][1] - ranges[0][0]) * size)
        hashes: list[list[bytes]] = [[] for _ in tensor.inputs]
        written: list[bytes] = []
        scales: list[Tensor] = []
        sample: list[dict[str, Any]] = []
        for start, end in ranges:
            inputs = self._read(tensor, start, end, state.kept)
            for found, data in zip(hashes, inputs, strict=True) if recorded else ():
                found += block_digests(tensor.shape, start, end, _bytes(data), tensor.block_limit)
            merged = self._merge(run, tensor, known, start, end, inputs)
            if tensor.gguf is not None:
                check_encodable(tensor, merged)
                written += self._write(tensor, start, tensor.gguf.encode(merged))
            elif tensor.quantised is not None:
                check_encodable(tensor, merged)
                codes, own = encode_float8(merged.view(-1, tensor.shape[1]), tensor.quantised.scheme)
                written += self._write(tensor, start, codes)
                scales.append(own)
            else:
                written += self._write(tensor, start, merged)
            if start == 0 and recorded:
                sample = measure_samples([tensor], [inputs], [merged])
        if scales:
            written += self._write_scales(tensor, ranges[0][0], ranges[-1][1], torch.cat(scales))
        self._c.advance(0, 0, 1 if task.segment == len(group.segments) - 1 else 0)
        if not recorded:
            return None
        entry: dict[str, Any] = {"in": [_hex(found) for found in hashes], "out": _hex(written)}
        if sample:
            entry["sample"] = sample
        return entry

    def _combine_bundle(self, state: GroupState, *, measure: bool) -> dict[str, Any] | None:
        """Merge many small tensors; adjacent inputs are read, and the results written, with one call."""
        tensors = state.group.tensors
        inputs = self._buffer.read_bundle(tensors)
        self._c.advance(inputs.nbytes, 0, 0)
        outputs: list[Tensor] = []
        whole = self._merge_whole(state, inputs)
        if whole is not None:
            written = self._write(tensors[0], 0, whole)
        else:
            outputs, written = self._merge_bundle(state, inputs.each, measure=measure)
        self._c.advance(0, 0, len(tensors))
        if not self._c.recorded:
            return None
        if whole is not None:
            sample = measure_columns(tensors, inputs.columns or (), whole)
        else:
            sample = measure_samples(tensors, inputs.each, outputs)
        # many tensors share a shape, so compute the cuts once per shape
        cuts = {
            shape: digest_cuts(shape, 0, math.prod(shape), tensors[0].block_limit)
            for shape in {tensor.shape for tensor in tensors}
        }
        hashes = inputs.digests([cuts[tensor.shape] for tensor in tensors])
        return {"in": _hex(hashes), "out": _hex(written), "sample": sample}

    def _merge_whole(self, state: GroupState, inputs: BundleInputs) -> Tensor | None:
        """Merge tensors of one size that can be merged in one call as they lie in the buffer; None if they cannot."""
        if inputs.columns is None or not are_alike(state.runs):
            return None
        base, models = self._split(state.group.tensors[0], inputs.columns)
        return merge_alike(state.runs, base, models, allow_nonfinite=self._c.allow_nonfinite)

    def _merge_bundle(
        self, state: GroupState, inputs: list[list[Tensor]], *, measure: bool
    ) -> tuple[list[Tensor], list[bytes]]:
        """Merge and write; return the outputs, flat, and the hashes of what was written."""
        tensors = state.group.tensors

        def split(index: int, found: list[Tensor]) -> tuple[Tensor | None, list[Tensor]]:
            return self._split(tensors[index], found)

        outputs: dict[int, Tensor] = {}
        alike = merge_together(state.runs, inputs, split, allow_nonfinite=self._c.allow_nonfinite)
        for found, merged in alike:
            if len(found) == len(tensors):
                # the tensors are already in the order of the output, so no copy is needed
                return [*torch.split(merged, [tensor.size for tensor in tensors])], self._write(tensors[0], 0, merged)
            outputs.update(zip(found, torch.split(merged, [tensors[i].size for i in found]), strict=True))
        for i, own in enumerate(inputs):
            if i not in outputs:
                outputs[i] = self._merge_small(state, i, own, measure=measure)
        together = [outputs[i] for i in range(len(tensors))]
        return together, self._write_together(tensors, together)

    def _merge_small(self, state: GroupState, index: int, inputs: list[Tensor], *, measure: bool) -> Tensor:
        """Copy a tensor of a bundle, or measure, solve and combine it; return it flat."""
        tensor, run, known = state.group.tensors[index], state.runs[index], state.known[index]
        if run is None:
            return self._copy(tensor, inputs)
        if not run.ranges:
            return torch.empty(0, dtype=run.kernels.output)
        if measure:
            sent = self._split(tensor, inputs)
            known = run.solve_statistics(
                lambda *_: sent, lambda _: self._refuse(tensor, inputs), lambda *own: self._data(tensor, run, own)
            )
        return self._merge(run, tensor, known, *run.ranges[0], inputs)

    def _merge(
        self,
        run: TensorRun,
        tensor: PlannedTensor,
        known: dict[str, Tensor],
        start: int,
        end: int,
        inputs: list[Tensor],
    ) -> Tensor:
        data = self._data(tensor, run, (start, end))
        merged, finite = run.combine(known, (start, end), *self._split(tensor, inputs), data)
        if not finite and not self._c.allow_nonfinite:
            self._refuse(tensor, inputs)
        if self._c.stopping():
            raise Stopped
        return merged.cpu()

    def _data(self, tensor: PlannedTensor, run: TensorRun, range_: tuple[int, int]) -> Data:
        return block_data(tensor, run, range_, self._c.reader) if tensor.data else {}

    def _refuse(self, tensor: PlannedTensor, inputs: Sequence[Tensor]) -> None:
        """Raise an error that names the input that is not finite.

        Raises:
            NonFiniteError: Always, unless such numbers are allowed.
        """
        if self._c.allow_nonfinite:
            return
        for source, data in zip(tensor.inputs, inputs, strict=True):
            if not torch.isfinite(data).all():
                raise NonFiniteError(
                    f"{source.file}: tensor {source.name!r} holds NaN or infinity; "
                    "merge it all the same with --allow-nonfinite"
                )
        raise NonFiniteError(
            f"{tensor.name}: the merged tensor is not finite, though its inputs are: it overflows {tensor.dtype.name}; "
            "choose a wider dtype or smaller weights, or keep it with --allow-nonfinite"
        )

    def _copy(self, tensor: PlannedTensor, inputs: Sequence[Tensor]) -> Tensor:
        """Copy an integer tensor; all inputs must have the same values."""
        first, *others = (data.reshape(-1).view(torch.uint8) for data in inputs)
        for source, other in zip(tensor.inputs[1:], others, strict=True):
            if not torch.equal(first, other):
                raise CheckpointError(
                    f"{tensor.name}: this {tensor.dtype.name} buffer differs between {tensor.inputs[0].file} and "
                    f"{source.file}; whole numbers are copied when equal, not merged"
                )
        return inputs[0].reshape(-1).clone()

    def _read(self, tensor: PlannedTensor, start: int, end: int, kept: CachedInputs | None) -> list[Tensor]:
        """Read elements of every input, from the cache if there is one; valid until the next read."""
        if self._c.stopping():
            raise Stopped
        inputs, nbytes = self._buffer.read(tensor, start, end, kept)
        self._c.advance(nbytes, 0, 0)
        return inputs

    def _send(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Move inputs to the device."""
        if self._stream is None:
            return list(inputs)
        return [tensor.to(self._c.device, non_blocking=True) for tensor in inputs]

    def _split(self, tensor: PlannedTensor, inputs: Sequence[Tensor]) -> tuple[Tensor | None, list[Tensor]]:
        sent = self._send(inputs)
        return (None, sent) if tensor.base is None else (sent[0], sent[1:])

    def _write_scales(self, tensor: PlannedTensor, start: int, end: int, scales: Tensor) -> list[bytes]:
        shard, offset, _ = tensor.scale_span(start, end)
        data = _bytes(scales)
        self._c.output.write(shard, offset, data)
        self._c.advance(0, data.nbytes, 0)
        return self._digests(data)

    def _write(self, tensor: PlannedTensor, start: int, merged: Tensor) -> list[bytes]:
        data = _bytes(merged)
        shard, offset, _ = tensor.span(start, start)
        self._c.output.write(shard, offset, data)
        self._c.advance(0, data.nbytes, 0)
        return self._digests(data)

    def _write_together(self, tensors: Sequence[PlannedTensor], outputs: Sequence[Tensor]) -> list[bytes]:
        """Write a bundle with one call; its tensors are adjacent in the output."""
        if len(outputs) == 1:
            return self._write(tensors[0], 0, outputs[0])
        data = b"".join(_bytes(output) for output in outputs)
        self._c.output.write(tensors[0].shard, tensors[0].offset, memoryview(data))
        self._c.advance(0, len(data), 0)
        return self._digests(data)

    def _digests(self, data: bytes | memoryview) -> list[bytes]:
        """Return the hash of what was written; nothing where none is recorded."""
        return [digest(data)] if self._c.recorded else []


def check_encodable(tensor: PlannedTensor, merged: Tensor) -> None:
    """Refuse merged values that a type with scales cannot store.

    Raises:
        NonFiniteError: They hold NaN or infinity, which would spoil all values that share the scale, or are too large.
    """
    largest = math.inf if tensor.gguf is None else tensor.gguf.largest
    if largest is None:
        return
    if not torch.isfinite(merged).all():
        told, key = ("float8", "quantize") if tensor.gguf is None else (tensor.gguf.type.name, "gguf")
        raise NonFiniteError(
            f"{tensor.name}: the merged tensor holds NaN or infinity, which {told} with scales cannot store; leave out "
            f"'{key}' to keep it"
        )
    if largest < math.inf and merged.abs().max() > largest:
        raise NonFiniteError(
            f"{tensor.name}: the merged tensor holds values above {largest:,.0f}, which overflow the float16 scales of "
            f"{tensor.stored_as}; write 'gguf: F32'"
        )


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.reshape(-1).contiguous().view(torch.uint8).numpy().data


def _hex(digests: Sequence[bytes]) -> str:
    return b"".join(digests).hex()
