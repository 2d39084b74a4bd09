import math

import pytest
import torch
from torch import Tensor

from merganser.engine.kernels.block import Block
from merganser.engine.kernels.blocks import TensorRun
from merganser.engine.kernels.kernels import Kernels
from merganser.engine.kernels.merge_tensor import merge_tensor
from merganser.errors import NonFiniteError
from merganser.method import merge_method, statistic
from merganser.method.registry import get_method
from merganser.ops import order_statistic
from merganser.ops.random import keys


@pytest.mark.parametrize(("name", "parameters"), [("task_arithmetic", {}), ("ties", {"density": 0.5})])
def test_fused_kernels_notice_what_is_not_finite(name, parameters):
    method = get_method(name)
    inputs = [torch.full((40, 103), 1.0 + i, dtype=torch.float16) for i in range(3)]
    merge_tensor(method, inputs[0], inputs[1:], {"weight": 1, **parameters}, fused=True)
    for place in range(3):
        for bad in (math.nan, math.inf, -math.inf):
            broken = [tensor.clone() for tensor in inputs]
            broken[place][-1, -1] = bad
            with pytest.raises(NonFiniteError):
                merge_tensor(method, broken[0], broken[1:], {"weight": 1, **parameters}, fused=True)
    # beyond float16, though all that was read is finite
    with pytest.raises(NonFiniteError):
        merge_tensor(method, inputs[0], inputs[1:], {"weight": 40_000, "normalize": False, **parameters}, fused=True)


def values_of(models: list[Tensor]) -> list[Tensor]:
    return [models[0]]


def ranks(positive: Tensor, offset: Tensor | None) -> Tensor:
    return torch.ones(len(positive), 1, dtype=torch.int64) + (0 if offset is None else 1)


def sums(models: list[Tensor], offset: Tensor | None) -> Tensor:
    return torch.stack([model.double().sum() + (0 if offset is None else offset) for model in models])


def half(measured: Tensor, offset: Tensor | None) -> Tensor:
    return measured * (0.5 if offset is None else 1.0)


