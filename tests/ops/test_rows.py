import subprocess
import sys

import pytest
import torch

from merganser.ops.rows import by_rank, rank_keys, sort_rows


def ranks(magnitudes):
    table = torch.arange(magnitudes.shape[1], dtype=torch.float32)
    found = by_rank(magnitudes, table)
    assert torch.equal(by_rank(magnitudes, table, rank_keys(magnitudes)), found)
    return found.tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (7, 1), (3, 5), (40, 896), (1, 70000), (70000, 3), (2, 0), (0, 4)])
def test_ranks_are_those_of_a_stable_sort(dtype, shape):
    magnitudes = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype).abs()
    expected = magnitudes.argsort(dim=1, stable=True).argsort(dim=1)
    assert ranks(magnitudes) == expected.double().tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_of_equal_entries_the_first_is_the_smaller(dtype):
    magnitudes = torch.tensor([[2, 1, 2, 0, 1, 2], [0, 0, 0, 0, 0, 0], [5, 4, 3, 3, 2, 1]], dtype=dtype)
    assert ranks(magnitudes) == [[3, 1, 4, 0, 2, 5], [0, 1, 2, 3, 4, 5], [5, 4, 2, 3, 1, 0]]


def test_denormal_and_huge_numbers_keep_their_order():
    assert ranks(torch.tensor([[1e-45, 0.0, 3e38, 1e-38, 2e-45]])) == [[1, 0, 4, 3, 2]]


def test_looks_up_the_table_in_its_dtype():
    found = by_rank(torch.tensor([[3.0, 1.0, 2.0]]), torch.tensor([10, 20, 30]))
    assert found.dtype == torch.int64
    assert found.tolist() == [[30, 10, 20]]


# 0x3F80_0000 is 1.0; of 900 columns the lower 10 bits are replaced in a key
@pytest.mark.parametrize("lower", [[0], [0, 1], [3, 1, 2], [1, 0, 1023, 1], [0x400, 0x401, 0x3FF]])
@pytest.mark.parametrize("share", [0.01, 0.1, 0.5])
def test_lower_bits_that_a_key_lacks_decide_between_equal_upper_bits(lower, share):
    generator = torch.Generator().manual_seed(0)
    bits = 0x3F800000 + 0x10000 * torch.randint(40, (90, 900), generator=generator, dtype=torch.int32)
    some = torch.rand(bits.shape, generator=generator) < share
    bits += some * torch.tensor(lower, dtype=torch.int32)[torch.randint(len(lower), bits.shape, generator=generator)]
    magnitudes = bits.view(torch.float32)
    expected = magnitudes.argsort(dim=1, stable=True).argsort(dim=1)
    assert ranks(magnitudes) == expected.float().tolist()


def test_keys_are_for_float32_in_rows_that_leave_room_for_a_column():
    assert rank_keys(torch.ones(1, 1 << 15)) is not None
    assert rank_keys(torch.ones(1, (1 << 15) + 1)) is None
    assert rank_keys(torch.ones(1, 9, dtype=torch.float64)) is None


def test_leaves_its_inputs_alone_and_takes_views():
    wide = torch.randn(6, 40).abs()
    before = wide.clone()
    view = wide[:, ::2]
    assert ranks(view) == ranks(view.contiguous())
    assert torch.equal(sort_rows(view), view.sort(dim=1).values)
    assert torch.equal(wide, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sorts_rows(dtype):
    values = torch.randn(5, 300, dtype=dtype).abs()
    assert torch.equal(sort_rows(values), values.sort(dim=1).values)
    assert torch.equal(sort_rows(values.double()), values.double().sort(dim=1).values)


def test_operators_have_a_shape_without_values():
    rows, table = torch.rand(4, 6, device="meta"), torch.arange(6, device="meta")
    assert (by_rank(rows, table).shape, by_rank(rows, table).dtype) == ((4, 6), torch.int64)
    assert (sort_rows(rows).shape, sort_rows(rows).dtype) == ((4, 6), torch.float32)


def test_calling_an_operator_does_not_import_the_compiler():
    code = "import sys, torch; from merganser.ops import by_rank; by_rank(torch.rand(2, 3), torch.arange(3))\n"
    code += "assert 'torch._dynamo' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
