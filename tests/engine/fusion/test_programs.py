"""Sums, rows, and how programs are called."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from merganser.engine.fusion import machine
from merganser.engine.fusion.emit import NAME, write
from merganser.engine.fusion.lower import lower
from merganser.engine.fusion.trace import Form, trace
from merganser.engine.merge import merge
from merganser.ops import by_rank, rank_keys
from merganser.ops.histogram import count
from tests.engine.fusion.programs import fuse, run, same_bits
from tests.making import assert_equal, make_recipe, read_model, write_llamas


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("size", [16, 17, 31, 32, 1000, 4096])
def test_totals(size: int) -> None:
    a = random(size)
    found = run(lambda a: [(a > 0).sum(), a.double().sum(), (a - a).amax(), a.max(), -a.double().amax()], [a])
    assert found[0] == (a > 0).sum()
    assert found[0].dtype == torch.int64
    torch.testing.assert_close(found[1], a.double().sum())
    assert found[2] == 0
    assert found[3] == a.max()
    assert found[4] == -a.amax().double()


def sum_of_lanes(numbers: np.ndarray) -> np.float64:
    """A sum as it is defined: 16 partial sums, then halves of these added to each other."""
    lanes = np.zeros(16)
    done = 0
    for start in range(0, len(numbers), 16):
        first = min(start, len(numbers) - 16)
        new = np.arange(16) >= start - first
        lanes = np.where(new, lanes + numbers[first : first + 16], lanes)
        done += new.sum()
    assert done == len(numbers)
    while len(lanes) > 1:
        half = len(lanes) // 2
        lanes = lanes[:half] + lanes[half:]
    return lanes[0]


@pytest.mark.parametrize("size", [16, 17, 1000, 1003])
def test_the_order_of_sums(size: int) -> None:
    a = random(size, dtype=torch.float64) ** 3
    (found,) = run(lambda a: [a.sum()], [a])
    assert found == sum_of_lanes(a.numpy())


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="kinds of processors that this one can be")
def test_sums_and_bits_are_the_same_on_older_processors() -> None:
    a = random(1003)

    def function(a: Tensor) -> list[Tensor]:
        return [(a.double() * a.double()).sum(), (a * 0.3 + a).to(torch.bfloat16), torch.where(a > 0, a / 3, -a).half()]

    forms = [Form("block", a.dtype)]
    stage = lower(trace(function, forms, None), forms).stages[0]
    source = write(stage.stores)
    results = []
    # AVX2 with fused multiply-add, and whatever is here
    for cpu in ("haswell", None):
        outputs = [torch.zeros(1, dtype=torch.float64), torch.zeros(1003).bfloat16(), torch.zeros(1003).half()]
        by_dtype = {out.dtype: out for out in outputs}
        stored = [by_dtype[store.value.dtype] for store in source.stores]
        words = torch.tensor([1, 1003, a.data_ptr(), *(out.data_ptr() for out in stored)])
        machine.Function(source.text, NAME, cpu)(words.data_ptr(), torch.zeros(1).data_ptr())
        results.append(outputs)
    for old, new in zip(*results, strict=True):
        assert torch.equal(old, new)
    (total, *_), expected = results[0], function(a)
    torch.testing.assert_close(total[0], expected[0])
    assert torch.equal(results[0][1], expected[1])


@pytest.mark.parametrize("columns", [16, 23, 100])
@pytest.mark.parametrize("rows", [1, 2, 7])
def test_rows(rows: int, columns: int) -> None:
    a, b, scale = random(rows, columns), random(rows, columns, seed=1), random(rows, 1, seed=2)
    profile = random(columns, seed=3)

    def function(a: Tensor, b: Tensor, scale: Tensor, profile: Tensor) -> list[Tensor]:
        top = a.amax(1, keepdim=True)
        total = (a.double() * b.double()).sum(1, keepdim=True)
        return [a * scale + b * profile - top, total, top.squeeze(1) + 1, torch.stack([total, total * 2])]

    program = fuse(function, [a, b], [profile], [scale], by_row=True)
    found, expected = program.bind([profile])([a, b, scale]), function(a, b, scale, profile)
    assert same_bits(found[0], expected[0])
    assert same_bits(found[2], expected[2])
    for i in (1, 3):
        torch.testing.assert_close(found[i], expected[i], rtol=1e-14, atol=1e-14)
    assert program.between == ()


def test_a_sort_between_two_loops() -> None:
    a, table = random(9, 40), torch.linspace(0, 1, 40)

    def function(a: Tensor, table: Tensor) -> list[Tensor]:
        delta = a * 3
        return [torch.where(by_rank(delta.abs(), table) > 0.5, delta, 0.0)]

    program = fuse(function, [a], [table], by_row=True)
    assert program.between == ("merganser.order",)
    assert same_bits(program.bind([table])([a])[0], function(a, table)[0])


@pytest.mark.parametrize("columns", [16, 23, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bool, torch.int64])
def test_placing_in_a_loop(columns: int, dtype: torch.dtype) -> None:
    a, table = random(9, columns).round(decimals=1), torch.arange(columns).remainder(7).sub(3).to(dtype)

    def function(a: Tensor, table: Tensor) -> list[Tensor]:
        return [by_rank((a * 3).abs(), table, rank_keys((a * 3).abs()))]

    program = fuse(function, [a], [table], by_row=True)
    assert program.between == ("merganser.order",)
    assert same_bits(program.bind([table])([a])[0], function(a, table)[0])


def test_short_blocks_and_rows_are_left_to_torch() -> None:
    flat = fuse(lambda a: [a * 2], [torch.zeros(100)])
    assert [flat.takes((n,)) for n in (1, 15, 16)] == [False, False, True]
    elementwise = fuse(lambda a: [a * 2], [torch.zeros(4, 5)], by_row=True)
    assert [elementwise.takes((n, 5)) for n in (1, 3, 4)] == [False, False, True]
    by_row = fuse(lambda a: [a * a.amax(1, keepdim=True)], [torch.zeros(4, 5)], by_row=True)
    assert not by_row.takes((4, 5))


def test_fixed_numbers_are_computed_once() -> None:
    a, weight = random(100), torch.tensor([0.3, 0.7], dtype=torch.float64)
    program = fuse(lambda a, weight: [a * (weight / weight.sum())[1]], [a], [weight])
    bound = program.bind([weight])
    again = program.bind([weight])
    assert same_bits(bound([a])[0], a * 0.7)
    assert same_bits(again([a])[0], a * 0.7)
    weight.zero_()
    assert same_bits(bound([a])[0], a * 0.7)
    assert same_bits(program.bind([torch.tensor([1.0, 3.0], dtype=torch.float64)])([a])[0], a * 0.75)


def test_many_threads_call_one_program() -> None:
    a = random(100_003)
    bound = fuse(lambda a: [a * 2 + 1, a.double().sum()], [a]).bind([])
    expected, failed = bound([a]), []

    def work() -> None:
        for _ in range(20):
            if not all(map(torch.equal, bound([a]), expected)):
                failed.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


def test_no_torch_compiler_is_imported() -> None:
    code = "import sys, torch\nfrom tests.engine.fusion.programs import run\n"
    code += "run(lambda a: [a * 2], [torch.ones(100)])\nassert 'torch._dynamo' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[3])


FORBIDDEN = """
import ctypes, sys, torch
# PR_SET_MDWE, PR_MDWE_REFUSE_EXEC_GAIN
if ctypes.CDLL(None).prctl(65, 1, 0, 0, 0):
    sys.exit(3)
