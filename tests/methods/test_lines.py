import pytest
import torch

from merganser import plan
from merganser.engine.in_memory.state_dicts import merge_state_dicts
from merganser.engine.kernels.merge_tensor import merge_tensor
from merganser.engine.merge import merge
from merganser.errors import ParameterError
from merganser.method import Location
from merganser.methods.lines import lines
from merganser.methods.task_arithmetic import task_arithmetic
from tests.making import assert_equal, llama, llama_config, make_recipe, read_model, write_llamas, write_model
from tests.methods.bars import FLOAT32, assert_reaches_bars, error, make_models
from tests.reference.lines import lines as reference

SETTINGS = [
    {},
    {"alpha": 0.0},
    {"alpha": 0.3, "beta": 1.7},
    {"alpha": 1.5, "beta": -1.0, "weight": [0.5, 2.0, -0.4]},
]


@pytest.mark.parametrize("parameters", SETTINGS, ids=str)
@pytest.mark.parametrize("n_layers", [1, 2, 12])
def test_every_layer_is_that_of_the_reference(parameters, n_layers):
    base, models = make_models((8, 5), 3, change=1.0)
    for layer in range(n_layers):
        found = merge_tensor(lines, base, models, parameters, location=Location("layer", layer, n_layers))
        assert error(found, reference(base, models, layer + 1, n_layers, **parameters)) <= FLOAT32


@pytest.mark.parametrize("n", [1, 2, 16])
@pytest.mark.parametrize("change", [0.02, 1.0])
def test_reaches_the_bars(n, change):
    base, models = make_models((80, 125), n, change=change)
    outside = {"alpha": 0.7, "weight": [1 + 0.1 * i for i in range(n)]}
    assert_reaches_bars(lines, lambda b, m, **given: reference(b, m, None, 0, **given), base, models, outside)


def test_by_hand():
    base, models = torch.tensor([10.0]), [torch.tensor([12.0]), torch.tensor([16.0])]
    given = {"alpha": 0.5, "beta": 1.5}
    at = [Location("layer", layer, 4) for layer in range(4)]
    # the average of the task vectors is 4
    assert [merge_tensor(lines, base, models, given, location=where).item() for where in at] == [12, 14, 16, 18]
    # outside of layers, and in layers of an encoder beside the model
    for where in (Location("before"), Location("after"), Location("before", 3, 9), Location("layer", 0, 1)):
        assert merge_tensor(lines, base, models, given, location=where).item() == 12


def test_a_single_fine_tune_is_kept_in_the_last_layer_and_the_base_in_the_first():
    base, models = make_models((30, 10), 1)
    first, last = (
        merge_tensor(lines, base, models, {"alpha": 0, "beta": 1}, location=Location("layer", layer, 24))
        for layer in (0, 23)
    )
    assert torch.equal(first, base)
    torch.testing.assert_close(last, models[0], rtol=0, atol=1e-7)


def test_weights_without_a_sum_are_refused():
    base, models = make_models((3, 4), 2)
    with pytest.raises(ParameterError, match="the weights add up to 0"):
        merge_tensor(lines, base, models, {"weight": [1, -1]})


def test_a_merge_is_task_arithmetic_with_a_factor_for_each_layer(tmp_path):
    paths = write_llamas(tmp_path, 3, layers=5)
    given = {"alpha": 0.5, "beta": 2.0}
    merged = merge(make_recipe("lines", paths[1:], base=paths[0], parameters=given), tmp_path / "out")
    base, *models = (read_model(path) for path in paths)
    for name, tensor in read_model(merged.out).items():
        factor = 0.5 + int(name.split(".")[2]) / 2 if "layers" in name else 0.5
        parameters = {"weight": 0.5, "lambda": factor}
        expected = merge_tensor(task_arithmetic, base[name], [model[name] for model in models], parameters)
        torch.testing.assert_close(tensor, expected)
    assert_equal(merge_state_dicts("lines", models, base=base, **given), read_model(merged.out))


def test_the_plan_shows_the_factors(tmp_path):
    config = llama_config(3, tied=True)
    paths = [write_model(tmp_path / str(seed), llama(seed, 3), config) for seed in range(3)]
    planned = plan(make_recipe("lines", paths[1:], base=paths[0], parameters={"alpha": 0.25, "beta": 1.0}))
    assert {(t.layer, t.located["factor"]) for t in planned.tensors} == {(None, 0.25), (0, 0.25), (1, 0.75), (2, 1.25)}
