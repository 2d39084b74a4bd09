"""Restore a task's tensors from an output: from index, parts, merged model and base."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any

import torch
from torch import Tensor

from ...checkpoint import DTYPE_BY_NAME, INDEX_NAME, Checkpoint, DType, Reader, TensorInfo
from ...checkpoint.files.weights import is_weight_file
from ...errors import CheckpointError, NotFoundError, ParameterError, UnsupportedError, did_you_mean
from ...method import MergeMethod, Part
from ...method.registry import get_method
from ...record.format import RECORD_NAME
from ...wording import brief
from ..kernels.blocks import BLOCK, block_step
from ..output.digests import block_digests, digest
from ..plan.sections.sidecars import INDEX_FILE
from .codec import OWN, Codec, Codecs, Span
from .index import INDEX_FORMAT
from .plan import is_folder_name, needs_base, stored_name


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """How one tensor of a task is restored.

    Args:
        name: Its name.
        dtype: Its dtype in the task's checkpoint.
        kept: "own" if a copy is stored, "merged" if the merged tensor is used, None if it is decoded from parts.
        parameters: Parameters of the method, by their names in recipes; None unless it is decoded from parts.
        base: Name of the base's tensor, if that is needed.
        base_digest: Hash of that tensor, hexadecimal.
        wide: Whether it is decoded in float64.
    """

    name: str
    dtype: DType
    kept: str | None
    parameters: Mapping[str, Any] | None
    base: str | None
    base_digest: str
    wide: bool


@dataclass(frozen=True, slots=True)
class StoredTask:
    """The index's entry of a task.

    Args:
        method: The method that stored it.
        position: Its position among the tasks.
        n_tasks: Number of tasks.
        parts: Files of its parts and of shared parts.
        files: Files of its checkpoint besides weights: path relative to the output, by name.
        tensors: Its tensors.
        base: Where the base was when it was merged: "model", "revision" and "path"; None if no tensor needs it.
    """

    method: MergeMethod
    position: int
    n_tasks: int
    parts: Sequence[str]
    files: Mapping[str, str]
    tensors: Sequence[StoredTensor]
    base: Mapping[str, str | None] | None


def read_task(out: Path, index: Mapping[str, Any], task: str) -> StoredTask:
    """Read and check a task's entry in an index.

    Args:
        out: The output.
        index: Its index of sidecars.
        task: Name of the task.

    Raises:
        NotFoundError: There is no such task.
        UnsupportedError: The index is of a later version, or the method changed.
        CheckpointError: The index is damaged.
    """
    where = out / INDEX_FILE
    try:
        return _read_task(out, index, task)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, ParameterError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{where}: is damaged, or no index of sidecars: {error}; merge again") from None


def _read_task(out: Path, index: Mapping[str, Any], task: str) -> StoredTask:
    where = out / INDEX_FILE
    if index["format"] != INDEX_FORMAT:
        raise UnsupportedError(
            f"{where}: format {index['format']} is of a later version; this one reads {INDEX_FORMAT}"
        )
    names = [_task_name(entry["name"]) for entry in index["tasks"]]
    if task not in names:
        raise NotFoundError(f"{out}: no task {task!r}.{did_you_mean(task, names)} Tasks: {', '.join(names)}")
    method = get_method(index["method"])
    if method.sidecar is None or method.version != index["version"]:
        raise UnsupportedError(
            f"{where}: was written by {method.name} version {index['version']}, here is version {method.version}; "
            "restore with the merganser that wrote it (its version is in merge.json), or merge again"
        )
    position = names.index(task)
    entry = index["tasks"][position]
    settings = [_checked(method, given, len(names)) for given in index["parameters"]]
    tensors = []
    for name, found in index["tensors"].items():
        dtype = found["dtypes"][position] if isinstance(found["dtypes"], list) else found["dtypes"]
        if dtype is not None:
            tensors.append(_stored_tensor(method, name, DTYPE_BY_NAME[dtype], found, settings))
    parts = [_file_name(file) for file in (*index["shared"], *entry["parts"])]
    files = {_file_name(name): _file_name(file) for name, file in entry["files"].items()}
    if own := [name for name in files if "/" not in name and (name in _OWN_NAMES or is_weight_file(name))]:
        raise ValueError(f"file {brief(own[0])} would take the place of what is restored")
    base = index["base"]
    if base is not None and not all(base[key] is None or isinstance(base[key], str) for key in _BASE):
        raise ValueError(f"base must have texts for {', '.join(_BASE)}, found {brief(base)}")
    if base is None and any(tensor.base is not None for tensor in tensors):
        raise ValueError("tensors need the base of the merge, which is not named")
    return StoredTask(
        method=method, position=position, n_tasks=len(names), parts=parts, files=files, tensors=tensors, base=base
    )


_OWN_NAMES = (INDEX_NAME, RECORD_NAME)
"""Files of a restored checkpoint that are generated, like its weights, not copied."""

_BASE = ("model", "revision", "path")


def _stored_tensor(
    method: MergeMethod, name: str, dtype: DType, found: Mapping[str, Any], settings: Sequence[Mapping[str, Any]]
) -> StoredTensor:
    """Check an index's entry of a tensor."""
    kept, base, digest_, wide = (found.get(key) for key in ("kept", "base", "xxh3_128", "wide"))
    if kept not in (None, OWN, "merged") or not isinstance(wide, bool | None):
        raise ValueError(f"tensor {name!r}: kept is {brief(kept)} and wide is {brief(wide)}")
    parameters = None if kept is not None else settings[found["parameters"]]
    if parameters is not None and needs_base(method, parameters) and base is None:
        raise ValueError(f"tensor {name!r} needs the base's, which is not named")
    if base is not None and not (isinstance(base, str) and isinstance(digest_, str)):
        raise ValueError(f"tensor {name!r}: base and xxh3_128 must be texts, found {brief(base)} and {brief(digest_)}")
    return StoredTensor(
        name=name, dtype=dtype, kept=kept, parameters=parameters, base=base, base_digest=digest_ or "", wide=bool(wide)
    )


