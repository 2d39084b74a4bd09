"""Read GGUF files as the checkpoint that they were made from: its names, shapes and values."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ....errors import CheckpointError
from ....wording import some
from ...derived.derived import Rows, derive
from ...dtypes import DTYPE_BY_NAME, DType
from ...tensor import TensorInfo
from .header import GgufHeader, GgufTensor, read_gguf_header
from .joined import StoredTensor, join
from .names import DROPPED, Family, family_of, hf_name
from .values import (
    PLAIN,
    UNREADABLE,
    Dequantised,
    LogOfNegative,
    MinusOne,
    Part,
    Permuted,
    Plain,
    Stored,
    noise_of,
    require_gguf,
)

__all__ = ["GgufModel", "head_rows", "parts_of", "read_gguf"]

_SPLIT = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
_MOST_EXPERTS = 10_000
_BYTES = DTYPE_BY_NAME["uint8"]


@dataclass(frozen=True, slots=True)
class GgufModel:
    """What GGUF files hold.

    Args:
        tensors: The tensors by the names of the Hugging Face checkpoint.
        architecture: The family, as llama.cpp calls it.
        schemes: The types that round, as in "GGUF Q4_K".
        left_out: Tensors that the model's config replaces, and why, by name.
    """

    tensors: list[TensorInfo]
    architecture: str
    schemes: tuple[str, ...]
    left_out: dict[str, str]


def read_gguf(files: Sequence[Path], natural: DType | None) -> GgufModel:
    """Read the headers of a model in one or several GGUF files.

    Args:
        files: The files, in the order of their numbers.
        natural: The dtype in which an output stores weights by default; None for that of most of the model: float16,
            or else bfloat16.

    Raises:
        CheckpointError: A file is malformed, or belongs to another model.
        UnsupportedError: The architecture or a type cannot be read, or a package is missing.
    """
    headers = [read_gguf_header(file) for file in files]
    _check_split(files, headers)
    first = headers[0]
    family = family_of(str(files[0]), first.architecture)
    natural = natural or _natural(headers)
    made: dict[str, TensorInfo] = {}
    schemes: set[str] = set()
    left_out: dict[str, str] = {}
    parts = [(file, tensor) for file, header in zip(files, headers, strict=True) for tensor in header.tensors]
    joined, copies = _joined(files[0], family, parts, natural)
    for file, tensor in parts:
        if DROPPED.fullmatch(tensor.name):
            left_out[tensor.name] = "config.json says it in the Hugging Face checkpoint"
            continue
        if tensor.name in copies:
            left_out[tensor.name] = "attn_kv_b holds the same values"
            continue
        own = joined.get(tensor.name)
        for each in _logical(file, first, family, tensor, natural) if own is None else own:
            if each.name in made:
                raise CheckpointError(f"{file}: tensor {tensor.name!r} stands for {each.name}, which is there twice")
            made[each.name] = each
        if noise_of(tensor.type.name) is not None:
            schemes.add(f"GGUF {tensor.type.name}")
    return GgufModel(list(made.values()), first.architecture, tuple(sorted(schemes)), left_out)


def _joined(
    where: Path, family: Family, parts: Sequence[tuple[Path, GgufTensor]], natural: DType
) -> tuple[dict[str, list[TensorInfo]], set[str]]:
    """Return what several tensors of the files make, by the name of each, the first with the result; and copies."""
    if family.joined is None:
        return {}, set()
    names = {tensor.name for _, tensor in parts}
    # for a while, files held what is split as a whole, too
    copies = {
        name for name in names if re.fullmatch(r"blk\.\d+\.attn_[kv]_b\.weight", name)
        and re.sub("attn_[kv]_b", "attn_kv_b", name) in names
    }  # fmt: skip
    stored: dict[str, StoredTensor] = {}
    for file, tensor in parts:
        if tensor.name not in copies and not DROPPED.fullmatch(tensor.name):
            info, rows = _stored(file, tensor)
            stored[tensor.name] = StoredTensor(info, tensor.shape, rows, tensor.type.name)
    found: dict[str, list[TensorInfo]] = {}
    for each in join(str(where), family, stored):
        infos = [stored[name].info for name in each.sources]
        noise = noise_of(stored[each.sources[0]].type) if len(each.sources) == 1 else None
        found[each.sources[0]] = [derive(each.name, each.shape, infos, each.rows, natural=natural, noise=noise)]
        found |= {name: [] for name in each.sources[1:]}
    return found, copies


def parts_of(file: Path) -> list[Path]:
    """Return the files of the model that a file is the first part of; the file alone if it is not a first part."""
    match = _SPLIT.fullmatch(file.name)
    if match is None or int(match["number"]) != 1:
        return [file]
    count = int(match["count"])
    return [file.with_name(f"{match['stem']}-{number:05d}-of-{count:05d}.gguf") for number in range(1, count + 1)]


def _natural(headers: Sequence[GgufHeader]) -> DType:
    sizes: dict[str, int] = {}
    for header in headers:
        for tensor in header.tensors:
            sizes[tensor.type.name] = sizes.get(tensor.type.name, 0) + math.prod(tensor.shape)
    most = max(sizes, key=lambda name: sizes[name], default="BF16")
    return PLAIN[most] if most in ("F16", "F32") else PLAIN["BF16"]


def _check_split(files: Sequence[Path], headers: Sequence[GgufHeader]) -> None:
    """Check that these are all parts of one model.

    Raises:
        CheckpointError: They are not.
    """
    count = headers[0].fields.get("split.count", 1) or 1
    if count != len(files):
        match = _SPLIT.fullmatch(files[0].name)
        others = f"; give the folder, or {match['stem']}-00001-of-{match['count']}.gguf" if match else ""
        raise CheckpointError(
            f"{files[0]}: is one of {count} parts of a model, {len(files)} are here{others or '; put all parts into one folder'}"
        )
    for number, (file, header) in enumerate(zip(files, headers, strict=True)):
        if header.fields.get("split.no", 0) != number:
            raise CheckpointError(
                f"{file}: is part {header.fields.get('split.no')} of its model, not part {number}; give the files their original names"
            )
        if header.architecture and header.architecture != headers[0].architecture:
            raise CheckpointError(f"{file}: is of the architecture {header.architecture!r}, part 0 is not")


def _logical(file: Path, header: GgufHeader, family: Family, tensor: GgufTensor, natural: DType) -> list[TensorInfo]:
    """Return what a stored tensor stands for: one tensor, or one per expert."""
    found = hf_name(family, tensor.name)
    if found is None:
        raise CheckpointError(
            f"{file}: tensor {tensor.name!r}: the architecture {header.architecture!r} has no such tensor here, so its "
            f"name in the Hugging Face checkpoint is not known; known are {some(sorted(family.names), 8)}"
        )
    name, module = found
    kind = tensor.type.name
    shape = tensor.shape
    stored, rows = _stored(file, tensor)
    changed: Rows = rows
    if family.permuted and module in ("attn_q", "attn_k"):
        changed = Permuted(rows, head_rows(file, header, tensor.name, shape[0]), flat=len(shape) == 1)
    if family.norms_plus_one and name.endswith("norm.weight"):
        changed = MinusOne(rows)
    if module == "ssm_a":
        changed = LogOfNegative(rows)
    if module == "ssm_conv1d" and len(shape) == 2:
        shape = (shape[0], 1, shape[1])
    if "{}" in name:
        return _experts(name, tensor, stored, changed, natural)
    if module == "ffn_gate_inp_shexp" and len(shape) == 1:
        shape = (1, *shape)
    if changed is rows and kind in PLAIN:
        return [replace(stored, name=name, shape=shape, natural=natural if stored.dtype.kind == "float" else None)]
    return [derive(name, shape, [stored], changed, natural=natural, noise=noise_of(kind))]


def _stored(file: Path, tensor: GgufTensor) -> tuple[TensorInfo, Stored]:
    """Return a tensor of the file, its bytes if it is quantised, and its values.

    Raises:
        CheckpointError: Its type cannot be read.
        UnsupportedError: It needs a package that is missing.
    """
    kind, shape = tensor.type.name, tensor.shape
    if kind in UNREADABLE:
        raise CheckpointError(f"{file}: tensor {tensor.name!r}: the type {kind} cannot be read")
    if kind in PLAIN:
        stored = TensorInfo(tensor.name, PLAIN[kind], shape, file, tensor.offset, tensor.nbytes)
        return stored, Plain(stored)
    require_gguf(str(file))
    width = shape[-1] // tensor.type.values * tensor.type.nbytes
    stored = TensorInfo(tensor.name, _BYTES, (*shape[:-1], width), file, tensor.offset, tensor.nbytes)
    return stored, Dequantised(stored, kind)


def _experts(name: str, tensor: GgufTensor, stored: TensorInfo, rows: Rows, natural: DType) -> list[TensorInfo]:
    """Return one tensor per matrix of a stack."""
    if len(tensor.shape) != 3:
        raise CheckpointError(f"{stored.file}: tensor {tensor.name!r}: must be a stack of matrices")
    count, height, width = tensor.shape
    if count > _MOST_EXPERTS:
        raise CheckpointError(
            f"{stored.file}: tensor {tensor.name!r}: stacks {count:,} matrices; at most {_MOST_EXPERTS:,} are accepted"
        )
    found = []
    for expert in range(count):
        size = stored.nbytes // count
        own = replace(
            stored,
            shape=stored.shape[1:],
            offset=stored.offset + expert * size,
            nbytes=size,
            name=f"{stored.name}[{expert}]",
        )
        start = Part(rows, expert * height)
        found.append(
            derive(
                name.format(expert), (height, width), [own], start, natural=natural, noise=noise_of(tensor.type.name)
            )
        )
    return found


def head_rows(file: Path, header: GgufHeader, name: str, rows: int) -> int:
    """Return the rows per head of a projection of queries or keys.

    Args:
        file: The file, for messages.
        header: Its header.
        name: Name of the tensor in the file.
        rows: Rows of the projection.

    Raises:
        CheckpointError: The header does not give the number of heads, or it does not divide the rows.
    """
    heads = header.number("attention.head_count")
    if "attn_k" in name:
        heads = header.number("attention.head_count_kv") or heads
    if not heads or heads < 0 or rows % heads or rows // heads % 2:
        raise CheckpointError(
            f"{file}: tensor {name!r}: its {rows} rows are not those of {heads} heads ({header.architecture}."
            "attention.head_count); the order of rows is not known"
        )
    return rows // heads
