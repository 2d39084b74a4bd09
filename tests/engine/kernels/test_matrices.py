"""Methods for matrices: what they see, and what happens to all that is not a matrix."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from merganser.engine.in_memory.state_dicts import merge_state_dicts
from merganser.engine.kernels.assignment import is_matrix
from merganser.engine.kernels.merge_tensor import merge_tensor
from merganser.engine.kernels.peak_memory import PeakMemory, peak_per_element
from merganser.engine.merge import merge, plan
from merganser.engine.plan import memory
from merganser.engine.plan.summary import summarise
from merganser.engine.stream.groups import make_groups
from merganser.engine.stream.hashing import spans
from merganser.errors import MemoryLimitError
from merganser.method import Embeddings, Others, merge_method, statistic
from merganser.ops.linalg.rounding import rounding_in
from merganser.testing import contract, probe
from tests.engine.interrupting import Counter, stop
from tests.engine.matrix_toys import noisy, over_root, rank_one, squared_norm, unit
from tests.making import (
    assert_equal,
    llama,
    llama_config,
    make_recipe,
    read_files,
    read_json,
    read_model,
    register,
    write_model,
)

TOYS = {"rank_one": rank_one, "unit": unit}
CONFIG = llama_config(2) | {"num_experts": 5}


@pytest.fixture
def toys(monkeypatch):
    """Recipes may name the toys."""
    register(monkeypatch, **TOYS)


def mixture(seed, dtype=torch.float32):
    """A llama with packed experts, their biases, a convolution, a position table and a counter."""
    generator = torch.Generator().manual_seed(seed + 100)

    def draw(*shape):
        return (torch.randn(shape, generator=generator) * 0.1).to(dtype)

    tensors = llama(seed, 2, dtype=dtype)
    tensors["model.layers.0.mlp.experts.gate_up_proj"] = draw(5, 24, 16)
    tensors["model.layers.0.mlp.experts.gate_up_proj_bias"] = draw(5, 24)
    tensors["model.layers.0.mlp.router.weight"] = draw(5, 16)
    tensors["model.layers.1.conv1d.weight"] = draw(16, 1, 4)
    tensors["model.layers.1.self_attn.q_norm.weight"] = draw(2, 8)
    tensors["model.position_embeddings.weight"] = draw(64, 16)
    tensors["model.steps"] = torch.tensor([3])
    return tensors


NO_MATRICES = ("norm", "embed", "lm_head", "bias", "conv1d")


def is_rest(name):
    return any(word in name for word in NO_MATRICES)


def write_mixtures(root, n=3, dtype=torch.float32):
    return [write_model(root / f"m{i}", mixture(i, dtype), CONFIG, shards=1 + i % 2) for i in range(n)]


def expected_rest(others, base, models, weight=1.0, lambda_=1.0):
    changes = sum(model - base for model in models)
    return base + {"average": lambda_ / len(models), "sum": weight * lambda_, "base": 0.0}[others] * changes


@pytest.mark.parametrize("method", TOYS.values(), ids=TOYS)
def test_the_toys_keep_the_contract(method):
    for law in contract(method):
        law(method)
    assert probe(method)["scope"] == "matrix"


@pytest.mark.parametrize("others", ["average", "sum", "base"])
@pytest.mark.parametrize("blocks", ["small", "ordinary"])
def test_every_tensor_goes_its_way(tmp_path, toys, request, others, blocks):
    if blocks == "small":
        request.getfixturevalue("small_blocks")
    paths = write_mixtures(tmp_path)
    recipe = make_recipe("rank_one", paths[1:], paths[0], {"weight": 0.5, "lambda": 0.8, "others": others})
    merge(recipe, tmp_path / "out", threads=3, out_shard_size=20_000)
    base, *models = (read_model(path) for path in paths)
    merged = read_model(tmp_path / "out")
    assert sorted(merged) == sorted(base)
    for name, result in merged.items():
        inputs = [model[name] for model in models]
        if name == "model.steps":
            assert result.tolist() == [3]
        elif is_rest(name):
            torch.testing.assert_close(result, expected_rest(others, base[name], inputs, 0.5, 0.8))
            assert others != "base" or torch.equal(result, base[name])
        else:
            stacked = [base[name], *inputs] if base[name].dim() == 3 else [x[None] for x in (base[name], *inputs)]
            for i, matrix in enumerate(result.view(stacked[0].shape)):
                change = sum(0.5 * (model[i] - stacked[0][i]) for model in stacked[1:])
                u, s, v = torch.linalg.svd(change.double())
                expected = stacked[0][i] + 0.8 * s[0] * torch.outer(u[:, 0], v[0])
                torch.testing.assert_close(matrix.double(), expected, rtol=1e-4, atol=1e-5)


def test_embeddings_as_matrices(tmp_path, toys):
    paths = write_mixtures(tmp_path)
    recipe = make_recipe("rank_one", paths[1:], paths[0], {"embeddings": "matrix", "others": "base"})
    merge(recipe, tmp_path / "out")
    base, *models = (read_model(path) for path in paths)
    merged = read_model(tmp_path / "out")
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.position_embeddings.weight"):
        expected = merge_tensor(rank_one, base[name], [model[name] for model in models], name=name)
        assert torch.equal(merged[name], expected)
        assert not torch.equal(merged[name], base[name])
    assert torch.equal(merged["model.norm.weight"], base["model.norm.weight"])


def test_threads_blocks_and_interruptions_do_not_matter(tmp_path, toys, small_blocks):
    for method in TOYS:
        paths = write_mixtures(tmp_path / method)
        recipe = make_recipe(method, paths[1:], paths[0])
        counter = Counter()
        whole = merge(recipe, tmp_path / method / "whole", threads=1, progress=counter, out_shard_size=20_000)
        merge(recipe, tmp_path / method / "threads", threads=4, out_shard_size=20_000)
        for after in (counter.calls // 3, counter.calls // 2, counter.calls * 9 // 10):
            out = tmp_path / method / f"after {after}"
            stop(recipe, out, after, threads=2, out_shard_size=20_000)
            counter = Counter()
            merge(recipe, out, threads=2, progress=counter, out_shard_size=20_000)
            assert counter.continued
            assert_equal(read_model(out), read_model(whole.out))
        assert_equal(read_model(tmp_path / method / "threads"), read_model(whole.out))
        assert "README.md" in read_files(whole.out)


def test_what_tasks_write_lies_side_by_side(tmp_path, toys, small_blocks):
    paths = write_mixtures(tmp_path)
    found = plan(make_recipe("rank_one", paths[1:], paths[0]), out_shard_size=20_000)
    groups = make_groups(found)
    assert {len(group.segments) for group in groups} >= {1, 2}
    assert all(len({tensor.method for tensor in group.tensors}) == 1 for group in groups)
    written = [one for group in groups for segment in range(len(group.segments)) for one in spans(group, segment)]
    assert sum(nbytes for _, _, nbytes in written) == sum(tensor.nbytes for tensor in found.tensors)
    assert all(nbytes for _, _, nbytes in written)
    for (shard, start, nbytes), (next_shard, next_start, _) in pairwise(written):
        assert (next_shard, next_start) in ((shard, start + nbytes), (shard + 1, len(found.shards[next_shard].header)))


def test_what_is_finished_is_not_done_again(tmp_path, toys, small_blocks):
    paths = write_mixtures(tmp_path)
    recipe = make_recipe("rank_one", paths[1:], paths[0])
    whole = Counter()
    merge(recipe, tmp_path / "whole", threads=1, progress=whole)
    # all but the last task
    stop(recipe, tmp_path / "out", whole.calls - 1, threads=1)
    counter = Counter()
    merge(recipe, tmp_path / "out", threads=1, progress=counter)
    found = plan(recipe)
    last = make_groups(found)[-1]
    assert counter.written_before == whole.written - spans(last, len(last.segments) - 1)[0][2]


@pytest.mark.parametrize("blocks", ["small", "ordinary"])
def test_statistics_over_the_model_count_matrices_alone(tmp_path, toys, request, blocks):
    if blocks == "small":
        request.getfixturevalue("small_blocks")
    paths = write_mixtures(tmp_path)
    recipe = make_recipe("unit", paths[1:], paths[0], {"others": [{"filter": "model.norm", "value": "base"}, "sum"]})
    with pytest.raises(ValueError, match=r"."):
        plan(recipe)
    recipe["parameters"] = {"others": [{"filter": "model.norm", "value": "base"}, {"value": "sum"}]}
    found = plan(recipe)
    progress = Counter()
    merge(recipe, tmp_path / "out", threads=2, progress=progress)
    assert progress.read == found.bytes_read
    base, *models = (read_model(path) for path in paths)
    merged = read_model(tmp_path / "out")
    changes = {name: [model[name] - base[name] for model in models] for name in base}
    matrices = [name for name in base if not is_rest(name) and name != "model.steps"]
    norm = sum(float(change.double().square().sum()) for name in matrices for change in changes[name]) ** 0.5
    for name in matrices:
        torch.testing.assert_close(merged[name], base[name] + sum(changes[name]) / norm, rtol=1e-5, atol=1e-6)
    assert torch.equal(merged["model.norm.weight"], base["model.norm.weight"])
    name = "model.layers.0.input_layernorm.weight"
    torch.testing.assert_close(merged[name], base[name] + sum(changes[name]))


def test_plan_record_and_summary_say_who_merges_what(tmp_path, toys):
    paths = write_mixtures(tmp_path)
    recipe = make_recipe("rank_one", paths[1:], paths[0], {"others": "base"})
    found = plan(recipe)
    n = sum(not is_rest(name) for name in mixture(0)) - 1
    rest = len(mixture(0)) - n - 1
    counts = {"rank_one": n, "passthrough": rest}
    assert {method.name: count for method, count in found.methods.items()} == counts
    summary = summarise(found)
    assert summary.methods == counts
    assert {group.method for group in summary.groups} == {"rank_one", "passthrough", ""}
    # of what only the base is left of, nothing else is read
    read = sum(t.nbytes_read for t in found.tensors if t.method.name == "passthrough")
    assert read == sum(tensor.nbytes for name, tensor in mixture(0).items() if is_rest(name))
    record = merge(recipe, tmp_path / "out").record
    assert record == read_json(tmp_path / "out", "merge.json")
    assert (record["method"], record["methods"]) == ("rank_one", counts)
    assert {"method rank_one", "method passthrough"} <= record["versions"].keys()


def test_state_dicts(tmp_path, monkeypatch):
    register(monkeypatch, **TOYS)
    base, *models = (mixture(i) for i in range(3))
    paths = write_mixtures(tmp_path)
    merge(make_recipe("rank_one", paths[1:], paths[0], {"others": "sum"}), tmp_path / "out")
    assert_equal(merge_state_dicts("rank_one", models, base=base, others="sum"), read_model(tmp_path / "out"))


@pytest.mark.parametrize("saved", [torch.bfloat16, torch.float32])
def test_rounding_is_that_of_the_stored_values_wherever_they_are_merged(tmp_path, monkeypatch, small_blocks, saved):
    """Each matrix by itself, experts of a packed tensor included, from files as from memory."""
    register(monkeypatch, noisy=noisy)
    tensors = [{name: t.to(torch.bfloat16).to(saved) for name, t in mixture(i).items()} for i in range(3)]
    tensors = [{**own, "model.steps": torch.tensor([3])} for own in tensors]
    base, *models = tensors
    paths = [write_model(tmp_path / f"m{i}", own, CONFIG) for i, own in enumerate(tensors)]
    merge(make_recipe("noisy", paths[1:], paths[0], dtype="float32"), tmp_path / "out")
    written = read_model(tmp_path / "out")
    assert_equal(merge_state_dicts("noisy", models, base=base, dtype=torch.float32), written)
    for name, merged in written.items():
        if is_rest(name) or not merged.is_floating_point() or merged.dim() < 2:
            continue
        parts = zip(*(list(model[name]) if merged.dim() == 3 else [model[name]] for model in models), strict=True)
        expected = torch.stack([sum(map(rounding_in, own)).sum().float() for own in parts])
        found = merged if merged.dim() == 3 else merged[None]
        assert torch.equal(found, expected[:, None, None].expand_as(found)), name
        # of float32 it would be 65,536 times less
        assert expected.min() > 1e-4


@pytest.mark.parametrize(
    ("name", "shape", "role", "tables", "expected"),
    [
        ("w", (3, 4), None, False, True),
        ("w", (4,), None, False, False),
        ("w", (), None, True, False),
        ("w", (2, 3, 4), None, True, False),
        ("experts.up", (2, 3, 4), "expert", False, True),
        ("experts.up", (3, 4), "expert", False, True),
        ("experts.up_bias", (2, 4), "expert", False, False),
        ("q_norm.weight", (2, 4), "norm", True, False),
        ("conv.weight", (4, 1, 3), "conv", True, False),
        ("conv.in_proj.weight", (4, 3), "conv", False, True),
        ("embed.weight", (9, 4), "embedding", False, False),
        ("embed.weight", (9, 4), "embedding", True, True),
        ("head.weight", (9, 4), "head", False, False),
        ("patch.weight", (4, 3, 2, 2), "embedding", True, False),
        ("wpe.weight", (9, 4), "position", False, False),
        ("gate.weight", (9, 4), "router", False, True),
    ],
)
def test_what_is_a_matrix(name, shape, role, tables, expected):
    assert is_matrix(name, shape, role, tables=tables) is expected


def declare(function, **options):
    return merge_method(family="toys", cite="-", **options)(function)


def test_declarations_that_contradict_themselves():
    def bare(base: Tensor, models: list[Tensor]) -> Tensor:
        """Do."""
        return base

    def half(base: Tensor, models: list[Tensor], *, others: Others = "sum") -> Tensor:
        """Do."""
        return base

    def loose(base: Tensor, models: list[Tensor], *, others: bool = True, embeddings: Embeddings = "others") -> Tensor:
        """Do.

        Args:
            others: Something else.
        """
        return base

    def baseless(models: list[Tensor], *, others: Others = "sum", embeddings: Embeddings = "others") -> Tensor:
        """Do."""
        return models[0]

    def sound(
        base: Tensor, models: list[Tensor], *, others: Others = "sum", embeddings: Embeddings = "others"
    ) -> Tensor:
        """Do."""
        return base

    def rounded(base: Tensor, models: list[Tensor], rounding: Tensor) -> Tensor:
        """Do."""
        return base

    with pytest.raises(TypeError, match="rounded: rounding is known of whole matrices; this needs the scope 'matrix'"):
        declare(rounded, scope="row")
    for function in (bare, half, loose):
        expected = rf"{function.__name__}: scope 'matrix' needs the parameters `others: Others` and `embeddings: Embed"
        with pytest.raises(TypeError, match=expected):
            declare(function, scope="matrix")
    with pytest.raises(TypeError, match="baseless: scope 'matrix' needs `base: Tensor`"):
        declare(baseless, scope="matrix")
    with pytest.raises(TypeError, match="sound: the parameters embeddings, others say something only where the scope"):
        declare(sound)
    with pytest.raises(TypeError, match=r"sound: .* gets whole matrices; let it compute gain itself"):
        declare(sound, scope="matrix", statistics={"gain": statistic(squared_norm, over_root)})
    method = declare(sound, scope="matrix")
    assert not method.fuse
    assert "norms, biases" in method.parameters["others"].help
    assert (method.parameters["others"].default, method.parameters["embeddings"].choices) == (
        "sum",
        ("others", "matrix"),
    )


def test_values_that_are_not_allowed(tmp_path, toys):
    paths = write_mixtures(tmp_path)
    for name, value in (("others", "mean"), ("embeddings", "average")):
        recipe = make_recipe("rank_one", paths[1:], paths[0], {name: value})
        with pytest.raises(ValueError, match=rf"{name} must be one of .*, got '{value}'"):
            plan(recipe)


# Memory


def test_peak_memory_of_what_is_known():
    kept = []
    with PeakMemory() as found:
        a = torch.zeros(1000)
        b = a.view(10, 100) + 1
        kept.append(b[:5])
        del b
        a.add_(1)
        del a
        torch.ones(500)
    # two at a time; then half of the second holds all of it
    assert found.peak == 8000
    with found:
        torch.ones(1)
    assert found.live == 4004
    with PeakMemory() as found:
        inner = torch.zeros(30, 1000)
        found.ignore(inner)
        inner.reshape(-1).view(10, -1)
    assert found.peak == 120_000


def test_peak_memory_of_a_decomposition():
    @merge_method(family="toys", cite="-", scope="matrix")
    def gram_both_sides(
        base: Tensor, models: list[Tensor], *, others: Others = "sum", embeddings: Embeddings = "others"
    ) -> Tensor:
        """Hold a square of the longer side."""
        return base + (base.T @ base).double().sum()

    def peak(method, shape, n=2):
        dtypes = [torch.float32] * (n + 1)
        given = {"others": "sum", "embeddings": "others"} if method is gram_both_sides else {}
        return peak_per_element(method, given, shape, dtypes, torch.float32, torch.float32, with_base=True)

    # a square in float32 and one in float64: they count for more, the longer the matrix is
    assert peak(gram_both_sides, (4096, 1024)) < 24
    assert 12 * 4 <= peak(gram_both_sides, (1024, 4096)) < 12 * 4 + 24
    # the factors, a copy, and the work of the decomposition
    assert 4 * 7 <= peak(rank_one, (1024, 1024)) <= 4 * 12
    assert peak(rank_one, (1024, 1024), 6) - peak(rank_one, (1024, 1024), 2) <= 4
    assert probe(rank_one)["peak_memory"] == pytest.approx(1 + peak(rank_one, (64, 64), 3) / 16, abs=0.1)


LARGE = {
    "model.embed_tokens.weight": (64000, 1024),
    "model.layers.0.mlp.up_proj.weight": (2048, 5632),
    "model.layers.0.mlp.experts.up_proj": (64, 1024, 1024),
}


def test_a_limit_that_is_too_small_names_the_matrix(tmp_path, toys):
    from tests.engine.stream.test_schedule import sparse

    base, *models = sparse(tmp_path, 3, LARGE)
    roomy = plan(make_recipe("rank_one", models, base), max_memory=10**11, threads=2)
    one = memory.estimate_memory(roomy.tensors, 1, roomy.fused)
    # one expert is held at a time, so that the matrix is what counts, neither table nor pack
    expected = rf"rank_one needs {one:,} bytes .* The largest tensor is model\.layers\.0\.mlp\.up_proj\.weight"
    with pytest.raises(MemoryLimitError, match=expected):
        plan(make_recipe("rank_one", models, base), max_memory=one - 1)
    assert plan(make_recipe("rank_one", models, base), max_memory=one + 1, threads=3).workers == 1
    with pytest.raises(MemoryLimitError, match=r"The largest tensor is model\.embed_tokens\.weight"):
        plan(make_recipe("rank_one", models, base, {"embeddings": "matrix"}), max_memory=one + 1)


MEASURE = """
import sys, torch
torch.set_num_threads(1)
from merganser.engine.kernels.merge_tensor import merge_tensor
from tests.engine.matrix_toys import rank_one
def most():
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))
small = torch.randn(3, 64, 64)
merge_tensor(rank_one, small[0], [small[1], small[2]])
inputs = torch.randn(3, 1024, 1024)
open("/proc/self/clear_refs", "w").write("5")
before = most()
merge_tensor(rank_one, inputs[0], [inputs[1], inputs[2]])
print((most() - before) / 2**20)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_what_was_told():
    # otherwise malloc keeps what was freed, or not, by what it saw before: the threshold moves
    fixed = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", MEASURE]
    run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[3], env=fixed)
    told = peak_per_element(
        rank_one, {}, (1024, 1024), [torch.float32] * 3, torch.float32, torch.float32, with_base=True
    )
    assert 0.75 <= float(run.stdout) / told <= 1.25