def _task_name(name: object) -> str:
    # The name must be valid for a folder, as the task is restored into a folder of this name by default.
    if not isinstance(name, str) or not is_folder_name(name):
        raise ValueError(
            f"task {brief(name)} must be usable as the name of a folder: letters, digits, '.', '_' and '-'"
        )
    return name


def _file_name(name: object) -> str:
    if not isinstance(name, str) or not name:
        raise ValueError(f"the name of a file must be a text, found {brief(name)}")
    # Check as a Windows path, which may have either slash, drives and shares: an index must be safe on every system.
    path = PureWindowsPath(name)
    if path.anchor or ".." in path.parts or "\\" in name:
        raise ValueError(f"file {name!r} would be outside the checkpoint")
    return name


def _checked(method: MergeMethod, given: Mapping[str, Any], n_tasks: int) -> dict[str, Any]:
    """Check parameters like those of a recipe."""
    values: dict[str, Any] = {}
    for name, parameter in method.parameters.items():
        if not parameter.per_model:
            # indices of before 0.1 do not have it
            value = given.get(name, parameter.default) if name == "keep" else given[name]
            values[name] = parameter.check(value, method.name)
        elif len(given[name]) != n_tasks:
            raise ValueError(f"{name} has {len(given[name])} values for {n_tasks} tasks")
        else:
            values[name] = tuple(parameter.check(value, method.name) for value in given[name])
    return values


