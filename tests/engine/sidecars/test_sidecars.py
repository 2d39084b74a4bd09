"""What is stored beside a shared model: sizes as planned, errors as recorded, continued where it was stopped."""

from __future__ import annotations

import contextlib
import json
import pickle
import signal

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from merganser import merge, plan, restore, verify
from merganser.checkpoint import DTYPE_BY_NAME, plan_shards
from merganser.engine.run import Interrupted
from merganser.errors import MemoryLimitError, NonFiniteError, RecipeError
from tests.engine.interrupting import Counter, Stopper, in_a_process, merge_and_die
from tests.making import SIDE_FILES, llama, llama_config, make_recipe, read_files, read_json, read_model, write_model

METHODS = {
    "emr": {},
    "tall_masks": {},
    "twin": {"rank": 0.3},
    "twin without others": {"others": "merged", "embeddings": "matrix"},
    "one_bit": {},
    "one_bit by rows": {"scale_per": "row", "origin": "merged", "embeddings": "matrix"},
    "rmm": {"rank": 4},
    "skillpack": {"rank": 0.5, "ranks_8bit": 2, "ranks_4bit": 3, "group": 8},
}
NAMES = ["math", "code", "chat"]


def tuned(seed, *, scale=0.01, start=None, **options):
    """A base of seed 0 and a random change."""
    generator = torch.Generator().manual_seed(seed)
    start = start or llama(0, **options)
    return {
        name: (tensor + scale * torch.randn(tensor.shape, generator=generator)).to(tensor.dtype)
        for name, tensor in start.items()
    }


def write_all(root, **options):
    """Write a base and three models that differ from it; return their folders, the base first."""
    base = write_model(root / "base", llama(0, **options), llama_config(), side_files=SIDE_FILES)
    models = [
        write_model(
            root / name, tuned(seed, **options), llama_config(), side_files={**SIDE_FILES, "chat_template.jinja": name}
        )
        for seed, name in enumerate(NAMES, start=1)
    ]
    return [base, *models]


def recipe_of(name, paths, **keys):
    return make_recipe(name.partition(" ")[0], paths[1:], paths[0], METHODS[name], **keys)


def test_arithmetic_is_as_the_recipe_says_everywhere(tmp_path):
    """The dtype of the recipe counts for the sidecars and for the estimate of memory, not only for the merge."""
    paths = write_all(tmp_path, dtype=torch.bfloat16)
    single, double = (
        plan(recipe_of("emr", paths, dtype=dtype, out_dtype="bfloat16")) for dtype in ("float32", "float64")
    )
    assert {tensor.compute_dtype.name for tensor in single.tensors} == {"float32"}
    assert {tensor.compute_dtype.name for tensor in double.tensors} == {"float64"}
    assert double.sidecars.peak_memory == 2 * single.sidecars.peak_memory
    assert double.peak_memory > single.peak_memory
    out = merge(recipe_of("emr", paths, dtype="float64", out_dtype="bfloat16"), tmp_path / "out").out
    entries = read_json(out, "sidecars/index.json")["tensors"].values()
    assert all(entry["wide"] for entry in entries if "parameters" in entry)


@pytest.fixture
def paths(tmp_path):
    return write_all(tmp_path / "models")


def relative_error(found, expected):
    error = sum(float((found[name].double() - tensor.double()).square().sum()) for name, tensor in expected.items())
    return (error / sum(float(tensor.double().square().sum()) for tensor in expected.values())) ** 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", METHODS)
