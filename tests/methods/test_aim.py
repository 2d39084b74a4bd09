"""AIM against its reference, and as the last step of a merge."""

from __future__ import annotations

import pytest
import torch
import yaml
from safetensors.torch import load_file

from merganser.engine.kernels.merge_tensor import merge_tensor
from merganser.engine.merge import merge, plan
from merganser.errors import RecipeError
from merganser.methods.aim import aim
from tests.making import llama, llama_config, write_llamas, write_model, write_statistics
from tests.methods.spectra import KINDS, SHAPES, make_matrices
from tests.reference.aim import aim as reference


def activity(columns):
    return torch.randn(columns, generator=torch.Generator().manual_seed(3), dtype=torch.float64).abs() ** 3


def merged(base, model, magnitude, **parameters):
    return merge_tensor(aim, base, [model], parameters, data={"magnitude": [magnitude]})


@pytest.mark.parametrize("parameters", [{}, {"omega": 0.0}, {"omega": 0.7, "quantile": 0.9}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_agrees_with_the_reference(parameters, kind):
    for shape in SHAPES:
        base, (model, *_) = make_matrices(shape, 1, kind)
        expected = reference(base, model, activity(shape[1]), **parameters)
        torch.testing.assert_close(
            merged(base, model, activity(shape[1]), **parameters), expected, rtol=1e-12, atol=1e-12
        )


def test_bounds():
    base, (model, *_) = make_matrices((24, 40), 1, "random")
    a = activity(40)
    assert torch.equal(merged(base, model, a, omega=1.0), base + (model - base))
    moved = (merged(base, model, a) - base).abs()
    whole = (model - base).abs()
    assert (moved <= whole + 1e-15).all()
    assert (moved >= 0.4 * whole - 1e-15).all()
    top = int(a.argmax())
    torch.testing.assert_close(moved[:, top], 0.4 * whole[:, top])
    assert torch.equal(merged(base, model, torch.zeros(40, dtype=torch.float64)), base + (model - base))


def test_last_step_of_a_merge(tmp_path):
    base, one, two = write_llamas(tmp_path)
    tensors = load_file(base / "model.safetensors")
    matrices = [name for name, tensor in tensors.items() if ".layers." in name and tensor.dim() == 2]
    means = {
        name: {"magnitude": activity(tensors[name].shape[1]), "second_moment": activity(tensors[name].shape[1])}
        for name in matrices
    }
    statistics = write_statistics(tmp_path / "statistics", means)
    first = {
        "name": "ties",
        "merge_method": "ties",
        "base_model": str(base),
        "models": [{"model": str(one)}, {"model": str(two)}],
        "parameters": {"weight": 0.5, "density": 0.5},
    }
    second = {
        "merge_method": "aim",
        "base_model": str(base),
        "models": [{"model": str(base), "statistics": str(statistics)}, {"model": "ties"}],
        "parameters": {"omega": 0.2},
    }
    merge("---\n".join(yaml.safe_dump(each) for each in (first, second)), tmp_path / "out")
    merge(first, tmp_path / "ties")
    before, after = load_file(tmp_path / "ties/model.safetensors"), load_file(tmp_path / "out/model.safetensors")
    for name, tensor in after.items():
        if name in means:
            expected = reference(tensors[name], before[name], means[name]["magnitude"], omega=0.2)
            torch.testing.assert_close(tensor.double(), expected, rtol=1e-5, atol=1e-7)
        else:
            torch.testing.assert_close(tensor, before[name], rtol=1e-6, atol=1e-7)


def test_statistics_are_those_of_the_base(tmp_path):
    base = write_model(tmp_path / "base", llama(0), llama_config())
    model = write_model(tmp_path / "model", llama(1), llama_config())
    recipe = {"merge_method": "aim", "base_model": str(base), "models": [{"model": str(model)}]}
    with pytest.raises(
        RecipeError,
        match=r"aim needs statistics of the base from data \(magnitude\); name a text file as .data., with the base listed among the models, or write them ",
    ):
        plan(recipe)
    recipe["models"][0]["statistics"] = "somewhere"
    with pytest.raises(RecipeError, match="aim uses no statistics of this model; leave the key out"):
        plan(recipe)
