"""Small tensors that are merged at once are, bit for bit, merged as one by one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from xxhash import xxh3_128_digest, xxh3_128_hexdigest

from merganser.checkpoint import DTYPES
from merganser.checkpoint.formats.safetensors import read_header
from merganser.engine.kernels import kernels as kernels_of
from merganser.engine.kernels.blocks import BLOCK, TensorRun, block_ranges
from merganser.engine.kernels.kernels import Kernels
from merganser.engine.kernels.merge_tensor import merge_tensor
from merganser.engine.kernels.values import Values
from merganser.engine.merge import merge
from merganser.engine.plan.tensor import PlannedTensor
from merganser.engine.stream import worker as stream
from merganser.engine.stream.bundle import merge_together
from merganser.errors import NonFiniteError
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


def small(folder, *, order=1, spoilt=None, wide=0):
    """A checkpoint of eight tensors of one size in two shapes; in `order`; one may hold infinity, the first be float32."""
    generator = torch.Generator().manual_seed(int(folder.name[-1]))
    shapes = {f"layers.{i}.{'weight' if i % 2 else 'bias'}": (7, 3) if i % 2 else (21,) for i in range(8)}
    tensors = {
        name: torch.randn(shape, generator=generator).to(torch.float32 if i < wide else torch.bfloat16)
        for i, (name, shape) in enumerate(shapes.items())
    }
    if spoilt is not None:
        tensors[f"layers.{spoilt}.weight"][1, 1] = torch.inf
    return write_model(folder, dict(list(tensors.items())[::order]))


@pytest.mark.parametrize(("name", "with_base"), [("linear", False), ("ties", True), ("dare_ties", True)])
def test_tensors_of_one_size_are_merged_as_they_lie(tmp_path, monkeypatch, name, with_base):
    """Neither views nor copies of each tensor are made, and bytes, hashes and record are those of single tensors."""
    paths = [small(tmp_path / f"m{i}") for i in range(4)]
    given = {"weight": 1, "density": 0.5} if with_base else {"weight": 1}
    recipe = make_recipe(name, paths[1:], paths[0] if with_base else None, given)
    with monkeypatch.context() as patch:
        patch.setattr(stream, "merge_together", None)
        patch.setattr(stream, "measure_samples", None)
        whole = merge(recipe, tmp_path / "whole", threads=1)
    parted = merge(recipe, tmp_path / "parted", threads=2, out_shard_size=1)
    one, other = read_model(whole.out), read_model(parted.out)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert whole.record["inputs"] == parted.record["inputs"]
    for entry in whole.record["inputs"]:
        content = Path(entry["path"]).read_bytes()
        tensors, _ = read_header(Path(entry["path"]))
        each = [xxh3_128_digest(content[own.offset : own.offset + own.nbytes]) for own in tensors]
        assert entry["xxh3_128_of_tensors"] == xxh3_128_hexdigest(b"".join(map(xxh3_128_digest, each)))
    entries = [{each["name"]: each for each in found.record["movement"]["tensors"]} for found in (whole, parted)]
    assert entries[0].keys() == entries[1].keys()
    for key, entry in entries[0].items():
        assert entry.pop("models") == pytest.approx(entries[1][key].pop("models"), rel=1e-12)
        assert entry.keys() - {"merged"} == entries[1][key].keys() - {"merged"}
        assert entry["merged"] == pytest.approx(entries[1][key]["merged"], rel=1e-12)


@pytest.mark.parametrize(
    "last",
    [
        pytest.param({"order": -1}, id="in another order"),
        pytest.param({"wide": 4}, id="in two dtypes"),
    ],
)
def test_inputs_that_do_not_lie_alike_give_the_same(tmp_path, last):
    paths = [small(tmp_path / f"m{i}") for i in range(3)]
    odd = small(tmp_path / "odd3", **last)
    recipe = make_recipe("ties", [*paths[1:], odd], paths[0], {"weight": 1, "density": 0.5}, out_dtype="float32")
    whole = read_model(merge(recipe, tmp_path / "whole", threads=1).out)
    parted = read_model(merge(recipe, tmp_path / "parted", threads=1, out_shard_size=1).out)
    assert all(torch.equal(whole[key], parted[key]) for key in whole)


@pytest.mark.parametrize(("name", "with_base"), [("linear", False), ("ties", True)])
def test_of_tensors_merged_as_they_lie_the_one_that_is_not_finite_is_named(tmp_path, name, with_base):
    paths = [small(tmp_path / f"m{i}", spoilt=5 if i == 2 else None) for i in range(3)]
    given = {"weight": 1, "density": 0.5} if with_base else {"weight": 1}
    recipe = make_recipe(name, paths[1:], paths[0] if with_base else None, given)
    with pytest.raises(NonFiniteError, match=r"m2/model.safetensors: tensor 'layers.5.weight' holds NaN or infinity"):
        merge(recipe, tmp_path / "refused", threads=1)
    kept = read_model(merge(recipe, tmp_path / "kept", threads=1, allow_nonfinite=True).out)
    spoilt = [key for key, tensor in kept.items() if not torch.isfinite(tensor).all()]
    assert spoilt == ["layers.5.weight"]


@pytest.mark.parametrize("scope", ["element", "row", "tensor", "matrix"])
@pytest.mark.parametrize(
    "shape", [(), (0,), (5, 0), (7,), (3, 4), (4, 4), (1, 17), (17, 1), (2, 2, 2), (3, 2, 3), (2, 4, 5)]
)
def test_a_tensor_of_one_block_is_known_without_its_blocks(scope, shape):
    method = next(each for each in methods().values() if each.scope == scope)
    planned = PlannedTensor(
        "t",
        DTYPES["F32"],
        DTYPES["F32"],
        shape,
        False,
        method,
        None,
        (),
        {},
        {},
        None,
        "expert",
        0,
        0,
        0,
        block_limit=16,
    )
    assert planned.in_one_block == (len(list(block_ranges(planned.working_shape, scope, 16))) <= 1)
