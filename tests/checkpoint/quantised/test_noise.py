"""The estimate of rounding errors, made from dequantised values alone, against the errors themselves."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import pytest
import torch
import yaml
from gguf import GGMLQuantizationType as T
from safetensors.torch import save_file

from merganser.checkpoint.formats.gguf.values import noise_of
from merganser.checkpoint.formats.quantised.noise import CodeNoise, FloatNoise, StepNoise
from merganser.engine.merge import plan
from merganser.recipe import load_recipes
from tests.checkpoint.quantised.making import randn
from tests.making import llama, llama_config, make_recipe


@pytest.mark.parametrize("kind", [T.Q4_0, T.Q4_1, T.Q5_0, T.Q5_1, T.Q8_0, T.MXFP4])
def test_types_of_gguf(kind: T) -> None:
    values = randn(64, 256)
    found = torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(values.numpy(), kind), kind))
    noise = noise_of(kind.name)
    assert noise is not None
    estimated = noise(found.reshape(-1))
    assert estimated.shape == (values.numel(),)
    true = (found.double() - values).square().mean()
    assert 0.6 * true < estimated.mean() < 1.5 * true


def test_float8() -> None:
    values = randn(4096)
    stored = values.to(torch.float8_e4m3fn).float()
    true = (stored.double() - values).square().mean()
    assert 0.8 * true < FloatNoise(3)(stored).mean() < 1.25 * true


def test_odd_lengths() -> None:
    for noise in (FloatNoise(3), StepNoise(32, 15, symmetric=False), CodeNoise(64, (-1.0, 0.0, 1.0))):
        for length in (1, 31, 33):
            found = noise(randn(length))
            assert found.shape == (length,)
            assert torch.isfinite(found).all()
        assert torch.isfinite(noise(torch.zeros(64))).all()


def test_the_plan_tells_it(tmp_path: Path) -> None:
    """A model that differs from its base by less than the step of float8: the difference is rounding."""
    paths = []
    for name, change in ("base", 0.0), ("near", 0.01), ("far", 3.0):
        tensors = {}
        for key, weight in llama(0, dtype=torch.float64).items():
            moved = weight + change * weight.std() * randn(*weight.shape, seed=len(key)).double()
            if "proj" in key:
                scale = moved.abs().amax().float() / 448
                tensors[key], tensors[f"{key}_scale"] = (moved / scale).to(torch.float8_e4m3fn), scale.view(1)
            else:
                tensors[key] = moved.bfloat16()
        folder = tmp_path / name
        folder.mkdir()
        save_file(tensors, folder / "model.safetensors")
        config = llama_config() | {"quantization_config": {"quant_method": "compressed-tensors"}}
        (folder / "config.json").write_text(json.dumps(config))
        paths.append(folder)
    file = tmp_path / "r.yaml"
    file.write_text(yaml.safe_dump(make_recipe("task_arithmetic", paths[1:], paths[0], {"weight": 1.0})))
    base, near, far = (line for line in plan(load_recipes(file)).warnings if "dequantised" in line)
    assert base.endswith(
        "base: its weights are dequantised (float8_e4m3fn per tensor); rounding has moved them by about 0.026 of their size"
    )
    assert float(near.split("which is ")[1].split()[0]) > 0.6
    assert float(far.split("which is ")[1].split()[0]) < 0.04
