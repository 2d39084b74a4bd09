import subprocess
import sys

import pytest
import torch

from merganser.ops.rows import by_rank, sort_rows


def ranks(magnitudes):
    return by_rank(magnitudes, torch.arange(magnitudes.shape[1], dtype=torch.float32)).tolist()


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
