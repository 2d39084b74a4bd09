import pytest
import torch

from merganser import plan
from merganser.cli import main
from merganser.engine.in_memory.state_dicts import merge_state_dicts
from merganser.engine.kernels.merge_tensor import merge_tensor
from merganser.engine.merge import merge
from merganser.errors import ParameterError
from merganser.method import Location
from merganser.methods.layer_swap import layer_swap
from tests.making import assert_equal, llama, llama_config, make_recipe, read_model, write_llamas, write_model
from tests.methods.bars import assert_reaches_bars, make_models
from tests.reference.layer_swap import layer_swap as reference

SETTINGS = [
    {},
    {"bottom": 0, "top": 0},
    {"bottom": 3, "top": 4, "bottom_transition": 2, "top_transition": 0, "t": 0.3},
    {"bottom_transition": 0, "top_transition": 3},
    {"bottom": 4, "bottom_transition": 3, "top_transition": 3, "top": 2, "t": 0.9},
]
ZONES = {"bottom": 3, "top": 2, "bottom_transition": 1, "top_transition": 2}


def at(layer, n_layers):
    return Location("layer", layer, n_layers)


@pytest.mark.parametrize("parameters", SETTINGS, ids=str)
def test_every_layer_is_that_of_the_reference(parameters):
    _, models = make_models((8, 5), 2, change=1.0)
    for layer in range(12):
        found = merge_tensor(layer_swap, None, models, parameters, location=at(layer, 12))
        torch.testing.assert_close(found, reference(*models, layer, 12, **parameters).float())


@pytest.mark.parametrize("change", [0.02, 1.0])
@pytest.mark.parametrize("t", [0.0, 0.3, 0.5, 1.0])
def test_reaches_the_bars(change, t):
    _, models = make_models((80, 125), 2, change=change)
    assert_reaches_bars(layer_swap, lambda _, m, **p: reference(*m, None, 0, **p), None, models, {"t": t})


def test_zones_by_hand():
    models = [torch.zeros(1), torch.ones(1)]
    found = [merge_tensor(layer_swap, None, models, ZONES, location=at(layer, 10)).item() for layer in range(10)]
    assert found == [1, 1, 1, 0.5, 0, 0, 0.5, 0.5, 1, 1]
    # the zones may fill the model
    found = [merge_tensor(layer_swap, None, models, ZONES, location=at(layer, 8)).item() for layer in range(8)]
    assert found == [1, 1, 1, 0.5, 0.5, 0.5, 1, 1]


def test_what_is_outside_layers_has_settings_of_its_own():
    models = [torch.zeros(1), torch.ones(1)]
    settings = {"embedding": "second", "head": "first", "t": 0.25}
    for position, expected in (("before", 1), ("after", 0)):
        # also a layer of a tower beside the model
        for location in (Location(position), Location(position, 3, 9)):
            assert merge_tensor(layer_swap, None, models, settings, location=location).item() == expected
            assert merge_tensor(layer_swap, None, models, {"t": 0.25}, location=location).item() == 0.25


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_zones_are_copies(dtype):
    first, second = (model.to(dtype) for model in make_models((80, 125), 2)[1])
    first[0, :2] = second[0, :2] = torch.tensor([-0.0, torch.finfo(dtype).smallest_normal / 4])
    for layer, expected in ((0, second), (15, first)):
        copy = merge_tensor(layer_swap, None, [first, second], location=at(layer, 32))
        assert torch.equal(copy.view(torch.uint8), expected.view(torch.uint8))


def test_zones_that_do_not_fit_are_refused():
    models = [torch.zeros(1), torch.ones(1)]
    with pytest.raises(
        ParameterError, match=r"^layer_swap: bottom 3, bottom_transition 1, .* need 8 layers, there are 7"
    ):
        merge_tensor(layer_swap, None, models, ZONES, location=at(0, 7))


def test_a_merge_takes_layers_like_slices(tmp_path):
    task, language = write_llamas(tmp_path, 2, layers=7)
    zones = {"bottom": 2, "top": 1, "bottom_transition": 0, "top_transition": 0}
    recipe = make_recipe("layer_swap", [task, language], parameters={**zones, "embedding": "second", "head": "second"})
    swapped = merge(recipe, tmp_path / "swapped", threads=2)
    cuts = [(language, [0, 2]), (task, [2, 6]), (language, [6, 7])]
    slices = [{"sources": [{"model": str(model), "layer_range": cut}]} for model, cut in cuts]
    stacked = merge({"merge_method": "passthrough", "slices": slices}, tmp_path / "stacked")
    assert_equal(read_model(swapped.out), read_model(stacked.out))


def test_a_merge_with_transitions(tmp_path):
    paths = write_llamas(tmp_path, 2, layers=10)
    merged = read_model(merge(make_recipe("layer_swap", paths, parameters={**ZONES, "t": 0.25}), tmp_path / "out").out)
    first, second = (read_model(path) for path in paths)
    share = {**dict.fromkeys([0, 1, 2, 8, 9], 1), **dict.fromkeys([3, 6, 7], 0.25), 4: 0, 5: 0}
    for name, tensor in merged.items():
        here = share[int(name.split(".")[2])] if "layers" in name else 0.25
        torch.testing.assert_close(tensor, (1 - here) * first[name] + here * second[name])
    states = merge_state_dicts("layer_swap", [first, second], **ZONES, t=0.25)
    assert_equal(states, merged)


def test_layers_of_slices_count_as_they_lie_in_the_output(tmp_path):
    paths = write_llamas(tmp_path, 2, layers=4)
    slices = [{"sources": [{"model": str(path), "layer_range": cut} for path in paths]} for cut in ([0, 4], [1, 3])]
    zones = {"bottom": 1, "top": 2, "bottom_transition": 1, "top_transition": 0}
    recipe = {"merge_method": "layer_swap", "slices": slices, "parameters": zones}
    located = {t.layer: t.located["share"] for t in plan(recipe).tensors if t.layer is not None}
    assert located == {0: 1, 1: 0.5, 2: 0, 3: 0, 4: 1, 5: 1}


def test_a_tied_head_is_its_embedding(tmp_path):
    config = llama_config(9, tied=True)
    paths = [write_model(tmp_path / str(seed), llama(seed, 9), config) for seed in range(2)]
    recipe = make_recipe("layer_swap", paths, parameters={"embedding": "second", "head": "first"})
    located = {t.name: t.located["share"] for t in plan(recipe).tensors if t.layer is None}
    assert located == {"model.embed_tokens.weight": 1, "lm_head.weight": 1, "model.norm.weight": 0}


def test_too_few_layers_end_the_plan(tmp_path, capsys):
    paths = write_llamas(tmp_path, 2, layers=8)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"merge_method: layer_swap\nmodels:\n  - model: {paths[0]}\n  - model: {paths[1]}\n")
    with pytest.raises(SystemExit) as ended:
        main(["merge", str(recipe), str(tmp_path / "out")])
    assert ended.value.code == 2
    assert f"{recipe}:2 models: layer_swap: bottom 5, " in capsys.readouterr().err.replace("\n", " ")
    assert not (tmp_path / "out").exists()
