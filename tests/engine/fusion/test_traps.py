"""What a recording on a small block must not take for what holds on every block."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from merganser.engine.fusion.graph import Unfusable
from merganser.engine.fusion.run import Program
from merganser.engine.fusion.trace import Form
from merganser.ops.random import Random, keys
from tests.engine.fusion.programs import fuse, patterns, run, same_bits

F32 = torch.float32
COUNTER = torch.zeros(())
SHARES = torch.tensor([0.25, 0.75], dtype=torch.float64)


def compare_in_place(a: Tensor) -> Tensor:
    mask = (a * 1).gt_(0.5)
    return mask + mask


def count_calls(a: Tensor) -> Tensor:
    COUNTER.add_(1)
    return a * COUNTER


def change_through_a_view(a: Tensor) -> Tensor:
    return a.view(-1).mul_(2) * 1


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda a: a * a.tolist()[0], "tolist looks at values"),
        (lambda a: a * float(a.numpy().max()), "numpy looks at values"),
        (lambda a: a / max(len(torch.nonzero(a > 0.5)), 1), "depend on the size of the block, or on values"),
        (lambda a: a / max(a[a > 0.5].numel(), 1), "depend on the size of the block, or on values"),
        (lambda a: a * 2 if len(a) > 1000 else a, "depend on the size of the block, or on values"),
        (lambda a: a * torch.rand(()), "draws random numbers of torch"),
        (lambda a: a * (a * 1).bernoulli_(0.5), "draws random numbers of torch"),
        (compare_in_place, "converts its result"),
        (count_calls, "changes a part of a tensor, or one that it was given"),
        (change_through_a_view, "changes a part of a tensor, or one that it was given"),
    ],
)
def test_what_holds_for_this_block_alone_is_not_fused(function: Callable[[Tensor], Tensor], reason: str) -> None:
    with pytest.raises(Unfusable, match=reason):
        fuse(lambda a: [function(a)], [torch.zeros(100)])


@pytest.mark.parametrize("read", [Tensor.tolist, Tensor.numpy])
def test_parameters_that_are_read_are_not_those_of_the_recording(read: Callable[[Tensor], list[float]]) -> None:
    with pytest.raises(Unfusable, match="looks at values"):
        fuse(lambda a, shares: [a * float(read(shares)[1])], [torch.zeros(100)], [SHARES])


def test_a_tensor_made_by_the_function_may_be_changed() -> None:
    a = torch.randn(100, generator=torch.Generator().manual_seed(0))
    (found,) = run(lambda a: [a * torch.tensor(0.5).add_(1)], [a])
    assert same_bits(found, a * 1.5)


@pytest.mark.parametrize(
    ("function", "dtypes"),
    [
        (lambda a: torch.rsub(a, 2, alpha=3), [F32]),
        (lambda a: a == True, [F32]),  # noqa: E712
        (lambda a: a > True, [torch.int32]),
        (lambda a: a + True, [F32]),
        (lambda a: a.clamp(min=math.nan), [F32]),
        (lambda a, b: torch.stack([a, b]).amax(0), [torch.int32, torch.int32]),
        (lambda a, b: torch.stack([a, b]).amax(0).float(), [torch.bfloat16, torch.bfloat16]),
        (lambda a, b: torch.stack([a > 0, b > 0]).amax(0), [F32, F32]),
        (lambda a, b: torch.stack([a, b])[1], [torch.float64, F32]),
        (lambda a, b: torch.stack([a, b])[1], [F32, torch.int64]),
        (lambda a, b: torch.stack([a, b]).amax(0), [torch.bool, F32]),
        (lambda a, b: torch.stack([a, b]), [torch.bfloat16, F32]),
    ],
)
def test_rare_forms_of_operations(function: Callable[..., Tensor], dtypes: list[torch.dtype]) -> None:
    inputs = [patterns(dtype, 1003, seed) for seed, dtype in enumerate(dtypes)]
    (found,) = run(lambda *given: [function(*(one.clone() for one in given))], inputs)
    assert same_bits(found, function(*inputs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int16, torch.bool])
def test_fixed_numbers_of_every_dtype(dtype: torch.dtype) -> None:
    def function(a: Tensor, shares: Tensor) -> list[Tensor]:
        return [torch.where(a > 0, (3 * shares[1]).to(dtype), torch.zeros_like(a, dtype=dtype))]

    a = patterns(F32, 1003, 0)
    (found,) = run(function, [a], [SHARES])
    assert same_bits(found, function(a, SHARES)[0])


@pytest.mark.parametrize("columns", [None, 24])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_numbers_of_the_block_that_torch_takes(columns: int | None, shape: tuple[int, ...]) -> None:
    def function(a: Tensor, offset: Tensor, own: Tensor) -> list[Tensor]:
        return [a * Random(own, offset).uniform(0, shape), offset * 2 + 1]

    own, a = keys(7, "t", 1), torch.randn(480, generator=torch.Generator().manual_seed(0))
    a = a if columns is None else a.view(-1, columns)
    forms = [Form("block", F32), Form("scalar", torch.int64), Form("fixed", own.dtype, tuple(own.shape))]
    program = Program(function, forms, columns)
    assert program.takes(tuple(a.shape))
    bound = program.bind([own])
    for offset in (0, 1003, 2**33):
        for found, expected in zip(bound([a, offset]), function(a, torch.tensor(offset), own), strict=True):
            assert same_bits(found, expected)