def test_sizes_are_those_of_the_plan_and_errors_those_of_the_restored_models(tmp_path, name, dtype):
    paths = write_all(tmp_path / "models", dtype=dtype)
    recipe = recipe_of(name, paths)
    planned = plan(recipe).sidecars
    out = merge(recipe, tmp_path / "out").out
    assert verify(out).ok
    found = {p.relative_to(out).as_posix(): p.stat().st_size for p in out.rglob("sidecars/**/*.safetensors")}
    assert found == {shard.name: shard.size for shard in planned.shards}
    record = read_json(out, "merge.json")["sidecars"]
    assert [task["bytes"] for task in record["tasks"]] == [task.nbytes for task in planned.tasks]
    base = read_model(paths[0])
    for task, path in zip(record["tasks"], paths[1:], strict=True):
        assert task["full_bytes"] == sum(t.numel() * t.element_size() for t in base.values())
        restored, model = read_model(restore(out, task["name"]).out), read_model(path)
        assert task["error"] == pytest.approx(relative_error(restored, model), rel=1e-6)
        delta = {key: model[key].double() - base[key].double() for key in model}
        off = {key: restored[key].double() - base[key].double() for key in model}
        assert task["error_of_task_vector"] == pytest.approx(relative_error(off, delta), rel=1e-6)
        each = {key: relative_error({key: restored[key]}, {key: model[key]}) for key in model}
        worst = max(each, key=each.__getitem__)
        assert task["worst"] == {"tensor": worst, "error": pytest.approx(each[worst], rel=1e-6)}
        # nothing random is far off, and nothing is as near as a copy
        assert 0 < task["error_of_task_vector"] < 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_full_rank_gives_the_models_back_with_all_their_files(tmp_path, dtype):
    paths = write_all(tmp_path / "models", dtype=dtype)
    out = merge(make_recipe("twin", paths[1:], paths[0], {"rank": 1.0, "embeddings": "matrix"}), tmp_path / "out").out
    for name, path in zip(NAMES, paths[1:], strict=True):
        target = restore(out, name, tmp_path / f"again-{name}").out
        assert target == tmp_path / f"again-{name}"
        restored, model = read_model(target), read_model(path)
        assert list(restored) == list(model)
        for key, tensor in model.items():
            assert restored[key].dtype == tensor.dtype
        # factors of 16 bits are off by 2^-9 of what they add
        assert relative_error(restored, model) < (1e-6 if dtype == torch.float32 else 1e-3)
        for file in ("config.json", *SIDE_FILES):
            assert (target / file).read_bytes() == (path / file).read_bytes(), file
        assert verify(target).ok
    # what all have alike lies in the output alone
    kept = sorted(path.name for path in (out / "sidecars" / "math").iterdir())
    assert kept == ["chat_template.jinja", "config.json", "parts.safetensors"]


