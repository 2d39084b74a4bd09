"""Pack flags and small integers into bytes, and unpack them."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from ..method import Part

_GATHER = sum(1 << (56 - 7 * k) for k in range(8))


def packed_size(count: int, bits: int = 1) -> int:
    """Return how many bytes `count` packed numbers of `bits` bits take."""
    return -(-count * bits // 8)


def pack_flags(flags: Tensor) -> Tensor:
    """Pack 8 flags into each byte, the first in the lowest bit; the last byte is padded with zeros.

    Args:
        flags: Any shape, bool.

    Returns:
        Shape [ceil(size / 8)], uint8.
    """
    count = flags.numel()
    padded = torch.zeros(8 * packed_size(count), dtype=torch.uint8, device=flags.device)
    padded[:count] = flags.reshape(-1)
    return ((padded.view(torch.int64) * _GATHER) >> 56).to(torch.uint8)


def unpack_flags(packed: Tensor, count: int) -> Tensor:
    """Return the first `count` flags that `pack_flags` packed, flat, bool."""
    return _flags_of_bytes(packed.device)[packed.to(torch.int64)].view(torch.uint8)[:count].view(torch.bool)


@lru_cache(maxsize=16)
def _flags_of_bytes(device: torch.device) -> Tensor:
    """Return the eight flags of each byte value as the eight bytes of a little-endian int64, shape [256]."""
    codes = torch.arange(256, device=device).unsqueeze(1)
    places = torch.arange(8, device=device)
    return (((codes >> places) & 1) << (8 * places)).sum(dim=1)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack integers from 0 to 2^bits - 1, the first in the lowest bits.

    Args:
        codes: Any shape, any integer dtype.
        bits: 1, 2, 4, 8 or 16.

    Returns:
        Shape [ceil(size * bits / 8)], uint8.
    """
    flat = codes.reshape(-1).to(torch.int32)
    if bits == 16:
        return torch.stack([flat & 255, flat >> 8], dim=1).reshape(-1).to(torch.uint8)
    share = 8 // bits
    padded = torch.nn.functional.pad(flat, (0, -flat.numel() % share)).view(-1, share)
    packed = padded[:, 0]
    for k in range(1, share):
        packed = packed | (padded[:, k] << (k * bits))
    return packed.to(torch.uint8)


def unpack_codes(packed: Tensor, bits: int, count: int) -> Tensor:
    """Return the first `count` numbers that `pack_codes` packed, flat, int32."""
    wide = packed.to(torch.int32)
    if bits == 16:
        low, high = wide.view(-1, 2).unbind(dim=1)
        return (low | (high << 8))[:count]
    columns = [(wide >> (k * bits)) & ((1 << bits) - 1) for k in range(8 // bits)]
    return torch.stack(columns, dim=1).reshape(-1)[:count]


def packed(count: int, bits: int = 1) -> Part:
    """Declare a part of a sidecar that holds `count` numbers of `bits` bits, packed as by `pack_codes`."""
    return Part((packed_size(count, bits),), "uint8")
