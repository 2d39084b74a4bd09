"""Make the sidecars of a merge, one tensor at a time, from the merged model as it was written."""

from __future__ import annotations

import math
import threading
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import xxhash
from torch import Tensor

from ...checkpoint import Reader, TensorInfo
from ...errors import NonFiniteError
from ..kernels.blocks import BLOCK
from ..output.staging import Staging
from ..plan.plan import Plan
from ..plan.sections.sidecars import SHARED, Place, SidecarPlan
from ..plan.tensor import PlannedTensor, holds
from ..stream.threads import join
from ..stream.worker import Stopped
from .codec import OWN, Codec, Codecs, Lazily, Span
from .plan import stored_name

T = TypeVar("T")

_PIECE = 1 << 22


@dataclass
class Errors:
    """Errors of restored tensors: for each task, sums of squares in float64.

    Args:
        error: Of the model minus the restored model.
        model: Of the model.
        delta: Of the task vector, model minus base.
    """

    error: list[float]
    model: list[float]
    delta: list[float]

    @classmethod
    def none(cls, n_tasks: int) -> Errors:
        """Return sums of zero."""
        return cls(*([0.0] * n_tasks for _ in range(3)))

    def add(self, task: int, error: float, model: float, delta: float) -> None:
        """Add the sums of a block."""
        for sums, more in ((self.error, error), (self.model, model), (self.delta, delta)):
            sums[task] += more

    def rows(self) -> list[list[float]]:
        """Return the sums as the journal stores them."""
        return [self.error, self.model, self.delta]


@dataclass
class _Queue:
    """Hands out tensors to threads, and stores the first error."""

    left: int
    lock: threading.Lock = field(default_factory=threading.Lock)
    error: BaseException | None = None
    stopped: bool = False
    taken: int = 0

    @property
    def stopping(self) -> bool:
        return self.stopped or self.error is not None

    def take(self) -> int | None:
        with self.lock:
            if self.stopping or self.taken >= self.left:
                return None
            self.taken += 1
            return self.taken - 1

    def fail(self, error: BaseException) -> None:
        with self.lock:
            self.error = self.error or error

    def stop(self) -> None:
        self.stopped = True


def make_sidecars(
    plan: Plan,
    sidecars: SidecarPlan,
    staging: Staging,
    *,
    first: int,
    device: torch.device,
    allow_nonfinite: bool,
    advance: Callable[[int, int, int], None],
) -> dict[str, Errors]:
    """Encode all tensors, and write their parts.

    Args:
        plan: The plan; its shards are written.
        sidecars: Its sidecars.
        staging: Holds the shards, followed by the sidecar files.
        first: Number of the first tensor's entry in the journal.
        device: Device on which tensors are encoded.
        allow_nonfinite: Store NaN and infinity.
        advance: Called with additional bytes read, bytes written and tensors completed.

    Returns:
        The errors of restoring, by tensor name.

    Raises:
        MergeError: An input is invalid, or the target cannot be written.
    """
    with Reader() as reader:
        work = _Maker(plan, sidecars, staging, reader, device, allow_nonfinite, advance)
        treated = [t for t in plan.tensors if t.name not in sidecars.kept]
        known = work.over_model(treated)
        tensors = [t for t in plan.tensors if not t.copy]

        def make(index: int) -> Errors:
            entry = staging.finished.get((first + index, 0))
            found = work.continued(tensors[index], entry) if entry else None
            if found is None:
                found, written = work.make(tensors[index], known)
                staging.note({"group": first + index, "segment": 0, "out": written, "errors": found.rows()})
            return found

        errors = work.each(len(tensors), make)
    return {tensor.name: found for tensor, found in zip(tensors, errors, strict=True)}


