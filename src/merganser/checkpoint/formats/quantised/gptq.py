"""GPTQ and AWQ: numbers of a few bits in groups of inputs, stored as the transpose of the weight.

GPTQ: `qweight` int32 [in * bits / 32, out], packed along the input; `qzeros` [groups, out * bits / 32]; `scales`
[groups, out]; `g_idx` [in], the group of each input. Files of version 1 store zero points minus one.
AWQ: `qweight` [in, out / 8], `qzeros` [groups, out / 8], in an order of its own within each word. `W.T = (q - z) * scale`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ....errors import UnsupportedError
from ....wording import brief
from ...derived.derived import read_columns, read_whole
from ...reader import Reader
from ...tensor import ByteReader, TensorInfo
from .bits import unpack
from .noise import StepNoise
from .pool import Pool, flaw

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["read_gptq"]

_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where the numbers of columns 0 to 7 lie in a word of AWQ."""


@dataclass(frozen=True, slots=True)
class _Gptq:
    weight: TensorInfo
    zeros: TensorInfo
    scales: TensorInfo
    groups: TensorInfo | None
    inputs: int
    size: int
    bits: int
    one_less: bool

    def __call__(self, reader: ByteReader, first: int, end: int) -> Tensor:
        import torch

        columns = range(first, end)
        words = read_columns(reader, self.weight, range(self.weight.shape[0]), columns).T.contiguous()
        numbers = unpack(words, self.bits, self.inputs)
        scales = read_columns(reader, self.scales, range(self.scales.shape[0]), columns).T.float()
        # 32 numbers fill `bits` words
        low = first // 32
        upto = min(-(-end // 32) * self.bits, self.zeros.shape[1])
        packed = read_columns(reader, self.zeros, range(self.zeros.shape[0]), range(low * self.bits, upto))
        zeros = unpack(packed, self.bits, end - low * 32)[:, first - low * 32 :].T
        if self.one_less:
            zeros = (zeros + 1) & ((1 << self.bits) - 1)
        if self.groups is None:
            order = torch.arange(self.inputs) // self.size
        else:
            order = read_whole(reader, self.groups).long()
        return (numbers - zeros[:, order]).float() * scales[:, order]


@dataclass(frozen=True, slots=True)
class _Awq:
    weight: TensorInfo
    zeros: TensorInfo
    scales: TensorInfo
    size: int

    def __call__(self, reader: ByteReader, first: int, end: int) -> Tensor:
        low, high = first // 8, -(-end // 8)
        inside = slice(first - low * 8, end - low * 8)
        numbers = self._columns(reader, self.weight, range(low, high))[:, inside]
        zeros = self._columns(reader, self.zeros, range(low, high))[:, inside]
        scales = read_columns(reader, self.scales, range(self.scales.shape[0]), range(first, end)).float()
        grouped = numbers.reshape(len(scales), self.size, -1)
        return ((grouped - zeros[:, None]).float() * scales[:, None]).flatten(0, 1).T

    def _columns(self, reader: ByteReader, tensor: TensorInfo, words: range) -> Tensor:
        """Return the numbers of columns of words in the order of the weight's rows."""
        found = read_columns(reader, tensor, range(tensor.shape[0]), words)
        numbers = unpack(found, 4, 8 * len(words)).view(len(found), -1, 8)
        return numbers[:, :, list(_AWQ_ORDER)].flatten(1)


def read_gptq(pool: Pool) -> None:
    """Take every weight of GPTQ or AWQ.

    Raises:
        CheckpointError: A part is missing, or does not fit.
        UnsupportedError: A layout of AWQ other than GEMM.
    """
    for name in pool.ending(".qweight"):
        weight, stem = pool.stored[name], name.removesuffix(".qweight")
        zeros = pool.need(weight, "its zero points", f"{stem}.qzeros")
        scales = pool.need(weight, "its scales", f"{stem}.scales")
        for each in (weight, zeros):
            if each.dtype.name != "int32" or len(each.shape) != 2 or not each.numel:
                raise flaw(each, f"must be a matrix of int32, found {each.dtype.name} {list(each.shape)}")
        if scales.dtype.kind != "float" or len(scales.shape) != 2 or not scales.numel:
            raise flaw(scales, f"must be a matrix of floats, found {scales.dtype.name} {list(scales.shape)}")
        if _is_awq(pool, weight, scales):
            _read_awq(pool, stem, weight, zeros, scales)
        else:
            _read_gptq(pool, stem, weight, zeros, scales)


def _is_awq(pool: Pool, weight: TensorInfo, scales: TensorInfo) -> bool:
    packing = str(pool.settings.get("packing_format", pool.settings.get("backend", "")))
    if pool.settings.get("quant_method") == "awq" or packing.endswith("awq"):
        return True
    return "quant_method" not in pool.settings and weight.shape[1] * 8 == scales.shape[1] != weight.shape[1]


def _read_gptq(pool: Pool, stem: str, weight: TensorInfo, zeros: TensorInfo, scales: TensorInfo) -> None:
    bits = pool.number("bits", "w_bit", allowed=(2, 3, 4, 8))
    groups = pool.find(f"{stem}.g_idx")
    outputs, count = weight.shape[1], scales.shape[0]
    inputs = weight.shape[0] * 32 // bits
    if groups is not None:
        if len(groups.shape) != 1 or groups.dtype.name not in ("int32", "int64"):
            raise flaw(groups, f"must be a list of whole numbers, found {groups.dtype.name} {list(groups.shape)}")
        if not 0 <= inputs - groups.numel < 32:
            raise flaw(groups, f"has {groups.numel} entries, the weight has {inputs} inputs")
        inputs = groups.numel
        _check_groups(groups, count)
    size = pool.settings.get("group_size", pool.settings.get("q_group_size", -1))
    size = inputs if size in (-1, 0, None) else size
    if type(size) is not int or size < 1 or (groups is None and -(-inputs // size) != count):
        raise flaw(
            scales, f"{count} groups of {inputs} inputs contradict group_size {brief(pool.settings.get('group_size'))}"
        )
    if scales.shape[1] != outputs:
        raise flaw(scales, f"has {scales.shape[1]} columns, the weight {outputs}")
    if zeros.shape != (count, -(-outputs * bits // 32)):
        raise flaw(zeros, f"must have the shape {[count, -(-outputs * bits // 32)]}, found {list(zeros.shape)}")
    one_less = pool.settings.get("checkpoint_format", "gptq") != "gptq_v2"
    pool.make(
        f"{stem}.weight",
        (outputs, inputs),
        [weight, zeros, scales, groups],
        _Gptq(
            weight=weight,
            zeros=zeros,
            scales=scales,
            groups=groups,
            inputs=inputs,
            size=size,
            bits=bits,
            one_less=one_less,
        ),
        scheme=f"gptq {bits}-bit in groups of {size}",
        noise=StepNoise(size, (1 << bits) - 1, symmetric=False),
    )


def _check_groups(groups: TensorInfo, count: int) -> None:
    with Reader() as reader:
        found = read_whole(reader, groups)
    if found.numel() and not 0 <= int(found.min()) <= int(found.max()) < count:
        raise flaw(groups, f"names groups {int(found.min())} to {int(found.max())}, there are {count}")


def _read_awq(pool: Pool, stem: str, weight: TensorInfo, zeros: TensorInfo, scales: TensorInfo) -> None:
    version = str(pool.settings.get("version", "gemm")).lower()
    if version != "gemm":
        raise UnsupportedError(f"{pool.where}: AWQ in the layout {version!r} cannot be read, only 'gemm'")
    pool.number("bits", "w_bit", allowed=(4,), default=4)
    inputs, outputs, count = weight.shape[0], weight.shape[1] * 8, scales.shape[0]
    if inputs % count:
        raise flaw(scales, f"{count} groups do not divide {inputs} inputs")
    if scales.shape[1] != outputs or zeros.shape != (count, outputs // 8):
        raise flaw(
            weight,
            f"shapes do not fit: scales {list(scales.shape)}, zero points {list(zeros.shape)}, weight {list(weight.shape)}",
        )
    size = inputs // count
    pool.make(
        f"{stem}.weight",
        (outputs, inputs),
        [weight, zeros, scales],
        _Awq(weight, zeros, scales, size),
        scheme=f"awq 4-bit in groups of {size}",
        noise=StepNoise(size, 15, symmetric=False),
    )
