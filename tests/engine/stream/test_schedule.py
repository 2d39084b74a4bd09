"""How a plan is divided into tasks, how much memory they need, and in which order they are handed out."""

from __future__ import annotations

import json
import math
import threading
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from merganser.engine.kernels.blocks import BLOCK
from merganser.engine.kernels.sums import Sum
from merganser.engine.merge import merge, plan
from merganser.engine.plan import memory
from merganser.engine.stream.groups import BUNDLE_TENSORS, SEGMENT_BLOCKS, Group, make_groups
from merganser.engine.stream.schedule import GroupState, Schedule
from merganser.errors import CheckpointError, MemoryLimitError, MethodError, UnsupportedError
from merganser.method import merge_method
from tests.engine.interrupting import Counter
from tests.making import make_recipe, read_model, write_llamas, write_model


def sparse(root, n, shapes, dtype="BF16"):
    """Models of which only the headers take room on the disk."""
    paths = []
    for i in range(n):
        header, end = {}, 0
        for name, shape in shapes.items():
            size = math.prod(shape) * {"BF16": 2, "F32": 4}[dtype]
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + size]}
            end += size
        text = json.dumps(header).encode()
        path = root / f"m{i}"
        path.mkdir(parents=True)
        with (path / "model.safetensors").open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + end)
        paths.append(path)
    return paths