class _Maker:
    """State shared by the threads that make sidecars."""

    def __init__(
        self,
        plan: Plan,
        sidecars: SidecarPlan,
        staging: Staging,
        reader: Reader,
        device: torch.device,
        allow_nonfinite: bool,
        advance: Callable[[int, int, int], None],
    ) -> None:
        self._plan = plan
        self._sidecars = sidecars
        self._staging = staging
        self._reader = reader
        self._device = device
        self._allow = allow_nonfinite
        self._advance = advance
        self._queue = _Queue(0)
        self._n = len(sidecars.tasks)
        self._codecs = Codecs(plan.method, self._n, device)

    def each(self, count: int, work: Callable[[int], T]) -> list[T]:
        """Call a function for 0 to `count` - 1 on several threads; return the results in order."""
        self._queue = queue = _Queue(count)
        results: dict[int, T] = {}

        def thread() -> None:
            while (index := queue.take()) is not None:
                results[index] = work(index)

        join([thread] * min(self._sidecars.workers, max(count, 1)), queue)
        if queue.error is not None:
            raise queue.error
        return [results[index] for index in range(count)]

    def over_model(self, tensors: Sequence[PlannedTensor]) -> dict[str, Tensor]:
        """Measure and solve the statistics over the whole model."""
        known: dict[str, Tensor] = {}
        if not tensors:
            return known
        codec = self._codec(tensors[0])

        def measure(name: str, index: int) -> Tensor:
            parts = self.each(len(tensors), lambda i: self._measure(tensors[i], name, index, known))
            return sum(parts[1:], parts[0])

        codec.solve_statistics(["model"], measure, known, sum(t.size for t in tensors))
        return known

    def make(self, tensor: PlannedTensor, known: dict[str, Tensor]) -> tuple[Errors, str]:
        """Write the parts of a tensor; return the errors of restoring it, and a hash of the written bytes."""
        writer = _Writer(self._sidecars, self._staging, len(self._plan.shards), tensor, self._advance)
        errors = Errors.none(self._n)
        kept = self._sidecars.kept.get(tensor.name)
        if kept is None:
            self._encode(tensor, dict(known), writer, errors)
        else:
            self._keep(tensor, kept, writer, errors)
        overflowing = next((task for task, error in enumerate(errors.error) if not math.isfinite(error)), None)
        if overflowing is not None and not self._allow:
            raise NonFiniteError(
                f"{tensor.name}: what {self._plan.method.name} restores of {self._sidecars.tasks[overflowing].name} is "
                f"not finite: it overflows {tensor.models[overflowing].dtype.name}, that model's dtype; keep it with "
                "--allow-nonfinite"
            )
        return errors, writer.digest()

    def continued(self, tensor: PlannedTensor, entry: Mapping[str, Any]) -> Errors | None:
        """Return the errors that an earlier run measured, if its bytes are still on disk; else None."""
        writer = _Writer(self._sidecars, self._staging, len(self._plan.shards), tensor, self._advance)
        if writer.digest_of_disk() != entry["out"]:
            return None
        self._advance(0, writer.nbytes, 0)
        return Errors(*entry["errors"])

    def _encode(self, tensor: PlannedTensor, known: dict[str, Tensor], writer: _Writer, errors: Errors) -> None:
        codec = self._codec(tensor)
        codec.solve_statistics(
            ["tensor"], lambda name, index: self._measure(tensor, name, index, known), known, tensor.size
        )
        dtypes = [getattr(torch, dtype.name) for dtype in (tensor.dtype, *(model.dtype for model in tensor.models))]
        for span in codec.blocks:
            base, models, merged = self._read_block(codec, tensor, span)
            stored = dict(codec.encode(span, base, models, merged, known, dtypes))
            writer.append(stored)
            for task in self._holding(tensor):
                parts = {name: part if isinstance(part, Tensor) else part[task] for name, part in stored.items()}
                parts |= {name: known[name][task] for name, _, _ in codec.statistics}
                restored = codec.decode(span, task, base, merged, parts).reshape(-1)
                self._compare(errors, task, tensor, base, models[task], restored)
        writer.append({name: list(known[name]) for name, _, _ in codec.statistics})

    def _keep(self, tensor: PlannedTensor, kept: str, writer: _Writer, errors: Errors) -> None:
        """Store copies of the models' tensors ("own") or nothing ("merged"), and add up the errors."""
        for start in range(0, tensor.size, BLOCK):
            end = min(start + BLOCK, tensor.size)
            raw = [self._raw(model, start, end) for model in tensor.models]
            if kept == OWN:
                writer.append({OWN: raw})
            base, models = self._wide(tensor, self._raw(self._base(tensor), start, end)), raw
            merged = self._wide(tensor, self._merged(tensor, start, end))
            for task in self._holding(tensor):
                own = self._wide(tensor, models[task])
                self._compare(errors, task, tensor, base, own, own if kept == OWN else merged)

    def _compare(
        self, errors: Errors, task: int, tensor: PlannedTensor, base: Tensor, model: Tensor, restored: Tensor
    ) -> None:
        """Add the error of a restored block, rounded to the model's dtype."""
        rounded = restored.to(getattr(torch, tensor.models[task].dtype.name)).double()
        wide = model.reshape(-1).double()
        parts = (wide - rounded, wide, wide - base.reshape(-1).double())
        errors.add(task, *(float(part.square().sum()) for part in parts))

    def _measure(self, tensor: PlannedTensor, name: str, index: int, known: dict[str, Tensor]) -> Tensor:
        """Measure a tensor: sum the measurements of its blocks, in order."""
        codec = self._codec(tensor)
        parts = [codec.measure(name, index, *self._read_block(codec, tensor, span), known) for span in codec.blocks]
        return sum(parts[1:], parts[0])

    def _read_block(self, codec: Codec, tensor: PlannedTensor, span: Span) -> tuple[Tensor, Sequence[Tensor], Tensor]:
        """Return a block of the base, of the models and of the merged model, in the compute dtype."""

        def shaped(raw: Tensor) -> Tensor:
            return self._wide(tensor, raw).reshape(span.shape)

        def model(index: int) -> Tensor:
            return shaped(self._raw(tensor.models[index], span.start, span.end))

        models: Sequence[Tensor] = Lazily(model, self._n)
        if codec.sidecar.scope != "matrix":
            models = list(models)
        base = shaped(self._raw(self._base(tensor), span.start, span.end))
        return base, models, shaped(self._merged(tensor, span.start, span.end))

    def _raw(self, info: TensorInfo, start: int, end: int) -> Tensor:
        """Read elements of an input, in its dtype."""
        if self._queue.stopping:
            raise Stopped
        size = info.dtype.itemsize
        data = torch.empty((end - start) * size, dtype=torch.uint8)
        self._reader.read_into(info, start * size, data.numpy().data)
        self._advance(data.numel(), 0, 0)
        return data.view(getattr(torch, info.dtype.name))

    def _merged(self, tensor: PlannedTensor, start: int, end: int) -> Tensor:
        """Read elements of the merged model, as written."""
        size = tensor.dtype.itemsize
        data = torch.empty((end - start) * size, dtype=torch.uint8)
        self._staging.read(tensor.shard, tensor.offset + start * size, data.numpy().data)
        self._advance(data.numel(), 0, 0)
        return data.view(getattr(torch, tensor.dtype.name))

    def _wide(self, tensor: PlannedTensor, raw: Tensor) -> Tensor:
        return raw.to(self._device, getattr(torch, tensor.compute_dtype.name))

    def _base(self, tensor: PlannedTensor) -> TensorInfo:
        assert tensor.base is not None
        return tensor.base

    def _holding(self, tensor: PlannedTensor) -> list[int]:
        return [task for task in range(self._n) if holds(tensor, task)]

    def _codec(self, tensor: PlannedTensor) -> Codec:
        return self._codecs.of(tensor.parameters, tensor.shape)


