import numpy as np
import pytest
import torch

from merganser.ops.bits import pack_codes, pack_flags, packed_size, unpack_codes, unpack_flags

COUNTS = [0, 1, 7, 8, 9, 63, 64, 65, 1000]


@pytest.mark.parametrize("count", COUNTS)
def test_flags_are_packed_as_numpy_packs_them(count):
    flags = torch.rand(count, generator=torch.Generator().manual_seed(count)) < 0.5
    packed = pack_flags(flags)
    assert packed.dtype == torch.uint8
    assert packed.tolist() == np.packbits(flags.numpy(), bitorder="little").tolist()
    assert packed.shape == (packed_size(count),)
    assert torch.equal(unpack_flags(packed, count), flags)


def test_flags_of_every_byte():
    packed = torch.arange(256, dtype=torch.uint8)
    flags = unpack_flags(packed, 2048)
    assert torch.equal(pack_flags(flags), packed)
    assert flags[8:16].tolist() == [True] + [False] * 7


def test_flags_of_any_shape_and_place():
    flags = torch.rand(3, 5, 7, generator=torch.Generator().manual_seed(0)) < 0.5
    part = flags[1:, 1:].transpose(0, 2)
    assert torch.equal(unpack_flags(pack_flags(part), part.numel()), part.reshape(-1))


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("count", COUNTS)
def test_codes_come_back(bits, count):
    codes = torch.randint(0, 2**bits, (count,), generator=torch.Generator().manual_seed(count))
    packed = pack_codes(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (packed_size(count, bits),)
    assert unpack_codes(packed, bits, count).tolist() == codes.tolist()


def test_codes_by_hand():
    assert pack_codes(torch.tensor([1, 2, 3, 0, 1]), 2).tolist() == [1 + 2 * 4 + 3 * 16, 1]
    assert pack_codes(torch.tensor([1, 15, 7]), 4).tolist() == [1 + 15 * 16, 7]
    assert pack_codes(torch.tensor([0x1234, 0xFFFF]), 16).tolist() == [0x34, 0x12, 0xFF, 0xFF]
