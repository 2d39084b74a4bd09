"""Every operation that loops know gives the bits of torch, on numbers of all kinds."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from merganser.engine.fusion.arithmetic import ELEMENTWISE
from merganser.engine.fusion.graph import Unfusable
from merganser.engine.fusion.trace import Form, trace
from tests.engine.fusion.programs import fuse, patterns, run, same_bits

F32, F64, F16, BF16 = torch.float32, torch.float64, torch.float16, torch.bfloat16
I32, I64 = torch.int32, torch.int64
# not divisible by the length of a vector
SIZE = 5003

OPERATIONS: dict[str, tuple[Callable[..., Tensor], list[tuple[torch.dtype, ...]]]] = {
    "add": (lambda a, b: a + b, [(F32, F32), (F64, F64), (F32, F64), (F32, torch.bool), (I64, I64), (I32, I32)]),
    "add a number": (lambda a: a + 0.1, [(F32,), (F64,)]),
    "subtract": (lambda a, b: a - b, [(F32, F32), (F64, F32), (I32, I32)]),
    "subtract a number": (lambda a: a - 3, [(F32,), (I64,)]),
    "subtract from a number": (lambda a: 0.3 - a, [(F32,), (F64,)]),
    "multiply": (lambda a, b: a * b, [(F32, F32), (F64, F64), (I32, I32), (I64, I64)]),
    "multiply by a number": (lambda a: a * 2.0**900, [(F32,), (F64,)]),
    "divide": (lambda a, b: a / b, [(F32, F32), (F64, F64), (I32, I32)]),
    "divide by a number": (lambda a: a / 3, [(F32,), (F64,)]),
    "reciprocal": (lambda a: a.reciprocal(), [(F32,), (F64,)]),
    "negate": (lambda a: -a, [(F32,), (F64,)]),
    "abs": (lambda a: a.abs(), [(F32,), (F64,)]),
    "ceil": (lambda a: a.ceil(), [(F32,), (F64,)]),
    "floor": (lambda a: a.floor(), [(F32,), (F64,)]),
    "square": (lambda a: a.square(), [(F32,), (F64,)]),
    "clamp": (lambda a: a.clamp(-0.5, 0.25), [(F32,), (F64,)]),
    "clamp from below": (lambda a: a.clamp(min=1), [(F32,), (F64,)]),
    "clamp_min": (lambda a: torch.clamp_min(a, 0.0), [(F32,)]),
    "clamp from above": (lambda a: a.clamp(max=-1e-3), [(F32,), (F64,)]),
    "and": (lambda a, b: a & b, [(torch.bool, torch.bool), (I32, I32), (I64, I64)]),
    "and a number": (lambda a: a & 0xFFFF, [(I32,), (I64,)]),
    "or": (lambda a, b: a | b, [(torch.bool, torch.bool), (I32, I32)]),
    "or a number": (lambda a: a | 12, [(I32,)]),
    "exclusive or": (lambda a, b: a ^ b, [(torch.bool, torch.bool), (I32, I32)]),
    "exclusive or with a number": (lambda a: a ^ -(1 << 31), [(I32,)]),
    "not": (lambda a: ~a, [(torch.bool,), (I32,), (I64,)]),
    "shift": (lambda a: a >> 15, [(I32,), (I64,)]),
    "equal": (lambda a, b: a == b, [(F32, F32), (I32, I32), (torch.bool, torch.bool)]),
    "not equal": (lambda a, b: a != b, [(F32, F32), (F64, F32), (I64, I64)]),
    "less": (lambda a, b: a < b, [(F32, F32), (F64, F64), (I32, I32), (torch.bool, torch.bool)]),
    "less or equal": (lambda a, b: a <= b, [(F32, F32), (I32, I64)]),
    "greater": (lambda a, b: a > b, [(F32, F32), (F32, F64)]),
    "greater or equal": (lambda a, b: a >= b, [(F32, F32)]),
    "compare with a number": (
        lambda a: torch.stack([a == 1, a != 0, a < 0.1, a <= 0, a > 1e-42, a >= 3.4028235677973366e38]),
        [(F32,), (F64,)],
    ),
    "where": (
        lambda a, b, c: torch.where(a, b, c),
        [(torch.bool, F32, F32), (torch.bool, F64, F32), (torch.bool,) * 3],
    ),
    "where a number": (lambda a, b: torch.where(a, b, 0.1), [(torch.bool, F32), (torch.bool, F64)]),
    "to float32": (lambda a: a.float(), [(BF16,), (F16,), (F64,), (I32,), (I64,), (torch.bool,)]),
    "to float64": (lambda a: a.double(), [(BF16,), (F16,), (F32,), (I32,), (I64,), (torch.bool,)]),
    "to float16": (lambda a: a.half(), [(F32,), (F64,), (BF16,)]),
    "to bfloat16": (lambda a: a.bfloat16(), [(F32,), (F64,), (F16,), (I32,)]),
    "to bool": (lambda a: a.bool(), [(F32,), (F64,), (BF16,), (F16,), (I32,)]),
    "to whole numbers": (
        lambda a: torch.stack([a.to(torch.int16).to(I64), a.to(I32).to(I64), a.to(I64)]),
        [(I32,), (I64,), (torch.bool,)],
    ),
    "the bits": (lambda a: a.view(I32 if a.dtype == F32 else I64), [(F32,), (F64,)]),
    "numbers of bits": (lambda a: a.view(F32 if a.dtype == I32 else F64), [(I32,), (I64,)]),
    "the largest of a stack": (lambda a, b: torch.stack([a, b, -a]).amax(0), [(F32, F32), (F64, F64)]),
    "constants": (
        lambda a: a + torch.full_like(a, 0.1) * torch.ones_like(a) - torch.zeros_like(a) + a.new_full(a.shape, 2),
        [(F32,), (F64,)],
    ),
    "indices": (lambda a: torch.arange(a.numel(), dtype=I32) * 3 + a, [(I32,), (I64,)]),
    "in place": (lambda a: (a * 1).mul_(2.0).add_(a).clamp_(min=0).abs_().square_(), [(F32,), (F64,)]),
}


@pytest.mark.parametrize(
    ("name", "dtypes"), [(name, own) for name, (_, each) in OPERATIONS.items() for own in each], ids=str
)
def test_bits_are_those_of_torch(name: str, dtypes: tuple[torch.dtype, ...]) -> None:
    function = OPERATIONS[name][0]
    inputs = [patterns(dtype, SIZE, seed) for seed, dtype in enumerate(dtypes)]
    program = fuse(lambda *given: [function(*given)], inputs)
    assert program.between == ()
    (found,) = program.bind([])(inputs)
    assert same_bits(found, function(*inputs))


def test_the_larger_and_the_smaller() -> None:
    a, b = patterns(F32, SIZE, 0), patterns(F32, SIZE, 1)
    # of 0.0 and -0.0 torch takes another one in its vectors than at their end
    a, b = (torch.where(x == 0, torch.ones_like(x), x) for x in (a, b))
    found = run(lambda a, b: [torch.maximum(a, b), torch.minimum(a, b), a.clamp(b, b + 1)], [a, b])
    for one, expected in zip(found, (torch.maximum(a, b), torch.minimum(a, b), a.clamp(b, b + 1)), strict=True):
        assert same_bits(one, expected)


def test_every_operation_is_tried() -> None:
    seen = set()
    functions = [(function, own) for function, each in OPERATIONS.values() for own in each]
    functions.append((lambda a, b: torch.maximum(a, torch.minimum(a, b)) + a.clamp(b, b), (F32, F32)))
    for function, dtypes in functions:
        graph = trace(lambda *given, own=function: [own(*given)], [Form("block", dtype) for dtype in dtypes], None)
        seen |= {node.name for node in graph.nodes}
    # torch writes these otherwise, but others may call them
    rare = {"aten.add.Scalar", "aten.sub.Scalar", "aten.mul.Scalar", "aten.div.Scalar"}
    assert set(ELEMENTWISE) - seen - rare == set()


@pytest.mark.parametrize("name", ["add", "sub", "mul", "div"])
def test_operations_with_numbers_under_their_own_names(name: str) -> None:
    operation = getattr(torch.ops.aten, name).Scalar
    tensor = patterns(F32, SIZE, 0)
    (found,) = run(lambda a: [operation(a, 0.7)], [tensor])
    assert same_bits(found, operation(tensor, 0.7))


@pytest.mark.parametrize(
    "function",
    [
        lambda a: a.exp(),
        lambda a: a.sqrt(),
        lambda a: a.long(),
        lambda a: a**3,
        lambda a: torch.add(a, a, alpha=2),
        lambda a: torch.div(a, a, rounding_mode="floor"),
        lambda a: a.half() + a.half(),
        lambda a: a.cumsum(0),
        lambda a: a.flip(0),
        lambda a: a / a.numel(),
        lambda a: a.sort().values,
        lambda a: a.float() - a.float().sum(),
        lambda a: a - a.double().mean().float(),
        lambda a: torch.cat([a, a])[: a.numel()],
        lambda a: a * (3 * len(a)),
    ],
)
def test_what_loops_do_not_know_is_done_by_torch(function: Callable[[Tensor], Tensor]) -> None:
    tensor = torch.randn(SIZE, generator=torch.Generator().manual_seed(0))

    def between(a: Tensor) -> list[Tensor]:
        return [function(a * 2) * 3]

    program = fuse(between, [tensor])
    assert program.between
    assert same_bits(program.bind([])([tensor])[0], between(tensor)[0])


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda a: [a * float(a[0])], "looks at values"),
        (lambda a: [a * 2 if a.sum() > 0 else a], "looks at values"),
        (lambda a: [a.mul_(2)], "changes a part of a tensor, or one that it was given"),
        (lambda a: [a * 2 if len(a) > 30 else a * 3], "depend on the size of the block"),
        (lambda a: [a * (1.5 * len(a))], "depend on the size of the block"),
        (lambda a: [a[: len(a) // 2] * 2], "depend on the size of the block"),
        (lambda a: [torch.zeros(7) * a], "fails on a small block"),
        (lambda a: [a.exp()], "no operation that a loop knows"),
    ],
)
def test_what_cannot_be_fused(function: Callable[[Tensor], list[Tensor]], reason: str) -> None:
    with pytest.raises(Unfusable, match=reason):
        fuse(function, [torch.zeros(100)])


def test_a_view_of_what_changes_later_is_refused() -> None:
    def function(a: Tensor) -> list[Tensor]:
        total = a + 1
        view = total.view(-1, 2)
        total.mul_(2)
        return [total + view.view(-1)]

    with pytest.raises(Unfusable, match="a view is used after"):
        fuse(function, [torch.zeros(100)])