from merganser.engine.fusion.machine import why_not
print(why_not())
from merganser.engine.merge import merge
print(merge(sys.argv[1], sys.argv[2]).record["compiled"])
"""


WITHOUT = """
import sys
sys.modules["llvmlite"] = None
from merganser.engine.fusion.machine import why_not
print(why_not().partition(" (")[0])
from merganser.engine.merge import merge
print(merge(sys.argv[1], sys.argv[2]).record["compiled"])
from merganser.method import get_method
from merganser.testing.laws import fuses_to_the_same_bits
fuses_to_the_same_bits(get_method("linear"))
"""


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        pytest.param(
            FORBIDDEN,
            "this process may not map executable memory",
            marks=pytest.mark.skipif(sys.platform != "linux", reason="how Linux forbids it"),
        ),
        (WITHOUT, "llvmlite cannot be imported"),
    ],
)
def test_where_no_machine_code_can_be_made(tmp_path: Path, code: str, reason: str) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(json.dumps(make_recipe("linear", write_llamas(tmp_path, 2), parameters={"weight": 1})))
    command = [sys.executable, "-c", code, str(recipe), str(tmp_path / "out")]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    if found.returncode == 3:
        pytest.skip("this kernel of Linux cannot forbid it")
    assert (found.returncode, found.stdout) == (0, f"{reason}\nFalse\n")
    assert_equal(read_model(merge(recipe, tmp_path / "fused").out), read_model(tmp_path / "out"))


def test_code_stays_as_long_as_its_function() -> None:
    a = random(100)
    for _ in range(20):
        bound = fuse(lambda a: [a * 2], [a]).bind([])
        assert same_bits(bound([a])[0], a * 2)


@pytest.mark.parametrize("size", [16, 17, 1000, 1003])
@pytest.mark.parametrize("few", [False, True])
def test_histograms(size: int, few: bool) -> None:
    tensors = [
        torch.randint(-40 if few else 0, 7, (size,), generator=torch.Generator().manual_seed(i)) for i in range(3)
    ]

    def function(*tensors: Tensor) -> list[Tensor]:
        return [count([tensors[0] + 1 - 1, tensors[1].to(torch.int16), tensors[2].to(torch.int32)], 9, few=few)]

    bound = fuse(function, tensors).bind([])
    (found,), (expected,) = bound(tensors), function(*tensors)
    assert torch.equal(found, expected)
    assert found.sum() == sum(int((tensor >= 0).sum()) for tensor in tensors)
    (again,) = bound(tensors, found)
    assert again is found
    assert torch.equal(found, 2 * expected)


def test_where_a_single_row_is_special_it_is_left_to_torch() -> None:
    def function(a: Tensor) -> list[Tensor]:
        # a reshape of a part of several rows is a copy, of one row it is none
        double = a * 2
        return [double + 1, double[:, :32].reshape(-1, 8)]

    a = random(5, 40)
    program = fuse(function, [a], by_row=True)
    assert [program.takes((rows, 40)) for rows in (1, 2)] == [False, True]
    for found, expected in zip(program.bind([])([a]), function(a), strict=True):
        assert same_bits(found, expected)