def test_what_is_restored_loads_and_speaks_as_the_model_does(tmp_path):
    base = write_model(tmp_path / "base", llama(0), llama_config())
    models = [write_model(tmp_path / name, tuned(i), llama_config()) for i, name in enumerate(NAMES, start=1)]
    out = merge(make_recipe("twin", models, base, {"rank": 1.0, "embeddings": "matrix"}), tmp_path / "out").out
    tokens = torch.arange(12).view(2, 6)
    merged, near, model = (
        AutoModelForCausalLM.from_pretrained(path)(tokens).logits for path in (out, restore(out, "code").out, models[1])
    )
    torch.testing.assert_close(near, model, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(merged, model, atol=1e-3)


def test_a_tied_head_is_not_restored_and_not_stored(tmp_path):
    base = write_model(tmp_path / "base", llama(0), llama_config())
    one = write_model(tmp_path / "one", tuned(1), llama_config())
    two = write_model(tmp_path / "two", tuned(2, start=llama(0, head=False)), llama_config(tied=True))
    out = merge(make_recipe("emr", [one, two], base), tmp_path / "out").out
    assert "lm_head.weight" in read_model(out)
    assert "lm_head.weight" in read_model(restore(out, "one").out)
    assert "lm_head.weight" not in read_model(restore(out, "two").out)
    assert "lm_head.weight.mask" in load_file(out / "sidecars/one/parts.safetensors")
    assert "lm_head.weight.mask" not in load_file(out / "sidecars/two/parts.safetensors")


def test_every_model_comes_back_in_its_own_dtype(tmp_path):
    base = write_model(tmp_path / "base", llama(0, dtype=torch.bfloat16), llama_config())
    wide = write_model(tmp_path / "wide", tuned(1, dtype=torch.float64), llama_config())
    narrow = write_model(tmp_path / "narrow", tuned(2, dtype=torch.float16), llama_config())
    recipe = make_recipe("twin", [wide, narrow], base, {"rank": 1.0, "embeddings": "matrix"}, dtype="bfloat16")
    out = merge(recipe, tmp_path / "out").out
    assert {tensor.dtype for tensor in read_model(out).values()} == {torch.bfloat16}
    for path, dtype, bound in ((wide, torch.float64, 1e-12), (narrow, torch.float16, 2e-4)):
        restored = read_model(restore(out, path.name).out)
        assert {tensor.dtype for tensor in restored.values()} == {dtype}
        assert relative_error(restored, read_model(path)) < bound
    errors = [task["error"] for task in read_json(out, "merge.json")["sidecars"]["tasks"]]
    assert errors[0] < 1e-12


def test_a_plan_with_sidecars_travels(paths):
    planned = plan(recipe_of("rmm", paths))
    again = pickle.loads(pickle.dumps(planned)).sidecars
    assert again.shards == planned.sidecars.shards
    assert again.places_of("model.layers.0.mlp.up_proj.weight") == planned.sidecars.places_of(
        "model.layers.0.mlp.up_proj.weight"
    )


def test_whole_numbers_and_empty_tensors_come_back(tmp_path):
    extra = {"steps": torch.tensor([3, 5]), "nothing": torch.empty(0, 4), "scalar": torch.tensor(1.5)}
    paths = [
        write_model(tmp_path / name, tuned(seed, start=llama(0)) | extra, llama_config())
        for seed, name in enumerate(["base", *NAMES])
    ]
    for method in ("emr", "twin", "rmm"):
        out = merge(make_recipe(method, paths[1:], paths[0]), tmp_path / method).out
        restored = read_model(restore(out, "code").out)
        for name, tensor in extra.items():
            torch.testing.assert_close(restored[name], tensor)


def test_packed_experts_are_matrices_one_by_one(tmp_path):
    def packed(seed):
        state = llama(0, layers=1) if seed == 0 else tuned(seed, layers=1)
        pack = torch.randn(4, 12, 10, generator=torch.Generator().manual_seed(seed))
        return {**state, "model.layers.0.mlp.experts.gate_up_proj": pack}

    config = llama_config(1) | {"num_experts": 4}
    paths = [write_model(tmp_path / name, packed(seed), config) for seed, name in enumerate(["base", *NAMES])]
    out = merge(make_recipe("twin", paths[1:], paths[0], {"rank": 0.5}), tmp_path / "out").out
    stored = load_file(out / "sidecars/math/parts.safetensors")
    assert stored["model.layers.0.mlp.experts.gate_up_proj.left"].shape == (4, 12, 5)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    restored, merged, model = (read_model(p)[name] for p in (restore(out, "math").out, out, paths[1]))
    for i in range(4):
        values = torch.linalg.svdvals((model[i] - merged[i]).double())
        assert float((restored[i] - model[i]).norm()) == pytest.approx(float(values[5:].norm()), rel=1e-4)


def test_large_sidecars_have_several_files(tmp_path, paths):
    recipe = recipe_of("twin", paths)
    whole = restore(merge(recipe, tmp_path / "whole").out, "chat").out
    out = merge(recipe, tmp_path / "out", out_shard_size=3000).out
    assert len(list((out / "sidecars/chat").glob("parts-*-of-*.safetensors"))) > 2
    target = restore(out, "chat", out_shard_size=3000).out
    assert len(list(target.glob("model-*-of-*.safetensors"))) > 2
    assert (target / "model.safetensors.index.json").exists()
    assert read_model(target).keys() == read_model(whole).keys()
    assert all(torch.equal(tensor, read_model(whole)[name]) for name, tensor in read_model(target).items())


@pytest.mark.parametrize("name", ["emr", "rmm"])
def test_any_number_of_threads_writes_the_same(tmp_path, paths, name):
    one, two = (merge(recipe_of(name, paths), tmp_path / f"{n}" / "out", threads=n).out for n in (1, 3))
    assert read_files(one) == read_files(two)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("name", ["emr", "rmm"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.8, 0.97])
def test_kill_and_continue(tmp_path, paths, name, share):
    recipe = recipe_of(name, paths)
    counter = Counter()
    files = read_files(merge(recipe, tmp_path / "elsewhere" / "out", progress=counter).out)
    out = tmp_path / "out"
    process = in_a_process(merge_and_die, recipe, out, int(share * counter.calls), {"threads": 2})
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert not out.exists()
    progress = Counter()
    result = merge(recipe, out, progress=progress)
    assert progress.continued
    assert progress.read < counter.read
    assert progress.written == counter.written
    assert read_files(out) == files
    assert result.record["sidecars"] == read_json(tmp_path / "elsewhere" / "out", "merge.json")["sidecars"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["elsewhere", "models", "out"]


def test_what_was_damaged_meanwhile_is_made_again(tmp_path, paths):
    recipe = recipe_of("tall_masks", paths)
    counter = Counter()
    files = read_files(merge(recipe, tmp_path / "elsewhere" / "out", progress=counter, threads=1).out)
    stopper = Stopper(counter.calls - 2)
    with contextlib.suppress(Interrupted):
        merge(recipe, tmp_path / "out", progress=stopper, threads=1)
    staged = tmp_path / ".out.merging" / "sidecars/math/parts.safetensors"
    data = bytearray(staged.read_bytes())
    length = 8 + int.from_bytes(data[:8], "little")
    data[length : length + 8] = b"\xff" * 8
    staged.write_bytes(data)
    assert read_files(merge(recipe, tmp_path / "out").out) == files


def test_names_are_those_of_the_folders_made_unique(tmp_path):
    base = write_model(tmp_path / "base", llama(0), llama_config())
    places = ["a/math", "b/math", "c/Math", "d/shared", "e/was für ein Name", "f/one", "g/index.json"]
    models = [write_model(tmp_path / place, tuned(i), llama_config()) for i, place in enumerate(places, start=1)]
    recipe = make_recipe("emr", models, base)
    recipe["models"][5]["name"] = "code"
    names = [task.name for task in plan(recipe).sidecars.tasks]
    assert names == ["math", "math-2", "Math-3", "shared-2", "was-f-r-ein-Name", "code", "index.json-2"]
    out = merge(recipe, tmp_path / "out").out
    assert sorted(path.name for path in (out / "sidecars").iterdir()) == sorted([*names, "index.json"])


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["x", "x"], r"models\[1\]: name 'x' is given twice; choose another"),
        (["X", "x"], r"models\[1\]: name 'x' is given twice; choose another"),
        (["shared", "x"], r"models\[0\]: name 'shared' is kept for a file of the sidecars; choose another"),
        (
            ["a/b", "x"],
            r"models\[0\]: name 'a/b' must be usable as the name of a folder: letters, digits, '.', '_' and '-'",
        ),
        (["..", "x"], r"models\[0\]: name '..' must be usable as the name of a folder"),
    ],
)
def test_names_that_cannot_be(paths, names, message):
    recipe = make_recipe("emr", paths[1:3], paths[0])
    for entry, name in zip(recipe["models"], names, strict=True):
        entry["name"] = name
    with pytest.raises(RecipeError, match=message):
        plan(recipe)


