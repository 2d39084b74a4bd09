"""Quantised models are calibrated with the weights that a merge reads: dequantised."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import merganser
from merganser.checkpoint import Reader
from merganser.errors import CheckpointError
from merganser.statistics import Statistics
from tests.calibration.test_calibrate import _model, _texts


def _read(found: Statistics) -> dict[str, Tensor]:
    with Reader() as reader:
        return {name: reader.tensor(info) for name, info in found.sums.items()}


def _quantised(model: Path, folder: Path) -> tuple[Path, Path]:
    """Write a model with matrices in float8, a scale for each tile of 16 x 16; and the same in float32."""
    both = (shutil.copytree(model, folder / "float8"), shutil.copytree(model, folder / "float32"))
    stored, plain = {}, {}
    for name, weight in load_file(model / "model.safetensors").items():
        if weight.dim() < 2 or ".layers." not in name:
            stored[name] = plain[name] = weight
            continue
        rows, columns = weight.shape
        tiles = weight.view(rows // 16, 16, columns // 16, 16)
        scale = tiles.abs().amax((1, 3)) / 448
        stored[name] = (tiles / scale[:, None, :, None]).view(rows, columns).to(torch.float8_e4m3fn)
        stored[f"{name}_scale_inv"] = scale
        plain[name] = (stored[name].float().view_as(tiles) * scale[:, None, :, None]).view(rows, columns)
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [16, 16]}
    (both[0] / "config.json").write_text(json.dumps(config))
    for path, tensors in zip(both, (stored, plain), strict=True):
        save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return both


def test_statistics_of_dequantised_weights(tmp_path: Path) -> None:
    data = _texts(tmp_path / "data.jsonl", count=2)
    both = _quantised(_model(tmp_path / "model"), tmp_path)
    own, plain = (
        merganser.calibrate(each, [data], tmp_path / f"of-{each.name}", statistics=["gram", "fisher"], length=16)
        for each in both
    )
    assert own.about["without_gradients"] == own.about["without"] == []
    sums, expected = _read(own), _read(plain)
    assert sums.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(sums[name], tensor), name


def test_a_merge_with_a_quantised_model(tmp_path: Path) -> None:
    """The plan recognises its weights, and the merge with its statistics is that of the dequantised model."""
    data = _texts(tmp_path / "data.jsonl", count=2)
    other = _model(tmp_path / "model")
    both = _quantised(other, tmp_path)
    moved = {name: own + 0.05 * torch.randn_like(own) for name, own in load_file(other / "model.safetensors").items()}
    save_file(moved, other / "model.safetensors", {"format": "pt"})
    outputs = []
    for model in both:
        made = merganser.calibrate(model, [data], tmp_path / f"made-{model.name}", length=16)
        recipe = {
            "merge_method": "regmean",
            "base_model": str(other),
            "models": [
                {"model": str(model), "statistics": str(made.path)},
                {"model": str(shutil.copytree(model, tmp_path / f"copy-{model.name}")), "data": str(data)},
            ],
            "quantised": "allow",
            "dtype": "float32",
        }
        outputs.append(load_file(merganser.merge(recipe, tmp_path / f"out-{model.name}").out / "model.safetensors"))
    for name, tensor in outputs[1].items():
        assert torch.equal(outputs[0][name], tensor), name


def test_unreadable_weights_are_refused(tmp_path: Path) -> None:
    model = _model(tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "quip"}}))
    with pytest.raises(CheckpointError, match=r"quantised .*'quip' cannot be read"):
        merganser.calibrate(model, [_texts(tmp_path / "data.jsonl", count=2)], tmp_path / "out")
    assert not (tmp_path / "out").exists()
