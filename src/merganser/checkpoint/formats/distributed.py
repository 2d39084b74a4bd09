"""Distributed checkpoints of PyTorch (FSDP, DCP): tensors cut into chunks, which lie in the files of many processes.

`.metadata` is a pickle that says where each chunk is; it is read by an unpickler that knows its classes and no other. A
chunk is a zip archive, as `torch.save` writes it, in the middle of a file; the values in it are not compressed.
"""

from __future__ import annotations

import io
import math
import pickle
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path, PureWindowsPath
from typing import IO, TYPE_CHECKING, Any

from ...errors import CheckpointError
from ...jsonfile import open_regular, os_reason
from ...wording import brief
from ..derived.derived import derive, read_columns, read_elements
from ..dtypes import DTYPE_BY_NAME, DType
from ..tensor import ByteReader, TensorInfo
from .pickle_cost import why_costly_pickle

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["METADATA_NAME", "SUFFIX", "read_distributed"]

METADATA_NAME = ".metadata"
"""The file that says where chunks are."""

SUFFIX = ".distcp"
"""Ending of the names of files with chunks."""

_MOST_BYTES = 1 << 30
_MOST_VALUES = 300_000_000
"""Largest number of values of the metadata; those of a large model on hundreds of processes have tens of millions."""

_MOST_LAYOUT = 1 << 20
"""Largest size of a pickle that says how a chunk is stored, bytes; it has a few hundred."""

