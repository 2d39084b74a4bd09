"""Small tensors that are merged at once are, bit for bit, merged as one by one."""

from __future__ import annotations

import pytest
import torch

from merganser.engine.kernels import kernels as kernels_of
from merganser.engine.kernels.blocks import BLOCK, TensorRun
from merganser.engine.kernels.kernels import Kernels
from merganser.engine.kernels.merge_tensor import merge_tensor
from merganser.engine.kernels.values import Values
from merganser.engine.merge import merge
from merganser.engine.stream import worker as stream
from merganser.engine.stream.bundle import merge_together
from merganser.method.method import fill
from merganser.method.registry import get_method, methods
from merganser.ops.random import keys
from merganser.testing import cases as _cases
from tests.making import make_recipe, read_model, write_model

# of one size by twos and threes, and none that fills the registers of a processor
SIZES = [37, 37, 10, 37, 5, 10]
CASES = [
    pytest.param(name, with_base, parameters, id=f"{name}-{i}")
    for name, method in methods().items()
    for i, (with_base, parameters) in enumerate(_cases.cases(method))
    # what follows from a tensor's place is tried by test_merge
    if not method.located and method.together(fill(method, parameters, _cases.count_models(method)))
]


def work(method, parameters, names, shapes, *, n, fused=False):
    """The work on some tensors, as the engine prepares it."""
    values = Values.of(method, fill(method, parameters, n))
    kernels = Kernels(method, values.static, torch.float32, torch.float32, torch.device("cpu"), fused)
    return [
        TensorRun(kernels, values, (size,), keys(7, name, n), BLOCK) for name, size in zip(names, shapes, strict=True)
    ]


@pytest.mark.parametrize(("name", "with_base", "parameters"), CASES)
@pytest.mark.parametrize(("dtype", "fused"), [(torch.float32, False), (torch.bfloat16, True)])
def test_they_are_what_each_is_alone(monkeypatch, name, with_base, parameters, dtype, fused):
    monkeypatch.setattr(kernels_of, "_WORTH_A_PROGRAM", 0)
    method = get_method(name)
    n = _cases.count_models(method)
    generator = torch.Generator().manual_seed(0)
    inputs = [[torch.randn(size, generator=generator).to(dtype) for _ in range(n + with_base)] for size in SIZES]
    names = [f"t{i}" for i in range(len(SIZES))]
    runs = work(method, parameters, names, SIZES, n=n, fused=fused)

    def split(index, found):
        return (found[0], found[1:]) if with_base else (None, found)

    merged = {}
    for found, whole in merge_together(runs, inputs, split, allow_nonfinite=False):
        merged.update(zip(found, whole.split([SIZES[i] for i in found]), strict=True))
    # the one of 5 has no other of its size
    joined = runs[0].together == "joined"
    assert set(merged) == (set(range(6)) if joined else {0, 1, 2, 3, 5})
    for i, result in merged.items():
        base, models = split(i, inputs[i])
        alone = merge_tensor(method, base, models, parameters, name=names[i], seed=7, dtype=torch.float32)
        assert torch.equal(result, alone), i


def test_some_of_each_kind_are_tried():
    kinds = set()
    for case in CASES:
        name, _, parameters = case.values
        method = get_method(name)
        kinds.add((method.random, method.together(fill(method, parameters, _cases.count_models(method)))))
    assert kinds == {(False, "joined"), (False, "stacked"), (True, "stacked")}


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        # a sum depends on its order
        ("ties", {"weight": 1, "density": 0.5, "rescale": True}),
        ("ties", {"weight": 1, "density": 0.5, "trim_over": "model"}),
        # rows
        ("della", {"weight": 1, "density": 0.5}),
        ("iso_c", {}),
        # not made for the compiler
        ("widen", {}),
    ],
)
def test_some_are_merged_one_by_one(name, parameters):
    method = get_method(name)
    assert method.together(fill(method, parameters, 3)) is None


def test_only_tensors_of_one_block_are_merged_together():
    for size, expected in ((9, "stacked"), (1 << 20, None)):
        (run,) = work(get_method("ties"), {"weight": 1, "density": 0.5}, ["t"], [size], n=2)
        assert run.together == expected
    (run,) = work(get_method("task_arithmetic"), {"weight": 1}, ["t"], [9], n=2)
    assert run.together == "joined"


@pytest.mark.parametrize("name", ["ties", "dare_ties"])
def test_neither_files_nor_neighbours_matter(tmp_path, monkeypatch, name):
    """Parameters and dtypes that differ part those that would be merged together."""
    generator = torch.Generator().manual_seed(0)
    names = [f"{letter}.{'weight' if i % 2 else 'bias'}" for i, letter in enumerate("abcdefgh")]
    tensors = [
        {
            key: torch.randn(21, generator=generator).to(torch.float16 if key[0] in "cd" else torch.float32)
            for key in names
        }
        for _ in range(3)
    ]
    paths = [write_model(tmp_path / f"m{i}", own) for i, own in enumerate(tensors)]
    weight = [{"filter": "weight", "value": 0.3}, {"value": 0.9}]
    recipe = make_recipe(name, paths[1:], paths[0], {"weight": weight, "density": 0.5}, dtype="float32")
    together = []

    def watched(*arguments, **options):
        for found, merged in merge_together(*arguments, **options):
            together.append(len(found))
            yield found, merged

    monkeypatch.setattr(stream, "merge_together", watched)
    whole = read_model(merge(recipe, tmp_path / "whole", threads=1).out)
    assert sorted(together) == [3, 3]
    together.clear()
    parted = read_model(merge(recipe, tmp_path / "parted", threads=2, out_shard_size=1).out)
    assert together == []
    assert whole.keys() == parted.keys() == set(names)
    assert all(torch.equal(whole[key], parted[key]) for key in names)
