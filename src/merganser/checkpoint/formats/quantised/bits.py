"""Numbers of a few bits packed into larger words, the lowest bits first."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["E2M1", "nibbles", "table", "unpack", "unpack_apart", "words_for"]

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""float4 E2M1: the value of each four bits; the highest is the sign."""


def words_for(count: int, bits: int) -> int:
    """Return how many words of 32 bits hold `count` numbers back to back."""
    return -(-count * bits // 32)


def unpack(words: Tensor, bits: int, count: int) -> Tensor:
    """Return numbers that lie back to back in the words of each row, also across two words.

    Args:
        words: int32 or uint32, shape [rows, words].
        bits: Bits of a number, 1 to 16.
        count: Numbers per row.

    Returns:
        int32, shape [rows, count], each from 0 to 2^bits - 1.
    """
    import torch

    words = words.view(torch.int32)
    mask = (1 << bits) - 1
    if 32 % bits == 0:
        shifts = torch.arange(0, 32, bits, dtype=torch.int32)
        return ((words[:, :, None] >> shifts) & mask).flatten(1)[:, :count]
    first = torch.arange(count) * bits
    word, shift = first // 32, first % 32
    wide = words.long() & 0xFFFFFFFF
    following = torch.nn.functional.pad(wide, (0, 1))[:, word + 1]
    return ((wide[:, word] | following << 32) >> shift & mask).int()


def unpack_apart(words: Tensor, bits: int, count: int) -> Tensor:
    """Return numbers of which each lies within one word, as `unpack`; bits at the end of a word are unused."""
    import torch

    shifts = torch.arange(0, 32 // bits * bits, bits, dtype=torch.int32)
    return ((words.view(torch.int32)[:, :, None] >> shifts) & ((1 << bits) - 1)).flatten(1)[:, :count]


def nibbles(data: Tensor, *, high_first: bool = False) -> Tensor:
    """Return the two numbers of four bits in each byte: int32, the last dimension twice as long."""
    import torch

    low, high = (data & 15).int(), (data >> 4).int()
    return torch.stack([high, low] if high_first else [low, high], -1).flatten(-2)


def table(values: tuple[float, ...]) -> Tensor:
    """Return a table of values as float32."""
    import torch

    return torch.tensor(values, dtype=torch.float32)