@pytest.mark.parametrize("block", [2, 8])
def test_a_statistic_that_is_not_wanted_is_none_for_those_after_it(block):
    @merge_method(
        family="toys",
        cite="-",
        statistics={
            "offset": statistic(
                lambda models: models[0].double().sum() * 0 + 1, lambda measured: measured, when="flag"
            ),
            "top": order_statistic(values_of, ranks),
            "total": statistic(sums, half),
        },
    )
    def toy(models: list[Tensor], offset: Tensor | None, top: Tensor, total: Tensor, *, flag: bool = False) -> Tensor:
        """Do something.

        merged = something

        Args:
            flag: Want it.
        """
        return torch.zeros_like(models[0]) + top[0, 0] + 100 * total[0] + (0 if offset is None else 0.5)

    model = torch.tensor([1.0, 4.0, 3.0, 2.0])
    assert merge_tensor(toy, None, [model], block=block).tolist() == [4 + 100 * 5] * 4
    blocks = -(-4 // block)
    wanted = merge_tensor(toy, None, [model], {"flag": True}, block=block).tolist()
    # every block adds one to the offset; the total adds it once for every block
    assert wanted == [3 + 100 * (10 + blocks * blocks) + 0.5] * 4


def highest(models: list[Tensor]) -> Tensor:
    return torch.stack([model.double().max() for model in models])


@pytest.mark.parametrize("block", [1, 3, 100])
def test_the_largest_of_all_blocks_counts(block):
    @merge_method(family="toys", cite="-", statistics={"high": statistic(highest, as_measured, largest=True)})
    def toy(models: list[Tensor], high: Tensor) -> Tensor:
        """Do something.

        merged = something
        """
        return models[0] * 0 + 10 * high[0] + high[1]

    models = [torch.tensor([-3.0, -1.0, -7.0, -2.0]), torch.tensor([-3.0, 0.5, -0.5, -2.0])]
    assert merge_tensor(toy, None, models, block=block).tolist() == [-9.5] * 4


def largest(models: list[Tensor]) -> Tensor:
    return torch.stack([model.abs().amax(1) for model in models], dim=1).double()


def as_measured(measured: Tensor) -> Tensor:
    return measured


def shares(models: list[Tensor], top: Tensor) -> Tensor:
    return (models[0].abs() / top[:, :1]).double().sum()


def scaled_by_row(models: list[Tensor], top: Tensor, total: Tensor) -> Tensor:
    """Divide by what is largest in the row.

    merged = model / largest of the row
    """
    return models[0] / top[:, 1:] + total


def over_rows(**changes):
    declared = {"scope": "row", "statistics": {"top": statistic(largest, as_measured, over="row")}, **changes}
    declared["statistics"] = {**declared["statistics"], "total": statistic(shares, as_measured)}
    return merge_method(family="toys", cite="-", **declared)(scaled_by_row)


@pytest.mark.parametrize("block", [1, 12, 40, 1000])
@pytest.mark.parametrize("shape", [(30, 4), (7, 2, 3), (9,)])
def test_a_statistic_over_rows_is_handed_to_the_blocks_of_those_rows(shape, block):
    models = [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    merged = merge_tensor(over_rows(), None, models, block=block)
    first, second = (model.reshape(shape[0] if len(shape) > 1 else 1, -1) for model in models)
    total = (first.abs() / first.abs().amax(1, keepdim=True)).double().sum()
    expected = first / second.abs().amax(1, keepdim=True) + total
    torch.testing.assert_close(merged, expected.float().view(shape), rtol=1e-6, atol=0)


def test_a_statistic_over_rows_needs_whole_rows_and_one_round():
    with pytest.raises(TypeError, match=r"scaled_by_row: top is over rows: this needs the scope 'row', and one round"):
        over_rows(scope="element")
    tallied = order_statistic(values_of, ranks, over="row")
    for other in (tallied, statistic(largest, as_measured, over="row", largest=True)):
        with pytest.raises(TypeError, match="top is over rows"):
            over_rows(statistics={"top": other})


def test_a_method_that_cannot_be_fused_is_told_once(caplog):
    @merge_method(family="toys", cite="-")
    def curious(models: list[Tensor]) -> Tensor:
        """Take the first model, or the last.

        merged = something
        """
        return models[0] if float(models[0].sum()) > 0 else models[-1]

    models = [torch.ones(100), torch.zeros(100)]
    for _ in range(2):
        assert torch.equal(merge_tensor(curious, None, models, fused=True, block=30), models[0])
    (said,) = caplog.messages
    assert said.startswith("curious: slower than it might be, as a pass cannot be fused: ")
    assert said.endswith("looks at values")


def test_what_torch_cannot_compile_for_a_gpu_runs_operation_by_operation(monkeypatch, caplog):
    class CompilerError(RuntimeError):
        __module__ = "torch._inductor.exc"

    def compile_(function, **options):
        def fail(*arguments):
            raise CompilerError("no Triton here\nand many more lines")

        return fail

    monkeypatch.setattr(torch, "compile", compile_)
    method = get_method("passthrough")
    model = torch.randn(40)
    kernels = Kernels(method, {}, torch.float32, torch.float32, torch.device("cpu"), True)
    block = Block(None, [model], {}, {"scale": torch.tensor([2.0])}, {}, keys(0, "t", 1), 0)
    expected = Kernels(method, {}, torch.float32, torch.float32, torch.device("cpu")).kernel(("combine", "", 0), block)
    run = kernels._compiled(("combine", "gpu", 0), expected)
    for _ in range(2):
        assert torch.equal(run(block, None)[0], model * 2)
    assert caplog.messages == ["passthrough: slower than it might be, as a pass cannot be fused: no Triton here"]


@pytest.mark.parametrize("size", [(1 << 16) - 1, 1 << 16])
def test_a_tensor_of_one_block_is_counted_in_loops_if_it_is_large(size, monkeypatch):
    counted = []
    measure = TensorRun.measure
    monkeypatch.setattr(TensorRun, "measure", lambda self, *given: counted.append(given[0]) or measure(self, *given))
    generator = torch.Generator().manual_seed(0)
    base, *models = [torch.randn(size, generator=generator).bfloat16() for _ in range(3)]
    found = [
        merge_tensor(get_method("ties"), base, models, {"weight": 1, "density": 0.3}, fused=fused).tolist()
        for fused in (True, False)
    ]
    assert found[0] == found[1]
    assert bool(counted) == (size == 1 << 16)