class Restorer:
    """Restores the tensors of one task.

    Args:
        out: The output.
        task: The index's entry of the task.
        merged: The output as a checkpoint: the merged model.
        parts: Tensors in the files of the task's parts and of the shared parts.
        base: The base, if it is needed.
        reader: Reads all of them.

    Raises:
        CheckpointError: A tensor is missing, or its shape or dtype does not match the index.
    """

    def __init__(
        self,
        out: Path,
        task: StoredTask,
        merged: Checkpoint,
        parts: Mapping[str, TensorInfo],
        base: Checkpoint | None,
        reader: Reader,
    ) -> None:
        self._out = out
        self._task = task
        self._merged = merged
        self._parts = parts
        self._base = base
        self._reader = reader
        self._codecs = Codecs(task.method, task.n_tasks)
        self._compared: set[str] = set()
        for tensor in task.tensors:
            self._check(tensor)

    def shape(self, tensor: StoredTensor) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        return self._merged.tensors[tensor.name].shape

    def pieces(self, tensor: StoredTensor) -> Iterator[tuple[int, Tensor]]:
        """Yield a tensor in pieces: index of the first element, and values, flat, in the tensor's dtype.

        Raises:
            CheckpointError: The base's tensor is not the one that was merged, or a file cannot be read.
        """
        dtype = getattr(torch, tensor.dtype.name)
        if tensor.kept is not None:
            own = tensor.kept == OWN
            source = self._parts[stored_name(tensor.name, OWN)] if own else self._merged.tensors[tensor.name]
            for start in range(0, source.numel, BLOCK):
                yield start, self._read(source, start, min(start + BLOCK, source.numel)).to(dtype)
            return
        codec = self._codec(tensor)
        self._check_base(tensor)
        positions = dict.fromkeys(codec.all_parts, 0)
        for span in codec.blocks:
            stored = self._stored(codec, tensor, span, positions)
            restored = codec.decode(
                span,
                self._task.position,
                None if tensor.base is None else self._wide(tensor, self._base_tensor(tensor), span),
                self._wide(tensor, self._merged.tensors[tensor.name], span),
                stored,
            )
            yield span.start, restored.reshape(-1).to(dtype)

    def factors(self, tensor: StoredTensor) -> tuple[Tensor, Tensor]:
        """Return the low-rank factors of a matrix, shapes [rows, k] and [k, columns], in the dtype of the arithmetic.

        Args:
            tensor: A matrix that is decoded from parts, by a method whose sidecar declares factors.
        """
        codec = self._codec(tensor)
        (span,) = codec.blocks
        stored = self._stored(codec, tensor, span, dict.fromkeys(codec.all_parts, 0))
        return codec.factors(span, self._task.position, stored, torch.float64 if tensor.wide else torch.float32)

    def _codec(self, tensor: StoredTensor) -> Codec:
        assert tensor.parameters is not None
        return self._codecs.of(tensor.parameters, self.shape(tensor))

    def _stored(self, codec: Codec, tensor: StoredTensor, span: Span, positions: dict[str, int]) -> dict[str, Tensor]:
        """Read the parts of a block, which follow those of the previous block."""
        stored = {}
        for name, part in codec.parts(span.shape).items():
            size = math.prod(part.shape)
            info = self._parts[stored_name(tensor.name, name)]
            stored[name] = self._read(info, positions[name], positions[name] + size)
            positions[name] += size
        for name, _, _ in codec.statistics:
            stored[name] = self._read(self._parts[stored_name(tensor.name, name)], 0, 1).reshape(())
        return stored

    def _wide(self, tensor: StoredTensor, info: TensorInfo, span: Span) -> Tensor:
        """Read a block in the dtype of the arithmetic."""
        compute = torch.float64 if tensor.wide else torch.float32
        return self._read(info, span.start, span.end).to(compute).reshape(span.shape)

    def _read(self, info: TensorInfo, start: int, end: int) -> Tensor:
        size = info.dtype.itemsize
        data = torch.empty((end - start) * size, dtype=torch.uint8)
        self._reader.read_into(info, start * size, data.numpy().data)
        return data.view(getattr(torch, info.dtype.name))

    def _check(self, tensor: StoredTensor) -> None:
        """Compare stored tensors with the expected ones, from headers alone."""
        merged = self._merged.tensors.get(tensor.name)
        if merged is None:
            raise CheckpointError(f"{self._out}: tensor {tensor.name!r} is missing; merge again")
        expected: dict[str, Part] = {}
        if tensor.kept == OWN:
            expected = {OWN: Part(merged.shape, tensor.dtype.name)}
        elif tensor.kept is None:
            expected = self._codec(tensor).all_parts
        for name, part in expected.items():
            own = stored_name(tensor.name, name)
            stored_part = self._parts.get(own)
            dtype = part.dtype or (merged.dtype if part.shared else tensor.dtype).name
            if stored_part is None or stored_part.shape != part.shape or stored_part.dtype.name != dtype:
                is_there = (
                    "is missing" if stored_part is None else f"is {stored_part.dtype.name} {list(stored_part.shape)}"
                )
                raise CheckpointError(
                    f"{self._out}: part {own!r} {is_there}, must be {dtype} {list(part.shape)}; merge again"
                )
        if tensor.base is not None:
            self._base_tensor(tensor)

    def _base_tensor(self, tensor: StoredTensor) -> TensorInfo:
        assert self._base is not None
        assert tensor.base is not None
        tensor_of_base = self._base.tensors.get(tensor.base)
        if tensor_of_base is None or tensor_of_base.shape != self.shape(tensor):
            why = "is missing" if tensor_of_base is None else f"has shape {list(tensor_of_base.shape)}"
            raise CheckpointError(
                f"{self._base.path}: is not the base of this merge: tensor {tensor.base!r} {why}; name it with --base"
            )
        return tensor_of_base

    def _check_base(self, tensor: StoredTensor) -> None:
        """Compare the base's tensor with the hash of the one that was merged, once."""
        if tensor.base is None or tensor.name in self._compared:
            return
        info = self._base_tensor(tensor)
        step = block_step(info.shape, "element", BLOCK)
        found = []
        for start in range(0, info.numel, step):
            end = min(start + step, info.numel)
            raw = self._read(info, start, end).view(torch.uint8).numpy().data
            found += block_digests(info.shape, start, end, raw, BLOCK)
        if digest(b"".join(found)).hex() != tensor.base_digest:
            raise CheckpointError(
                f"{info.file}: is not the base of this merge: tensor {tensor.base!r} differs from the one that was "
                "merged; name the right base with --base"
            )
        self._compared.add(tensor.name)


def open_parts(files: Collection[Path]) -> dict[str, TensorInfo]:
    """Read the headers of files of parts.

    Raises:
        NotFoundError: A file is missing.
        CheckpointError: A file is damaged.
    """
    from ...checkpoint.formats.safetensors import read_header

    return {tensor.name: tensor for file in files for tensor in read_header(file)[0]}