def test_every_element_is_in_one_task(tmp_path):
    shapes = {
        "a": (40000, 1024),
        **{f"b{i:04}": (7,) for i in range(BUNDLE_TENSORS + 10)},
        "c": (1, 3_000_000),
        "d": (600, 600),
        "e": (600, 600),
        "f": (),
        "g": (0, 5),
    }
    groups = make_groups(plan(make_recipe("linear", sparse(tmp_path, 2, shapes), parameters={"weight": 1})))
    assert [group.index for group in groups] == list(range(len(groups)))
    assert [tensor.name for group in groups for tensor in group.tensors] == list(shapes)
    found = {group.tensors[0].name: group for group in groups}
    assert [found[name].bundle for name in "acd"] == [False, False, True]
    assert [len(found[name].tensors) for name in "acde"] == [1, 1, 1, 3]
    segments = found["a"].segments
    assert segments[0] == (0, SEGMENT_BLOCKS)
    assert all(first[1] == second[0] for first, second in pairwise(segments))
    assert segments[-1][1] == -(-40000 * 1024 // BLOCK)
    assert max(len(group.tensors) for group in groups) == BUNDLE_TENSORS
    assert all(sum(t.size for t in group.tensors) <= BLOCK for group in groups if len(group.tensors) > 1)


SHAPES = {"model.embed_tokens.weight": (32000, 2048), "model.layers.0.mlp.up_proj.weight": (2048, 5632)}


def test_workers_fit_the_memory(tmp_path):
    paths = sparse(tmp_path, 4, SHAPES)
    recipe = make_recipe("linear", paths, parameters={"weight": 1})
    roomy = plan(recipe, threads=4, max_memory=4 * 10**9)
    assert roomy.workers == 4
    one = memory.estimate_memory(roomy.tensors, 1, roomy.fused)
    four = memory.estimate_memory(roomy.tensors, 4, roomy.fused)
    assert 0 < one < four == roomy.peak_memory
    assert plan(recipe, threads=4, max_memory=four).workers == 4
    assert plan(recipe, threads=4, max_memory=four - 1).workers == 3
    tight = plan(recipe, threads=4, max_memory=one)
    assert tight.workers == 1
    assert tight.peak_memory <= tight.max_memory == one
    with pytest.raises(MemoryLimitError, match=r"linear needs ([\d,]+) bytes for this merge, (?!\1)[\d,]+ bytes are"):
        plan(recipe, threads=4, max_memory=one - 1)
    with pytest.raises(MemoryLimitError, match=r"--max-memory: linear needs \d+ MB for this merge, \d+ MB are allowed"):
        plan(recipe, threads=4, max_memory=one - 10**7)


def test_a_method_that_needs_whole_tensors_says_which_is_too_large(tmp_path, monkeypatch):
    @merge_method(family="toys", cite="-", scope="tensor")
    def whole(models: list[Tensor]) -> Tensor:
        """Look at everything."""
        return models[0]

    monkeypatch.setattr("merganser.method.registry.get_method", lambda name: whole)
    recipe = make_recipe("linear", sparse(tmp_path, 2, SHAPES))
    roomy = plan(recipe, max_memory=10**11, threads=3)
    one = memory.estimate_memory(roomy.tensors, 1, roomy.fused)
    # two inputs and an output of 2 bytes, and their float32 copies
    assert one > 32000 * 2048 * (3 * 2 + 3 * 4)
    expected = r"The largest tensor is model\.embed_tokens\.weight \[32000, 2048\]"
    with pytest.raises(MemoryLimitError, match=expected):
        plan(recipe, max_memory=one - 1)
    assert plan(recipe, max_memory=one + 1, threads=3).workers == 1


def test_predictions_are_positive_and_bytes_are_right(tmp_path):
    paths = write_llamas(tmp_path)
    size = sum(tensor.nbytes for tensor in read_model(paths[0]).values())
    for method, parameters in (("linear", {"weight": 1}), ("ties", {"weight": 1, "density": 0.5})):
        found = plan(make_recipe(method, paths[1:], paths[0], parameters))
        assert found.peak_memory > 10**8
        assert found.seconds > 0
        assert found.bytes_written == sum(shard.size for shard in found.shards) > size
        # small tensors are read once, however often they are looked at
        assert found.bytes_read == size * (3 if method == "ties" else 2)


@pytest.mark.parametrize(
    ("method", "parameters", "passes"),
    [
        ("linear", {"weight": 1}, 1),
        ("slerp", {"t": 0.5}, 2),
        ("ties", {"weight": 1, "density": 0.5}, 3),
        ("ties", {"weight": 1, "density": 1.0}, 1),
        ("ties", {"weight": 1, "density": [{"filter": "mlp", "value": 0.5}, {"value": 1.0}]}, 3),
        ("ties", {"weight": 1, "density": 0.5, "trim_over": "model"}, 3),
    ],
)
def test_what_the_plan_says_of_reading_is_what_is_read(tmp_path, small_blocks, method, parameters, passes):
    paths = write_llamas(tmp_path)
    base = None if method == "linear" else paths[0]
    recipe = make_recipe(method, paths[1:2] if method == "slerp" else paths[1:], base, parameters)
    found = plan(recipe)
    progress = Counter()
    merge(recipe, tmp_path / "out", progress=progress)
    assert found.passes == passes
    assert progress.read == found.bytes_read
    assert progress.written == sum(tensor.nbytes for tensor in found.tensors)


@pytest.mark.parametrize("option", ["threads", "out_shard_size", "max_memory"])
@pytest.mark.parametrize("value", [0, -1])
def test_options_below_one(tmp_path, option, value):
    recipe = make_recipe("linear", write_llamas(tmp_path, 2), parameters={"weight": 1})
    with pytest.raises(ValueError, match=f"{option} must be at least 1, got {value}"):
        plan(recipe, **{option: value})


@pytest.mark.parametrize("device", ["gpu", "mps", "meta", "cuda:99", ""])
def test_devices_that_are_not_there(tmp_path, device):
    recipe = make_recipe("linear", write_llamas(tmp_path, 2), parameters={"weight": 1})
    with pytest.raises(UnsupportedError, match=f"--device {device}: "):
        plan(recipe, device=device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_automatic_device_is_written_as_what_it_is(tmp_path):
    found = plan(make_recipe("linear", write_llamas(tmp_path, 2), parameters={"weight": 1}), device="auto")
    assert found.device == "cpu"


def test_sums_do_not_depend_on_who_comes_first():
    values = {("a", 0): 1.0, ("a", 1): 1e17, ("b", 0): -1e17}
    parts = {key: torch.tensor([value], dtype=torch.float64) for key, value in values.items()}
    forwards, backwards = Sum(), Sum()
    for key in parts:
        forwards.add(key, parts[key])
    for key in reversed(parts):
        other = Sum()
        other.add(key, parts[key])
        backwards.merge(other)
    assert forwards.total().tolist() == backwards.total().tolist() == [0.0]
    assert sum(reversed(list(parts.values()))).tolist() == [1.0]
    counts = Sum()
    assert counts.empty
    with pytest.raises(ValueError, match="nothing was added"):
        counts.total()
    for i in range(5):
        counts.add(i, torch.full((2,), i))
    assert counts.total().tolist() == [10, 10]
    assert not counts.empty


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64])
def test_the_largest_of_what_was_measured(dtype):
    first, second = Sum(largest=True), Sum(largest=True)
    first.add(0, torch.tensor([-3, 1], dtype=dtype))
    first.add(1, torch.tensor([-5, 4], dtype=dtype))
    second.add(0, torch.tensor([-4, 9], dtype=dtype))
    for order in ([first, second], [second, first]):
        # as a schedule has it, which does not know what is measured
        found = Sum()
        for part in order:
            found.merge(part)
        assert found.total().tolist() == [-3, 9]


