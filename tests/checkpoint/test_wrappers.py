"""Names of training frameworks around those of a model."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from merganser.checkpoint import open_checkpoint
from merganser.errors import CheckpointError

NAMES = ("model.embed.weight", "model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.up_proj.weight")
WRAPPED = {
    "module.": [f"module.{name}" for name in NAMES],
    "_orig_mod.": [f"_orig_mod.{name}" for name in NAMES],
    "_forward_module.": [f"_forward_module.{name}" for name in NAMES],
    "base_model.model.": [f"base_model.model.{name}" for name in NAMES],
    "_fsdp_wrapped_module.": [name.replace("0.", "0._fsdp_wrapped_module.") for name in NAMES],
    "_checkpoint_wrapped_module.": [name.replace("mlp.", "mlp._checkpoint_wrapped_module.") for name in NAMES],
    "policy.": [f"policy.{name}" for name in NAMES],
    "model., module.": [f"module.model.{name}" for name in NAMES],
    "_orig_mod., module.": [f"module._orig_mod.{name}" for name in NAMES],
    "_fsdp_wrapped_module., _orig_mod.": [f"_fsdp_wrapped_module._orig_mod.{name}" for name in NAMES],
}


def tensors(names):
    return {name: torch.full((2, 3), float(i)) for i, name in enumerate(names)}


def write(folder, names, suffix):
    folder.mkdir()
    if suffix == "safetensors":
        save_file(tensors(names), folder / "model.safetensors")
    else:
        torch.save(tensors(names), folder / "pytorch_model.bin")
    return str(folder)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize("stripped", WRAPPED)
def test_wrappers_are_stripped_and_the_same_bytes_are_read(tmp_path, stripped, suffix):
    checkpoint = open_checkpoint(write(tmp_path / "m", WRAPPED[stripped], suffix))
    assert ", ".join(checkpoint.wrappers) == stripped
    assert sorted(checkpoint.tensors) == sorted(NAMES)
    with checkpoint.reader() as reader:
        for name, expected in tensors(NAMES).items():
            assert checkpoint.tensors[name].name == name
            assert torch.equal(reader.tensor(checkpoint.tensors[name]), expected)


@pytest.mark.parametrize(
    "names",
    [
        NAMES,
        ["module.a.weight", "b.weight"],
        ["model.model.a.weight", "model.vision.weight"],
        ["base_model.a.weight", "module_list.0.weight"],
    ],
)
def test_parts_of_a_model_that_are_called_alike_stay(tmp_path, names):
    checkpoint = open_checkpoint(write(tmp_path / "m", names, "safetensors"))
    assert checkpoint.wrappers == ()
    assert sorted(checkpoint.tensors) == sorted(names)


def test_a_name_that_is_nothing_else_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"tensor 'module\.' has no name but that of a training framework"):
        open_checkpoint(write(tmp_path / "m", ["module."], "safetensors"))


def test_two_tensors_of_one_name_are_refused(tmp_path):
    folder = write(tmp_path / "m", ["a.weight", "_orig_mod.a.weight"], "safetensors")
    with pytest.raises(
        CheckpointError, match=r"tensors '\S+' and '\S+' would both be called 'a\.weight' without the names"
    ):
        open_checkpoint(folder)