def test_names_without_sidecars_have_no_effect(paths):
    recipe = make_recipe("task_arithmetic", paths[1:3], paths[0], {"weight": 1.0})
    recipe["models"][0]["name"] = "x"
    planned = plan(recipe)
    assert planned.sidecars is None
    assert planned.warnings == [
        "<recipe> models[0]: name has no effect: task_arithmetic keeps nothing for single models",
        *planned.warnings[1:],
    ]
    recipe = make_recipe("emr", paths, paths[0])
    recipe["models"][0]["name"] = "x"
    assert "<recipe> models[0]: name has no effect: the base is not a task" in plan(recipe).warnings


def test_slices_cannot_be_restored(paths):
    sources = [{"model": str(path), "layer_range": [0, 2]} for path in paths]
    recipe = {"merge_method": "emr", "base_model": str(paths[0]), "slices": [{"sources": sources}]}
    with pytest.raises(RecipeError, match="slices: emr stores what restores each model, so it takes whole models"):
        plan(recipe)


def test_a_factor_over_the_model_needs_one_way_to_measure(paths):
    by = [{"filter": "mlp", "value": "mean"}, {"value": "sum"}]
    with pytest.raises(RecipeError, match=r"emr measures factor over the whole model, so its parameters cannot differ"):
        plan(make_recipe("emr", paths[1:], paths[0], {"rescale_by": by}))
    assert plan(make_recipe("emr", paths[1:], paths[0], {"rescale_by": by, "rescale_over": "tensor"})).sidecars


