"""Programs of random operations, on numbers of all dtypes, give the bits of torch."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from merganser.engine.fusion.graph import Unfusable
from tests.engine.fusion.programs import patterns, run, same_bits

DTYPES = (
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float64,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.bool,
)
SHARES = torch.tensor([0.3, 0.7], dtype=torch.float64)
SIZE = 133

OF_ONE: list[Callable[[Tensor], Tensor]] = [
    *(lambda a, own=dtype: a.to(own) for dtype in DTYPES),
    lambda a: -a,
    lambda a: a.abs(),
    lambda a: a.ceil(),
    lambda a: a * a,
    lambda a: ~a,
    lambda a: a >> 3,
    lambda a: a & 255,
    lambda a: a.clamp(-1, 2),
    lambda a: a * 0.3,
    lambda a: 0.7 - a,
    lambda a: a == 1,
    lambda a: a < True,
    lambda a: a / 3,
    lambda a: torch.full_like(a, 2),
    lambda a: a.exp(),
    lambda a: a.view(torch.int32),
    lambda a: a.clone().add_(1).neg_(),
]
OF_TWO: list[Callable[[Tensor, Tensor], Tensor]] = [
    lambda a, b: a + b,
    lambda a, b: a * b,
    lambda a, b: a / b,
    lambda a, b: a > b,
    lambda a, b: a ^ b,
    lambda a, b: torch.where(a > 0, a, b),
    lambda a, b: torch.stack([a, b]).amax(0),
    lambda a, b: torch.stack([a, b])[1],
    lambda a, b: (a * 1).mul_(b),
    lambda a, b: (a * 1).copy_(b),
    lambda a, b: torch.rsub(a, b, alpha=2),
    lambda a, b: torch.add(a, b, alpha=3),
]
Step = tuple[Callable[..., Tensor], list[int]]


def results(steps: Sequence[Step], blocks: Sequence[Tensor], shares: Tensor) -> list[Tensor]:
    """The results of steps, each of which takes earlier results, blocks or fixed numbers."""
    found = [*blocks, shares[0], shares[1].bfloat16(), (10 * shares[1]).long(), shares[0] > 0.5, shares.float()[1]]
    for operation, taken in steps:
        found.append(operation(*(found[i] for i in taken)))
    return found


@pytest.mark.parametrize("seed", range(60))
def test_random_programs(seed: int) -> None:
    chance = random.Random(seed)
    blocks = [patterns(chance.choice(DTYPES), SIZE, seed + i) for i in range(3)]
    steps: list[Step] = []
    for _ in range(14):
        count = len(steps) + 8
        operations: list[Callable[..., Tensor]] = chance.choice([[*OF_ONE], [*OF_TWO]])
        operation = chance.choice(operations)
        taken = [chance.choice([*range(count), count - 1, count - 1]) for _ in range(operation.__code__.co_argcount)]
        taken = taken if operations[0] not in OF_ONE else taken[:1]
        try:
            last = results([*steps, (operation, taken)], blocks, SHARES)[-1]
        except (RuntimeError, TypeError):
            # torch has no such operation on these dtypes
            continue
        if last.shape in ((), (SIZE,)):
            steps.append((operation, taken))

    def function(a: Tensor, b: Tensor, c: Tensor, shares: Tensor) -> list[Tensor]:
        return [each for each in results(steps, [a, b, c], shares)[8:] if each.shape == a.shape][-3:] or [a * 1]

    try:
        found = run(function, blocks, [SHARES])
    except Unfusable:
        return
    for one, expected in zip(found, function(*blocks, SHARES), strict=True):
        assert same_bits(one, expected)