class _Writer:
    """Writes the parts of one tensor, one block after another, and hashes them."""

    def __init__(
        self,
        sidecars: SidecarPlan,
        staging: Staging,
        first_shard: int,
        tensor: PlannedTensor,
        advance: Callable[[int, int, int], None],
    ) -> None:
        self._staging = staging
        self._first = first_shard
        self._tensor = tensor
        self._advance = advance
        self._places: dict[tuple[int, str], Place] = sidecars.places_of(tensor.name)
        self._written: dict[tuple[int, str], int] = defaultdict(int)
        self._hashes = {key: xxhash.xxh3_128() for key in self._places}

    @property
    def nbytes(self) -> int:
        """Size of all parts, bytes."""
        return sum(place.nbytes for place in self._places.values())

    def append(self, stored: dict[str, Any]) -> None:
        """Write the parts of the next block, without those of tasks whose checkpoint lacks the tensor."""
        for name, part in stored.items():
            for owner, tensor in [(SHARED, part)] if isinstance(part, Tensor) else enumerate(part):
                key = owner, stored_name(self._tensor.name, name)
                if key in self._places:
                    self._write(key, tensor.reshape(-1).contiguous().view(torch.uint8).numpy().data)

    def digest(self) -> str:
        """Return a hash of all written bytes.

        Raises:
            AssertionError: A part does not have its declared size.
        """
        for key, place in self._places.items():
            problem = f"{key[1]}: {self._written[key]} bytes instead of the declared {place.nbytes}"
            assert self._written[key] == place.nbytes, problem
        return self._joined()

    def digest_of_disk(self) -> str:
        """Return the hash of the bytes on disk at the locations of the parts."""
        for key, place in self._places.items():
            buffer = memoryview(bytearray(min(_PIECE, place.nbytes)))
            for at in range(0, place.nbytes, _PIECE):
                piece = buffer[: min(_PIECE, place.nbytes - at)]
                self._staging.read(self._first + place.shard, place.offset + at, piece)
                self._hashes[key].update(piece)
        return self._joined()

    def _write(self, key: tuple[int, str], data: memoryview) -> None:
        place = self._places[key]
        self._staging.write(self._first + place.shard, place.offset + self._written[key], data)
        self._written[key] += data.nbytes
        self._hashes[key].update(data)
        self._advance(0, data.nbytes, 0)

    def _joined(self) -> str:
        return xxhash.xxh3_128_hexdigest(b"".join(found.digest() for found in self._hashes.values()))