def test_parameters_may_differ_between_tensors(tmp_path, paths):
    rank = [{"filter": "self_attn", "value": 1.0}, {"value": 0.1}]
    origin = [{"filter": "self_attn", "value": "merged"}, {"value": "base"}]
    out = merge(make_recipe("twin", paths[1:], paths[0], {"rank": rank}), tmp_path / "twin").out
    restored, model = read_model(restore(out, "math").out), read_model(paths[1])
    for name, tensor in model.items():
        near = "self_attn" in name or "norm" in name or "embed" in name or "head" in name
        assert torch.allclose(restored[name], tensor, atol=1e-6) is near, name
    out = merge(make_recipe("one_bit", paths[1:], paths[0], {"origin": origin}), tmp_path / "one_bit").out
    tensors = json.loads((out / "sidecars/index.json").read_text())["tensors"]
    for name, entry in tensors.items():
        assert ("base" in entry) is ("mlp" in name), name
    assert relative_error(read_model(restore(out, "math").out), model) < 0.06


def test_restoring_says_whether_it_takes_the_base(paths):
    def needs(method, parameters):
        return plan(make_recipe(method, paths[1:], paths[0], parameters)).sidecars.needs_base

    assert needs("emr", {})
    assert not needs("twin", {})
    assert needs("one_bit", {})
    assert not needs("one_bit", {"origin": "merged"})
    assert not needs("skillpack", {"origin": "merged"})


def write_holes(folder, side):
    """Write a checkpoint of one matrix of zeros that takes no room."""
    (shard,) = plan_shards([("model.layers.0.mlp.up_proj.weight", DTYPE_BY_NAME["float32"], (side, side))], 1 << 40, {})
    folder.mkdir()
    with (folder / shard.name).open("wb") as file:
        file.write(shard.header)
        file.truncate(shard.size)
    return folder


def test_memory_is_kept_for_the_sidecars(tmp_path):
    paths = [write_holes(tmp_path / name, 3000) for name in ("base", "one", "two")]
    recipe = make_recipe("rmm", paths[1:], paths[0], {"rank": 4})
    with pytest.raises(
        MemoryLimitError, match=r"--max-memory: rmm needs [\d.]+ [MG]B for this merge, 800 MB are allowed; "
    ):
        plan(recipe, max_memory=800_000_000)
    one, many = (plan(recipe, max_memory=limit, threads=4) for limit in (1_300_000_000, 1 << 40))
    assert (one.sidecars.workers, many.sidecars.workers) == (1, 4)
    assert one.peak_memory <= one.max_memory
    assert many.peak_memory - one.peak_memory >= 3 * one.sidecars.peak_memory


def test_numbers_that_are_not_finite(tmp_path, paths):
    spoilt = tuned(1)
    spoilt["model.norm.weight"][0] = torch.nan
    path = write_model(tmp_path / "spoilt", spoilt, llama_config())
    recipe = make_recipe("tall_masks", [path, *paths[2:]], paths[0])
    with pytest.raises(NonFiniteError, match=r"model\.norm\.weight"):
        merge(recipe, tmp_path / "out")
    out = merge(recipe, tmp_path / "out", allow_nonfinite=True).out
    tasks = read_json(out, "merge.json")["sidecars"]["tasks"]
    assert tasks[0]["error"] is None
    assert tasks[0]["worst"] == {"tensor": "model.norm.weight", "error": None}
    restore(out, "spoilt")


def test_a_restored_model_that_overflows_is_refused(tmp_path):
    base = write_model(tmp_path / "base", {"up.weight": torch.full((4, 4), 60000.0)}, {})
    near = torch.full((4, 4), 64000.0)
    # its mean distance is 7500, and 60000 + 7500 is more than float16 holds
    near[0, 0] = 0
    models = [write_model(tmp_path / name, {"up.weight": near.half()}, {}) for name in ("one", "two")]
    with pytest.raises(
        NonFiniteError, match=r"up\.weight: what one_bit restores of one is not finite: it overflows float16"
    ):
        merge(make_recipe("one_bit", models, base), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    out = merge(make_recipe("one_bit", models, base), tmp_path / "out", allow_nonfinite=True).out
    assert read_json(out, "merge.json")["sidecars"]["tasks"][0]["error"] is None
