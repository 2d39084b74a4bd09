"""A merge of checkpoints is, bit for bit, the merge of their tensors one by one."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from merganser.anatomy import infer_anatomy
from merganser.engine.alignment.alignment import location_of
from merganser.engine.kernels.merge_tensor import merge_tensor
from merganser.engine.merge import merge, plan
from merganser.engine.stream import groups as work
from merganser.errors import NonFiniteError
from merganser.method.method import fill
from merganser.method.registry import get_method, methods
from merganser.process import one_thread
from merganser.testing import cases as _cases
from tests.making import (
    assert_equal,
    llama,
    llama_config,
    make_recipe,
    read_json,
    read_model,
    write_llamas,
    write_model,
    write_statistics,
)
from tests.methods.whole_model import merge_whole_model


def merged_one_by_one(method, base, models, parameters, *, seed=0, dtype=None, compute=None):
    """What `merge_tensor` makes of every tensor; integers are copied."""
    # products of matrices depend on the number of threads; those of the engine have one each
    with one_thread():
        return _merged_one_by_one(method, base, models, parameters, seed=seed, dtype=dtype, compute=compute)


def _merged_one_by_one(method, base, models, parameters, *, seed, dtype, compute):
    found = get_method(method)
    anatomy = infer_anatomy({name: tuple(tensor.shape) for name, tensor in models[0].items()}, {})
    result = {}
    for name, first in models[0].items():
        if not first.is_floating_point():
            result[name] = first
            continue
        own = None if base is None else base[name]
        others = [model[name] for model in models]
        result[name] = merge_tensor(
            found,
            own,
            others,
            parameters,
            name=name,
            role=anatomy.parts[name].role,
            location=location_of(name, anatomy),
            seed=seed,
            dtype=dtype,
            compute=compute,
            data=_data(found, name, first, len(models)) | _numbers(found, anatomy, len(models)),
        )
    return result


def _data(method, name, tensor, count):
    """Statistics from data of the matrices in the layers; embeddings and head have none."""
    if tensor.dim() < 2 or ".layers." not in name:
        return {}
    made = _cases.make_data(method, tensor.shape, count)
    return {key: each for key, each in made.items() if key in method.from_data}


def _numbers(method, anatomy, count):
    """Numbers from data: losses, and a number for each layer that the model has."""
    made = _cases.make_data(method, (1, 1), count)
    layers = {location_of(name, anatomy).layer for name in anatomy.parts}
    return {
        key: [{layer: each[layer] for layer in layers} if isinstance(each, dict) else each for each in made[key]]
        for key in method.numbers
    }


def _hand_in(recipe, method, folder, tensors):
    """Name, for every model of a recipe or the base, folders with the statistics that `_data` and `_numbers` make."""
    count = len(recipe["models"])
    if method.data_of == "base":
        recipe["models"].insert(0, {"model": recipe["base_model"]})
    # the base or the first model alone
    handed = recipe["models"] if method.data_of == "models" else recipe["models"][:1]
    anatomy = infer_anatomy({name: tuple(tensor.shape) for name, tensor in tensors.items()}, {})
    numbers = _numbers(method, anatomy, count)
    for key, of_base in (("statistics", False), ("base_statistics", True)):
        wanted = {name: own for name, own in method.from_data.items() if (own.of == "base_on_models") == of_base}
        for i, entry in enumerate(handed):
            found = {name: _data(method, name, tensor, count) for name, tensor in tensors.items()}
            means = {
                name: {own.statistic: data[k][i] for k, own in wanted.items()} for name, data in found.items() if data
            }
            whole = {}
            for k, own in () if of_base else method.numbers.items():
                if own.statistic in ("loss", "losses"):
                    whole[own.statistic] = numbers[k][i]
                    continue
                # what a layer has is the sum of what its tensors have
                for layer, value in numbers[k][i].items():
                    first = next(name for name in tensors if location_of(name, anatomy).layer == layer)
                    means[first] = {own.statistic: torch.tensor(value, dtype=torch.float64)}
            if any(means.values()) or whole:
                entry[key] = str(write_statistics(folder / f"{key}{i}", means, method.data_inputs, **whole))
    return recipe


def over_model(method, parameters):
    """Whether something is measured over the whole model, which one tensor is not."""
    filled = fill(method, parameters, _cases.count_models(method))
    return any(s.wanted(filled) and filled.get(s.over, s.over) == "model" for s in method.statistics.values())


def tried(method):
    """The first and the last case of each way to use a base."""
    found = [case for case in _cases.cases(method) if not over_model(method, case[1])]
    for with_base in {case[0] for case in found}:
        own = [case for case in found if case[0] == with_base]
        yield from {id(case): case for case in (own[0], own[-1])}.values()


CASES = [
    pytest.param(name, with_base, parameters, id=f"{name}-{i}")
    for name, method in methods().items()
    for i, (with_base, parameters) in enumerate(tried(method))
]


def written(folder, name, with_base, parameters, harm=None):
    """A recipe for a method, and the base and the models that it merges; `harm` may change those first."""
    method = get_method(name)
    # what goes by layers needs some
    paths = write_llamas(folder, _cases.count_models(method) + 1, layers=20 if method.located else 1)
    if harm is not None:
        for file in (file for path in paths[1:] for file in path.glob("*.safetensors")):
            own = load_file(file)
            harm(own)
            save_file(own, file)
    base, models = (paths[0], paths[1:]) if with_base else (None, paths[1:])
    per_model = {key: value for key, value in parameters.items() if method.parameters[key].per_model}
    shared = {key: value for key, value in parameters.items() if key not in per_model}
    listed = [(path, {key: value[i] for key, value in per_model.items()}) for i, path in enumerate(models)]
    tensors = [read_model(path) for path in paths]
    return _hand_in(make_recipe(name, listed, base, shared), method, folder, tensors[0]), tensors


@pytest.mark.parametrize(("name", "with_base", "parameters"), CASES)
def test_every_method_in_small_tensors(tmp_path, name, with_base, parameters):
    recipe, tensors = written(tmp_path, name, with_base, parameters)
    result = merge(recipe, tmp_path / "out", seed=7, threads=2)
    expected = merged_one_by_one(name, tensors[0] if with_base else None, tensors[1:], parameters, seed=7)
    assert_equal(read_model(result.out), expected)


@pytest.mark.parametrize(("name", "with_base", "parameters"), {case.values[0]: case for case in CASES}.values())
def test_every_method_names_what_is_not_finite(tmp_path, name, with_base, parameters):
    """Also those that decompose matrices, for which linear algebra has errors of its own."""
    culprit = "model.layers.0.mlp.down_proj.weight"

    def harm(tensors):
        if culprit in tensors:
            tensors[culprit][3, 5] = float("nan")

    recipe, _ = written(tmp_path, name, with_base, parameters, harm)
    with pytest.raises(NonFiniteError, match=rf"\.safetensors: tensor '{culprit}' holds NaN or infinity"):
        merge(recipe, tmp_path / "out", threads=1)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("metagpt", {}),
        ("pcb", {}),
        ("pcb", {"form": "code"}),
        ("ties", {"weight": 0.6, "density": 0.3, "trim_over": "model", "tie": "majority"}),
    ],
)
def test_statistics_over_the_model_are_those_of_all_tensors(tmp_path, name, parameters):
    paths = write_llamas(tmp_path, 4)
    merged = read_model(merge(make_recipe(name, paths[1:], paths[0], parameters), tmp_path / "out", threads=2).out)
    base, *models = [read_model(path) for path in paths]
    # sums are formed in the order of the names
    names = sorted(base)
    tensors = [(base[name], [model[name] for model in models]) for name in names]
    assert_equal(merged, dict(zip(names, merge_whole_model(get_method(name), tensors, parameters), strict=True)))


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("linear", {"weight": 0.7}),
        ("task_arithmetic", {"weight": 0.4}),
        ("ties", {"weight": 0.6, "density": 0.3}),
        ("ties", {"weight": 0.6, "density": 0.3, "rescale": True}),
        ("slerp", {"t": 0.3}),
        ("dare_ties", {"weight": 0.4, "density": 0.5}),
        ("della", {"weight": 0.4, "density": 0.5, "rescale_to": "l1"}),
        ("model_stock", {}),
        ("arcee_fusion", {}),
        ("nuslerp", {"weight": 0.4, "nuslerp_flatten": False, "nuslerp_row_wise": True}),
    ],
)
def test_large_tensors_in_segments_and_small_ones_in_bundles(tmp_path, small_blocks, name, parameters):
    method = get_method(name)
    n = min(method.max_models or 3, 3)
    paths = write_llamas(tmp_path, n + 1)
    base, models = (paths[0], paths[1:]) if method.base == "required" else (None, paths[1:])
    recipe = make_recipe(name, models, base, parameters)
    groups = work.make_groups(plan(recipe))
    assert max(len(group.segments) for group in groups) > 1
    assert max(len(group.tensors) for group in groups) > 1
    result = merge(recipe, tmp_path / "out", threads=3)
    tensors = [read_model(path) for path in paths]
    expected = merged_one_by_one(name, tensors[0] if base else None, tensors[1:], parameters)
    assert_equal(read_model(result.out), expected)


@pytest.mark.slow
def test_real_blocks(tmp_path):
    generator = torch.Generator().manual_seed(0)
    tensors = [{"w": torch.randn(9000, 1024, generator=generator, dtype=torch.float32)} for _ in range(3)]
    paths = [write_model(tmp_path / f"m{i}", own) for i, own in enumerate(tensors)]
    parameters = {"weight": 0.6, "density": 0.3}
    recipe = make_recipe("ties", paths[1:], paths[0], parameters)
    assert len(work.make_groups(plan(recipe))[0].segments) == 2
    result = merge(recipe, tmp_path / "out")
    assert_equal(read_model(result.out), merged_one_by_one("ties", tensors[0], tensors[1:], parameters))


@pytest.mark.parametrize("density", [0.2, 1.0])
@pytest.mark.parametrize("blocks_of", ["usual", "small"])
def test_ties_over_the_model(tmp_path, request, density, blocks_of):
    if blocks_of == "small":
        request.getfixturevalue("small_blocks")
    paths = write_llamas(tmp_path, 3)
    parameters = {"weight": 0.6, "density": density, "trim_over": "model"}
    result = merge(make_recipe("ties", paths[1:], paths[0], parameters), tmp_path / "out", threads=3)
    base, *models = (read_model(path) for path in paths)
    # the whole model as one tensor
    names = sorted(base)
    vectors = [torch.cat([model[name].reshape(-1) for name in names]) for model in (base, *models)]
    flat = merge_tensor(get_method("ties"), vectors[0], vectors[1:], {**parameters, "trim_over": "tensor"})
    expected = {
        name: part.view(base[name].shape)
        for name, part in zip(names, flat.split([base[name].numel() for name in names]), strict=True)
    }
    assert_equal(read_model(result.out), expected)


def test_a_statistic_over_the_model_passes_by_copies_and_empty_tensors(tmp_path):
    """Copies and empty tensors take no part in the measuring, and must not be waited for."""
    extra = {"a.position_ids": torch.arange(6), "b.none": torch.zeros(0, 4)}
    paths = [write_model(tmp_path / f"m{i}", {**llama(i), **extra}, llama_config()) for i in range(3)]
    # a statistic over the model, and one over each tensor behind it
    parameters = {"weight": 1, "density": 0.4, "trim_over": "model", "rescale": True}
    recipe = make_recipe("ties", paths[1:], paths[0], parameters)
    # every tensor in a file of its own, so that copies are groups of their own
    result = merge(recipe, tmp_path / "out", out_shard_size=1, threads=2)
    alone = merge(recipe, tmp_path / "alone", threads=1)
    assert_equal(read_model(result.out), read_model(alone.out))
    assert_equal({name: read_model(result.out)[name] for name in extra}, extra)


def test_ramplus_counts_over_the_model_do_not_depend_on_the_layout(tmp_path):
    paths = write_llamas(tmp_path, 3)
    recipe = make_recipe("ramplus_tl", paths[1:], paths[0], {"counts": "model"})
    found = [
        merge(recipe, tmp_path / f"out{size}", out_shard_size=size, threads=threads)
        for size, threads in ((10**9, 1), (3000, 3))
    ]
    assert_equal(read_model(found[0].out), read_model(found[1].out))


HALF, BRAIN, SINGLE, DOUBLE = torch.float16, torch.bfloat16, torch.float32, torch.float64


@pytest.mark.parametrize(
    ("inputs", "keys", "output"),
    [
        ([BRAIN, BRAIN], {}, BRAIN),
        ([HALF, HALF], {}, HALF),
        ([BRAIN, HALF], {}, SINGLE),
        ([BRAIN, SINGLE], {}, SINGLE),
        ([HALF, DOUBLE], {}, DOUBLE),
        ([SINGLE, SINGLE], {"dtype": "bfloat16"}, BRAIN),
        ([BRAIN, SINGLE], {"dtype": "float32", "out_dtype": "float16"}, HALF),
        ([BRAIN, BRAIN], {"out_dtype": "float64"}, DOUBLE),
        ([BRAIN, HALF], {"dtype": "float64", "out_dtype": "bfloat16"}, BRAIN),
    ],
)
@pytest.mark.parametrize("name", ["linear", "ties", "slerp"])
def test_dtypes(tmp_path, inputs, keys, output, name):
    tensors = [llama(i, 1, dtype=dtype) for i, dtype in enumerate(inputs)]
    paths = [write_model(tmp_path / f"m{i}", own, llama_config(1)) for i, own in enumerate(tensors)]
    parameters = {"linear": {"weight": 0.3}, "ties": {"weight": 0.3, "density": 0.5}, "slerp": {"t": 0.3}}[name]
    with_base = name != "linear"
    recipe = make_recipe(name, paths[1:] if with_base else paths, paths[0] if with_base else None, parameters, **keys)
    result = merge(recipe, tmp_path / "out")
    base, models = (tensors[0], tensors[1:]) if with_base else (None, tensors)
    compute = DOUBLE if keys.get("dtype") == "float64" else None
    expected = merged_one_by_one(name, base, models, parameters, dtype=output, compute=compute)
    assert_equal(read_model(result.out), expected)
    assert read_json(result.out, "config.json")["torch_dtype"] == str(output).removeprefix("torch.")


def test_mixed_dtypes_inside_a_model(tmp_path):
    """Every tensor keeps its own dtype, and the larger ones come first in the file."""
    tensors = []
    for i in range(2):
        own = llama(i, dtype=BRAIN)
        own["model.norm.weight"] = own["model.norm.weight"].float()
        own["model.layers.1.input_layernorm.weight"] = own["model.layers.1.input_layernorm.weight"].double()
        own["model.layers.0.self_attn.masked_bias"] = torch.tensor(-1e4)
        own["flags"] = torch.tensor([True, False, True])
        own["counts"] = torch.tensor([1, 2, 3], dtype=torch.int16)
        tensors.append(own)
    paths = [write_model(tmp_path / f"m{i}", own, llama_config()) for i, own in enumerate(tensors)]
    result = merge(make_recipe("linear", paths, parameters={"weight": 0.3}), tmp_path / "out")
    assert_equal(read_model(result.out), merged_one_by_one("linear", None, tensors, {"weight": 0.3}))
    assert read_json(result.out, "config.json")["torch_dtype"] == "bfloat16"


def test_odd_shapes_and_parameters_that_differ_inside_a_bundle(tmp_path):
    generator = torch.Generator().manual_seed(0)
    tensors = []
    for _ in range(3):
        tensors.append(
            {
                "a.scalar": torch.randn((), generator=generator),
                "b.copy": torch.arange(5),
                "c.one": torch.randn(1, generator=generator),
                "d.none": torch.zeros(0),
                "e.none": torch.zeros(4, 0, 2),
                "f.weight": torch.randn(3, 5, 7, generator=generator),
                "g.flags": torch.tensor([True, False]),
                "h.half": torch.randn(3, generator=generator).half(),
                "i.weight": torch.randn(11, generator=generator),
                "j.ids": torch.tensor([250], dtype=torch.uint16),
            }
        )
    paths = [write_model(tmp_path / f"m{i}", own) for i, own in enumerate(tensors)]
    weight = [{"filter": "weight", "value": 0.3}, {"filter": "half", "value": 2.0}, {"value": 0.9}]
    recipe = make_recipe("ties", paths[1:], paths[0], {"weight": weight, "density": 0.5})
    expected = {}
    for name in tensors[0]:
        own = [{name: model[name]} for model in tensors]
        value = 0.3 if "weight" in name else 2.0 if "half" in name else 0.9
        expected |= merged_one_by_one("ties", own[0], own[1:], {"weight": value, "density": 0.5})
    for size in (10**9, 40, 1):
        result = merge(recipe, tmp_path / f"out{size}", out_shard_size=size, threads=2)
        assert_equal(read_model(result.out), expected)


def test_tensors_that_begin_at_odd_bytes(tmp_path):
    """Inputs that lie side by side are read at once, and need not be aligned."""
    values = {"a": torch.randn(3).bfloat16(), "b": torch.randn(5), "c": torch.tensor([True]), "d": torch.randn(2)}
    tags = {"a": "BF16", "b": "F32", "c": "BOOL", "d": "F32"}
    header, data = {}, b""
    for name, tensor in values.items():
        own = tensor.view(torch.uint8).numpy().tobytes()
        header[name] = {"dtype": tags[name], "shape": list(tensor.shape), "data_offsets": [len(data), len(data + own)]}
        data += own
    text = json.dumps(header).encode()
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    other = write_model(tmp_path / "other", values)
    recipe = make_recipe("linear", [tmp_path / "m", other], parameters={"weight": 1}, dtype="float32")
    found = read_model(merge(recipe, tmp_path / "out").out)
    assert_equal(found, {name: tensor if name == "c" else tensor.float() for name, tensor in values.items()})


def test_thousands_of_small_tensors(tmp_path):
    count = 5000
    generator = torch.Generator().manual_seed(0)
    data = [torch.randn(count, 1000, generator=generator).bfloat16() for _ in range(2)]
    paths = [
        write_model(tmp_path / f"m{i}", {f"t{j:05d}": row for j, row in enumerate(rows)}, shards=1 + 3 * i)
        for i, rows in enumerate(data)
    ]
    result = merge(make_recipe("linear", paths, parameters={"weight": 0.3}), tmp_path / "out", threads=2)
    expected = merge_tensor(get_method("linear"), None, data, {"weight": 0.3})
    assert_equal(read_model(result.out), {f"t{j:05d}": row for j, row in enumerate(expected)})


def test_bin_files_merge_like_safetensors(tmp_path):
    first, second = write_llamas(tmp_path, 2)
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    torch.save(llama(1), pickled / "pytorch_model.bin")
    (pickled / "config.json").write_text((second / "config.json").read_text())
    found = [
        merge(make_recipe("linear", [first, other], parameters={"weight": 1}), tmp_path / f"out-{other.name}")
        for other in (second, pickled)
    ]
    assert_equal(read_model(found[0].out), read_model(found[1].out))


@pytest.mark.parametrize(
    ("name", "parameters"), [("linear", {"weight": 0.4}), ("ties", {"weight": 0.4, "density": 0.3})]
)
def test_fused_equals_eager(tmp_path, monkeypatch, name, parameters):
    generator = torch.Generator().manual_seed(0)
    paths = []
    for i in range(3):
        own = {"a": torch.randn(1500, 1024, generator=generator), "b": torch.randn(700, 700, generator=generator)}
        paths.append(write_model(tmp_path / f"m{i}", {key: value.bfloat16() for key, value in own.items()}))
    recipe = make_recipe(name, paths[1:], None if name == "linear" else paths[0], parameters)
    fused = merge(recipe, tmp_path / "fused")
    monkeypatch.setattr("merganser.engine.planner.planner.why_not", lambda: "not today")
    eager = merge(recipe, tmp_path / "eager")
    assert [fused.record["compiled"], eager.record["compiled"]] == [True, False]
    assert "not today: operations run one by one, several times slower" in eager.record["warnings"]
    assert_equal(read_model(fused.out), read_model(eager.out))
