"""Files of trainers: the weights lie beside the state of the training, under names of the trainer's own."""

from __future__ import annotations

import argparse
import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

import merganser
from merganser.checkpoint import open_checkpoint
from merganser.checkpoint.files.weights import choose_weights
from merganser.errors import CheckpointError
from tests.checkpoint.quantised.making import values
from tests.making import assert_equal, llama, llama_config, read_model, write_model

LLAMA = llama(0)


def write(folder: Path, state: dict[str, torch.Tensor], name: str = "epoch=3-step=10.ckpt", **more: Any) -> Path:
    """Write what PyTorch Lightning writes: weights, the optimizer's moments, loops and callbacks."""
    folder.mkdir(exist_ok=True)
    training = {
        "epoch": 3,
        "global_step": 10,
        "pytorch-lightning_version": "2.5.0",
        "loops": {"fit_loop": {"state_dict": {}}},
        "callbacks": {"ModelCheckpoint{}": {"best_model_score": torch.tensor(0.5), "best_model_path": "x"}},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]}],
        "lr_schedulers": [],
    }
    torch.save({**training, "state_dict": OrderedDict(state), **more}, folder / name)
    (folder / "config.json").write_text(json.dumps(llama_config()))
    return folder / name


def under(prefix: str) -> dict[str, torch.Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in LLAMA.items()}


@pytest.mark.parametrize(
    ("prefix", "stripped"),
    [
        ("", ()),
        ("model.", ("model.",)),
        ("net.", ("net.",)),
        ("net.lm.", ("net.lm.",)),
        ("model._orig_mod.", ("model._orig_mod.",)),
    ],
)
def test_lightning(prefix: str, stripped: tuple[str, ...], tmp_path: Path) -> None:
    file = write(tmp_path / "a", under(prefix))
    for reference in (file, file.parent):
        checkpoint = open_checkpoint(str(reference))
        assert checkpoint.wrappers == stripped
        assert checkpoint.config["model_type"] == "llama"
        assert_equal(values(checkpoint), LLAMA)


def test_other_models(tmp_path: Path) -> None:
    """Names of GPT-2 under a name of the trainer; a tied Llama's own first name is not a trainer's."""
    gpt2 = {"transformer.wte.weight": torch.ones(4, 2), "transformer.h.0.attn.c_attn.weight": torch.ones(2, 6)}
    file = write(tmp_path / "a", {f"model.{name}": tensor for name, tensor in gpt2.items()})
    assert open_checkpoint(str(file)).tensors.keys() == gpt2.keys()
    tied = {name: tensor for name, tensor in LLAMA.items() if not name.startswith("lm_head")}
    assert open_checkpoint(str(write(tmp_path / "b", tied))).tensors.keys() == tied.keys()


def test_a_wrapped_state_dict_of_another_ending(tmp_path: Path) -> None:
    torch.save({"model_state_dict": under("backbone."), "epoch": 3}, tmp_path / "last.pt")
    assert open_checkpoint(str(tmp_path / "last.pt")).tensors.keys() == LLAMA.keys()
    # alone, the same names may be the model's own
    torch.save(under("backbone."), tmp_path / "own.pt")
    assert open_checkpoint(str(tmp_path / "own.pt")).tensors.keys() == under("backbone.").keys()
    parts = {**under("language_model."), "vision_tower.weight": torch.ones(2)}
    torch.save({"state_dict": parts}, tmp_path / "parts.pt")
    assert open_checkpoint(str(tmp_path / "parts.pt")).tensors.keys() == parts.keys()


def test_a_merge_of_a_checkpoint_of_lightning(tmp_path: Path) -> None:
    one = write(tmp_path / "a", under("net."))
    two = write_model(tmp_path / "b", llama(1), llama_config())
    recipe = {"merge_method": "linear", "models": [{"model": str(one.parent)}, {"model": str(two)}]}
    merganser.merge({**recipe, "parameters": {"weight": 0.5}}, tmp_path / "out")
    found, other = read_model(tmp_path / "out"), llama(1)
    torch.testing.assert_close(found, {name: (tensor + other[name]) / 2 for name, tensor in LLAMA.items()})


def run(message: str) -> None:
    """Run the program that a message gives, in the current folder."""
    exec(message.partition('python -c "')[2].rstrip('"'), {})


def test_the_command_for_what_is_beside_the_model_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / "a", {**under("net."), "metric.total": torch.ones(1)})
    with pytest.raises(
        CheckpointError, match=r"the model is under 'net\.', and beside it are metric\.total; take"
    ) as caught:
        open_checkpoint(str(file))
    monkeypatch.chdir(file.parent)
    run(str(caught.value))
    assert_equal(values(open_checkpoint(str(file.parent))), LLAMA)


def test_the_command_for_other_objects_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings of the training that only code can make are never read, and the answer says how to go on."""
    file = write(tmp_path / "a", LLAMA, hyper_parameters=argparse.Namespace(lr=0.1))
    with pytest.raises(
        CheckpointError, match=r"ckpt: cannot be read without running code .* if you trust who"
    ) as caught:
        open_checkpoint(str(file.parent))
    monkeypatch.chdir(file.parent)
    run(str(caught.value))
    assert_equal(values(open_checkpoint(str(file.parent))), LLAMA)


def test_damage_and_choice(tmp_path: Path) -> None:
    (tmp_path / "x.ckpt").write_bytes(b"PK\x03\x04" + b"x" * 99)
    with pytest.raises(CheckpointError, match=r"or is damaged .*; convert it to safetensors"):
        open_checkpoint(str(tmp_path / "x.ckpt"))
    with pytest.raises(CheckpointError, match=r"2 weight files and no index, .*: epoch=3\.ckpt, last\.ckpt; remove"):
        choose_weights("m", ["last.ckpt", "epoch=3.ckpt"])
    for better in ("model.safetensors", "pytorch_model.bin", "x.pt"):
        assert choose_weights("m", ["last.ckpt", better]).files == (better,)