_OF_TRAINING = ("optim", "optimizer", "optimizers", "optimizer_state", "scheduler", "lr_scheduler")
_CONVERT = "python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER pytorch_model.bin converts it"
_METADATA, _FILES = "torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.filesystem"
_CLASSES = {
    (_METADATA, "Metadata"),
    (_METADATA, "MetadataIndex"),
    (_METADATA, "StorageMeta"),
    (_METADATA, "TensorStorageMetadata"),
    (_METADATA, "BytesStorageMetadata"),
    (_METADATA, "ChunkStorageMetadata"),
    (_METADATA, "TensorProperties"),
    (_METADATA, "_MEM_FORMAT_ENCODING"),
    (_FILES, "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
}


@dataclass(frozen=True, slots=True)
class _Chunk:
    """A part of a tensor: where it lies in the tensor, and where its values are."""

    offsets: tuple[int, ...]
    stored: TensorInfo


@dataclass(frozen=True, slots=True)
class _Assembled:
    """Rows put together from chunks that were cut along the first dimension, the last one, or both."""

    chunks: tuple[_Chunk, ...]
    width: int
    inner: int

    def __call__(self, reader: ByteReader, first: int, end: int) -> Tensor:
        import torch

        found = torch.empty(end - first, self.width)
        for chunk in self.chunks:
            shape = chunk.stored.shape
            wide = len(shape) > 1
            top, left = (chunk.offsets[0] * self.inner, chunk.offsets[-1]) if wide else (0, chunk.offsets[0])
            height, width = (math.prod(shape[:-1]), shape[-1]) if wide else (1, shape[0])
            low, high = max(first, top), min(end, top + height)
            if low >= high:
                continue
            if width == self.width or not wide:
                part = read_elements(reader, chunk.stored, (low - top) * width, (high - top) * width).view(-1, width)
            else:
                part = read_columns(reader, chunk.stored, range(low - top, high - top), range(width))
            found[low - first : high - first, left : left + width] = part.float()
        return found


def read_distributed(folder: Path) -> tuple[list[TensorInfo], list[Path], dict[str, str]]:
    """Read where the tensors of a distributed checkpoint are.

    Returns:
        The tensors; the files that hold them; and what is left out, with reasons, by name.

    Raises:
        CheckpointError: The checkpoint is damaged, or holds what the restricted unpickler does not know.
    """
    file = folder / METADATA_NAME
    metadata = _metadata(file)
    found: list[TensorInfo] = []
    left_out: dict[str, str] = {}
    try:
        places = {
            (index.fqn, tuple(index.offset or ())): place for index, place in (metadata.storage_data or {}).items()
        }
        for name, entry in metadata.state_dict_metadata.items():
            if not isinstance(name, str):
                raise CheckpointError(f"{file}: the name of a tensor must be a text, found {brief(name)}")
            if type(entry).__name__ != "TensorStorageMetadata":
                left_out[name] = "no tensor"
            elif name.split(".")[0] in _OF_TRAINING:
                left_out[name] = "the state of an optimizer"
            else:
                found.append(_tensor(folder, name, entry, places))
    except (AttributeError, TypeError, ValueError, IndexError) as error:
        raise CheckpointError(f"{file}: is damaged: {_line(error)}; {_CONVERT}") from None
    if not found:
        raise CheckpointError(f"{file}: lists no tensors; save the checkpoint again, or {_CONVERT}")
    stored = (part for tensor in found for part in (tensor.stored or (tensor,)))
    return found, sorted({part.file for part in stored}), left_out


class _Restricted(pickle.Unpickler):
    """Makes objects of known classes only."""

    def find_class(self, module: str, name: str) -> Any:
        import torch

        if module == "torch" and name in DTYPE_BY_NAME:
            return getattr(torch, name)
        if module == "pathlib" and name.endswith("Path"):
            return lambda *parts: None  # where it was written, which does not matter
        if (module, name) not in _CLASSES:
            raise pickle.UnpicklingError(f"it holds {module}.{name}")
        return super().find_class(module, name)


class _Storage(pickle.Unpickler):
    """Reads how a saved tensor lies in its storage, and makes no tensor."""

    def persistent_load(self, pid: Any) -> Any:
        return None

    def find_class(self, module: str, name: str) -> Any:
        if name in ("_rebuild_tensor_v2", "_rebuild_parameter"):
            return lambda *given: given
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if module == "torch" and name.endswith("Storage"):
            return name
        raise pickle.UnpicklingError(f"it holds {module}.{name}")


def _metadata(file: Path) -> Any:
    try:
        with open_regular(file) as handle:
            data = handle.read(_MOST_BYTES + 1)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read: {os_reason(error)}") from None
    if len(data) > _MOST_BYTES:
        raise CheckpointError(f"{file}: has more than {_MOST_BYTES:,} bytes")
    if why := why_costly_pickle(io.BytesIO(data), _MOST_VALUES):
        raise CheckpointError(f"{file}: cannot be read: {why}; {_CONVERT}")
    try:
        found = _Restricted(io.BytesIO(data)).load()
    # a damaged pickle may raise any type
    except Exception as error:
        raise CheckpointError(f"{file}: cannot be read ({_line(error)}); {_CONVERT}") from None
    if type(found).__name__ != "Metadata":
        raise CheckpointError(
            f"{file}: must hold the metadata of a distributed checkpoint, found {type(found).__name__}"
        )
    return found


def _tensor(folder: Path, name: str, entry: Any, places: dict[Any, Any]) -> TensorInfo:
    shape = tuple(entry.size)
    dtype = DTYPE_BY_NAME.get(str(entry.properties.dtype).removeprefix("torch."))
    if dtype is None or not all(type(length) is int and length >= 0 for length in shape):
        raise CheckpointError(
            f"{folder}: tensor {name!r}: dtype {entry.properties.dtype} of shape {list(shape)} is not known"
        )
    chunks = []
    for chunk in entry.chunks:
        offsets, sizes = tuple(chunk.offsets), tuple(chunk.sizes)
        place = places.get((name, offsets))
        if place is None:
            raise CheckpointError(
                f"{folder}: tensor {name!r}: no file holds its chunk at {list(offsets)}; are all files of the checkpoint in the folder?"
            )
        chunks.append(_Chunk(offsets, _chunk(folder, name, dtype, sizes, place)))
    if len(chunks) == 1 and chunks[0].stored.shape == shape:
        return chunks[0].stored
    _check_cover(folder, name, shape, chunks)
    if dtype.kind != "float":
        raise CheckpointError(f"{folder}: tensor {name!r}: {dtype.name} in several chunks cannot be read; {_CONVERT}")
    rows = _Assembled(tuple(chunks), shape[-1], math.prod(shape[1:-1]))
    return derive(name, shape, [chunk.stored for chunk in chunks], rows, natural=dtype)


def _check_cover(folder: Path, name: str, shape: tuple[int, ...], chunks: Sequence[_Chunk]) -> None:
    """Check that chunks fill a tensor, and are cut along its first and last dimension alone.

    Raises:
        CheckpointError: They do not.
    """
    count = 0
    for chunk in chunks:
        sizes = chunk.stored.shape
        inside = len(sizes) == len(shape) == len(chunk.offsets) and all(
            at >= 0 and at + size <= length for at, size, length in zip(chunk.offsets, sizes, shape, strict=True)
        )
        if not inside or sizes[1:-1] != shape[1:-1] or (len(shape) == 1 and len(sizes) != 1):
            raise CheckpointError(
                f"{folder}: tensor {name!r}: the chunk at {list(chunk.offsets)} of shape {list(sizes)} does not fit into shape "
                f"{list(shape)}, or is cut in a way that cannot be read; {_CONVERT}"
            )
        count += math.prod(sizes)
    if count != math.prod(shape):
        raise CheckpointError(f"{folder}: tensor {name!r}: its chunks hold {count:,} of {math.prod(shape):,} elements")
    if len(chunks) > 1 and not _are_apart(chunks):
        raise CheckpointError(f"{folder}: tensor {name!r}: its chunks overlap, so that others are missing; {_CONVERT}")


def _are_apart(chunks: Sequence[_Chunk]) -> bool:
    """Return whether no two chunks hold the same element; they are cut along the first and the last dimension."""
    spans = [
        [(at, at + size) for at, size in zip(chunk.offsets, chunk.stored.shape, strict=True)][
            :: max(1, len(chunk.offsets) - 1)
        ]
        for chunk in chunks
    ]
    cuts = [sorted({edge for own in spans for edge in own[axis]}) for axis in (0, -1)]
    # chunks of a grid have about as many cells
    if len(cuts[0]) * len(cuts[1]) > 16 * len(chunks) + 1024:
        return False
    places = [{edge: number for number, edge in enumerate(each)} for each in cuts]
    held: set[tuple[int, int]] = set()
    for own in spans:
        (top, bottom), (left, right) = ([places[axis][edge] for edge in own[axis]] for axis in (0, -1))
        for cell in product(range(top, bottom), range(left, right)):
            if cell in held:
                return False
            held.add(cell)
    return True


def _line(error: Exception) -> str:
    """Return the first line of a message, which may hold parts of the file."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]


class _Window(io.RawIOBase):
    """A range of a file, as a file."""

    def __init__(self, file: IO[bytes], start: int, length: int) -> None:
        self._file, self._start, self._length, self._at = file, start, length, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = max(0, offset + (0, self._at, self._length)[whence])
        return self._at

    def tell(self) -> int:
        return self._at

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._length - self._at)
        size = left if size is None or size < 0 else min(size, left)
        self._file.seek(self._start + self._at)
        found = self._file.read(size)
        self._at += len(found)
        return found


def _chunk(folder: Path, name: str, dtype: DType, sizes: tuple[int, ...], place: Any) -> TensorInfo:
    """Return where the values of a chunk are.

    Raises:
        CheckpointError: The file is missing or damaged, or the values are not stored in a plain way.
    """
    written = str(place.relative_path)
    path = PureWindowsPath(written)
    if path.anchor or ".." in path.parts or "\0" in written or "\\" in written or not written.endswith(SUFFIX):
        raise CheckpointError(f"{folder / METADATA_NAME}: file {written!r} is not one of the checkpoint's folder")
    file = folder / written
    nbytes = dtype.nbytes(math.prod(sizes))
    try:
        with open_regular(file) as handle, zipfile.ZipFile(_Window(handle, place.offset, place.length)) as archive:
            pickled = next(each for each in archive.infolist() if each.filename.endswith("/data.pkl"))
            values = next(each for each in archive.infolist() if each.filename.endswith("/data/0"))
            if pickled.file_size > _MOST_LAYOUT:
                raise ValueError(f"its layout has {pickled.file_size:,} bytes")
            text = archive.read(pickled)
            if why := why_costly_pickle(io.BytesIO(text)):
                raise ValueError(why)
            layout = _Storage(io.BytesIO(text)).load()
            handle.seek(place.offset + values.header_offset)
            head = handle.read(30)
            size = handle.seek(0, io.SEEK_END)
    except FileNotFoundError:
        raise CheckpointError(f"{file}: no such file, but {METADATA_NAME} says that it holds {name!r}") from None
    # a damaged archive or pickle may raise any type
    except Exception as error:
        raise CheckpointError(f"{file}: tensor {name!r}: is damaged ({_line(error)}); {_CONVERT}") from None
    start = (
        int(values.header_offset) + 30 + int.from_bytes(head[26:28], "little") + int.from_bytes(head[28:30], "little")
    )
    plain = values.compress_type == 0 and values.file_size == nbytes and _is_plain(layout, sizes)
    if not plain or place.offset + start + nbytes > size:
        raise CheckpointError(f"{file}: tensor {name!r}: is not stored as {nbytes:,} plain bytes; {_CONVERT}")
    return TensorInfo(name, dtype, sizes, file, place.offset + start, nbytes)


def _is_plain(layout: Any, sizes: tuple[int, ...]) -> bool:
    """Return whether a saved tensor fills its storage row by row."""
    while isinstance(layout, tuple) and layout and isinstance(layout[0], tuple):
        layout = layout[0]  # a parameter around a tensor
    if not isinstance(layout, tuple) or len(layout) < 4:
        return False
    _, offset, shape, stride = layout[:4]
    expected, step = [], 1
    for length in reversed(sizes):
        expected.append(step)
        step *= max(length, 1)
    alike = all(a == b or n == 1 for a, b, n in zip(stride, reversed(expected), sizes, strict=True))
    return offset == 0 and tuple(shape) == sizes and alike