def test_the_first_error_of_any_thread_ends_the_run_and_all_threads(tmp_path, monkeypatch):
    @merge_method(family="toys", cite="-")
    def broken(models: list[Tensor]) -> Tensor:
        """Fail on the norm; looking at values, it is not fused."""
        if models[0].isfinite().all() and models[0].numel() == 16:
            raise ZeroDivisionError("a defect")
        return models[0]

    monkeypatch.setattr("merganser.method.registry.get_method", lambda name: broken)
    before = threading.active_count()
    with pytest.raises(MethodError, match="merge method broken: ZeroDivisionError: a defect"):
        merge(make_recipe("linear", write_llamas(tmp_path, 2)), tmp_path / "out", threads=3, out_shard_size=1)
    assert threading.active_count() == before
    # a defect of a method is no reason to lose the work
    assert (tmp_path / ".out.merging").is_dir()
    assert not (tmp_path / ".out.merging.lock").exists()


def test_the_callers_number_of_threads_is_kept(tmp_path):
    recipe = make_recipe("linear", write_llamas(tmp_path, 2), parameters={"weight": 1})
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        merge(recipe, tmp_path / "out")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_files_are_closed(tmp_path):
    recipe = make_recipe("linear", write_llamas(tmp_path, 2), parameters={"weight": 1})
    merge(recipe, tmp_path / "warm")
    before = len(list(Path("/proc/self/fd").iterdir()))
    merge(recipe, tmp_path / "out", out_shard_size=1)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_one_element_and_no_models_beside_the_first(tmp_path):
    path = write_model(tmp_path / "m", {"w": torch.tensor([2.0])})
    result = merge(make_recipe("passthrough", [path], parameters={"scale": 3.0}), tmp_path / "out")
    assert read_model(result.out)["w"].tolist() == [6.0]


def test_waiting_for_what_nobody_measures_is_an_error():
    group = Group(0, (SimpleNamespace(over_model=False),), ((0, 1),), bundle=False)
    schedule = Schedule(
        [group], lambda each: GroupState(each, [None], [("x", 0, "model")]), whole_model=True, finished={}
    )
    state, task = schedule.take()
    schedule.done(state, task, [Sum()])
    taken = []
    worker = threading.Thread(target=lambda: taken.append(schedule.take()), daemon=True)
    worker.start()
    worker.join(10)
    assert taken == [None]
    assert str(schedule.error) == "1 groups of tensors wait for a statistic that none measures"


def test_an_output_without_tensors_is_refused(tmp_path):
    models = [write_model(tmp_path / f"m{i}", {"lm_head.weight": torch.ones(2 + i, 4)}) for i in range(2)]
    with pytest.raises(CheckpointError, match="<recipe>: the output would hold no tensor: none is in all models in"):
        plan(make_recipe("linear", models, parameters={"weight": 1}, unmatched="skip"))


def test_nothing_to_restore_is_refused(tmp_path):
    models = [write_model(tmp_path / f"m{i}", {"steps": torch.ones(2, dtype=torch.int64)}) for i in range(3)]
    with pytest.raises(CheckpointError, match="emr stores what restores each model, and there is nothing to store"):
        plan(make_recipe("emr", models[1:], models[0]))
