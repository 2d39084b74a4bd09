"""Tensors that several of a GGUF file make: experts of gpt-oss, and the compressed keys and values of DeepSeek.

gpt-oss has gate and up as alternating columns of one matrix [inputs, outputs] per expert, llama.cpp as two matrices
[outputs, inputs]. DeepSeek has one matrix that restores keys and values of every head, llama.cpp two: that of keys is
transposed in every head. Source: convert_hf_to_gguf.py of llama.cpp.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ....errors import CheckpointError
from ...derived.derived import Rows
from ...tensor import ByteReader, TensorInfo
from .names import Family
from .values import Stored

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Joined", "StoredTensor", "join"]

_LAYER = re.compile(r"blk\.(\d+)\.(attn_k_b|ffn_(?:gate|down)_exps)\.(weight|bias)")


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor of the file.

    Args:
        info: Its bytes, or its values if it is not quantised.
        shape: Its shape.
        rows: Its values.
        type: The name of its type.
    """

    info: TensorInfo
    shape: tuple[int, ...]
    rows: Stored
    type: str


@dataclass(frozen=True, slots=True)
class Joined:
    """A tensor of the Hugging Face checkpoint.

    Args:
        name: Its name.
        shape: Its shape.
        sources: Names in the file of what it is made from.
        rows: Its values.
    """

    name: str
    shape: tuple[int, ...]
    sources: tuple[str, ...]
    rows: Rows


@dataclass(frozen=True, slots=True)
class _ByMatrix:
    """Rows of a stack of matrices, a matrix at a time.

    Args:
        height: Rows of each matrix.
        part: Computes rows of one: its number, the first row and the one after the last.
    """

    height: int
    part: _GateUp | _Turned | _KeysAndValues

    def __call__(self, reader: ByteReader, first: int, end: int) -> Tensor:
        import torch

        found = []
        while first < end:
            number, low = divmod(first, self.height)
            high = min(end - number * self.height, self.height)
            found.append(self.part(reader, number, low, high))
            first = number * self.height + high
        return found[0] if len(found) == 1 else torch.cat(found)


@dataclass(frozen=True, slots=True)
class _GateUp:
    gate: Stored
    up: Stored
    width: int

    def __call__(self, reader: ByteReader, number: int, low: int, high: int) -> Tensor:
        import torch

        lines, columns = range(number * self.width, (number + 1) * self.width), range(low, high)
        both = [stored.part(reader, lines, columns).T for stored in (self.gate, self.up)]
        return torch.stack(both, 2).flatten(1)


@dataclass(frozen=True, slots=True)
class _Turned:
    stored: Stored
    width: int

    def __call__(self, reader: ByteReader, number: int, low: int, high: int) -> Tensor:
        return self.stored.part(reader, range(number * self.width, (number + 1) * self.width), range(low, high)).T


@dataclass(frozen=True, slots=True)
class _KeysAndValues:
    keys: Stored
    values: Stored
    key: int
    value: int
    rank: int

    def __call__(self, reader: ByteReader, number: int, low: int, high: int) -> Tensor:
        import torch

        found = []
        if low < self.key:
            lines = range(number * self.rank, (number + 1) * self.rank)
            found.append(self.keys.part(reader, lines, range(low, min(high, self.key))).T)
        if high > self.key:
            start = number * self.value - self.key
            found.append(self.values(reader, start + max(low, self.key), start + high))
        return torch.cat(found)


@dataclass(frozen=True, slots=True)
class _Alternating:
    gate: Stored
    up: Stored

    def __call__(self, reader: ByteReader, first: int, end: int) -> Tensor:
        import torch

        return torch.stack([self.gate(reader, first, end), self.up(reader, first, end)], 2).flatten(1)


def join(where: str, family: Family, stored: Mapping[str, StoredTensor]) -> Iterator[Joined]:
    """Yield what several tensors of the file make together.

    Args:
        where: The file, for messages.
        family: How the family is converted.
        stored: All tensors by name.

    Raises:
        CheckpointError: One of them is missing, or shapes do not fit.
    """
    makers: dict[str, Callable[[str, str, Mapping[str, StoredTensor]], Joined | None]] = {
        "attn_k_b": _restored,
        "ffn_gate_exps": _gate_up,
        "ffn_down_exps": _down,
    }
    for name in stored if family.joined is not None else ():
        match = _LAYER.fullmatch(name)
        if match is None or (match[2] == "attn_k_b") is not (family.joined == "mla"):
            continue
        try:
            found = makers[match[2]](match[1], match[3], stored)
        except KeyError as error:
            raise CheckpointError(f"{where}: tensor {name!r} is there without {error.args[0]}") from None
        if found is None:
            shapes = ", ".join(
                f"{each} {list(stored[each].shape)}" for each in stored if each.startswith(f"blk.{match[1]}.")
            )
            raise CheckpointError(
                f"{where}: the shape of {name!r} does not fit the others of its layer: {shapes[:300]}"
            )
        yield found


def _restored(layer: str, _: str, stored: Mapping[str, StoredTensor]) -> Joined | None:
    names = (f"blk.{layer}.attn_k_b.weight", f"blk.{layer}.attn_v_b.weight")
    keys, values = (stored[name] for name in names)
    if (
        len(keys.shape) != 3
        or len(values.shape) != 3
        or keys.shape[0] != values.shape[0]
        or keys.shape[1] != values.shape[2]
    ):
        return None
    heads, rank, key = keys.shape
    value = values.shape[1]
    part = _KeysAndValues(keys.rows, values.rows, key, value, rank)
    rows = _ByMatrix(key + value, part)
    return Joined(f"model.layers.{int(layer)}.self_attn.kv_b_proj.weight", (heads * (key + value), rank), names, rows)


def _gate_up(layer: str, kind: str, stored: Mapping[str, StoredTensor]) -> Joined | None:
    names = (f"blk.{layer}.ffn_gate_exps.{kind}", f"blk.{layer}.ffn_up_exps.{kind}")
    gate, up = (stored[name] for name in names)
    name = f"model.layers.{int(layer)}.mlp.experts.gate_up_proj"
    if gate.shape != up.shape or len(gate.shape) != (2 if kind == "bias" else 3):
        return None
    if kind == "bias":
        return Joined(f"{name}_bias", (gate.shape[0], 2 * gate.shape[1]), names, _Alternating(gate.rows, up.rows))
    experts, width, height = gate.shape
    rows = _ByMatrix(height, _GateUp(gate.rows, up.rows, width))
    return Joined(name, (experts, height, 2 * width), names, rows)


def _down(layer: str, kind: str, stored: Mapping[str, StoredTensor]) -> Joined | None:
    source = f"blk.{layer}.ffn_down_exps.{kind}"
    down = stored[source]
    name = f"model.layers.{int(layer)}.mlp.experts.down_proj"
    if len(down.shape) != (2 if kind == "bias" else 3):
        return None
    if kind == "bias":
        return Joined(f"{name}_bias", down.shape, (source,), down.rows)
    experts, width, height = down.shape
    return Joined(name, (experts, height, width), (source,), _ByMatrix(height, _Turned(down.rows, width)))
