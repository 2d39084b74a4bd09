"""`merganser inspect`: a checkpoint described from its headers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from merganser import inspect
from merganser.errors import NotFoundError
from tests.cli.tiny import CONFIG, run, state, write


def test_inspect(models: Path) -> None:
    found = run("inspect", "a")
    size = (models / "a" / "model.safetensors").stat().st_size
    assert (found.code, found.err) == (0, "")
    assert found.out == (
        "ArceeForCausalLM · 19 tensors, 1,576 parameters, 3.15 KB\n"
        "  folder       a\n"
        "  layers       2 (model.layers)\n"
        "  vocabulary   32\n"
        "  tied         nothing\n"
        "  quantised    no\n"
        "  other files  tokenizer.json\n"
        "dtypes\n"
        "  bfloat16  19 tensors  1,576 parameters\n"
        "roles\n"
        "  attention  8 tensors  512 parameters\n"
        "  mlp        4 tensors  512 parameters\n"
        "  embedding   1 tensor  256 parameters\n"
        "  head        1 tensor  256 parameters\n"
        "  norm       5 tensors   40 parameters\n"
        "files\n"
        f"  model.safetensors  19 tensors  {size / 1000:.2f} KB\n"
    )


def test_every_tensor(models: Path) -> None:
    rows = [line.split() for line in run("inspect", "a", "--tensors").out.splitlines()]
    for name in state(0):
        assert [row for row in rows if row[0] == name]
    assert ["model.norm.weight", "[8]", "bfloat16", "norm", "model.safetensors"] in rows


def test_json(models: Path) -> None:
    found = run("inspect", "a", "--json").json
    assert found["tensors"] == 19
    assert found["roles"]["mlp"] == {"tensors": 4, "parameters": 512}
    assert found["stacks"] == {"model.layers": 2}
    every = run("inspect", "a", "--json", "--tensors").json["tensors"]
    assert {entry["name"] for entry in every} == set(state(0))
    assert {entry["layer"] for entry in every if entry["role"] == "mlp"} == {0, 1}


def test_ties_mixed_dtypes_and_buffers(tmp_path: Path) -> None:
    tensors = state(0, tied=True) | {"model.ids": torch.arange(4), "model.norm.weight": torch.ones(8)}
    write(tmp_path / "m", tensors, tie_word_embeddings=True)
    found = inspect(tmp_path / "m")
    assert found.tied == [("lm_head.weight", "model.embed_tokens.weight")]
    assert {name: share.tensors for name, share in found.dtypes.items()} == {"bfloat16": 17, "float32": 1, "int64": 1}
    assert found.parameters == 1576 - 256
    assert found.warnings == []


def test_warnings(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", state(0), tie_word_embeddings=True, num_hidden_layers=7, vocab_size=40)
    (folder / "modeling.py").touch()
    found = run("inspect", folder)
    assert found.out.partition("warnings\n")[2] == (
        "  config.json says 7 layers, the tensors have 2\n"
        "  config.json says a vocabulary of 40, the embedding has 32 rows\n"
        "  config.json says that the head is tied, and the files hold lm_head.weight\n"
        "  modeling.py: code that comes with the model; merganser never runs it\n"
    )


def test_quantised_and_pickled(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    folder.mkdir()
    torch.save(state(0), folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps(CONFIG | {"quantization_config": {"quant_method": "fp8"}}))
    found = inspect(folder)
    assert found.quantised == "fp8 (config.json quantization_config.quant_method)"
    assert [warning.partition(" ")[0] for warning in found.warnings] == ["its", "pytorch_model.bin:"]


def test_no_config(tmp_path: Path) -> None:
    folder = write(tmp_path / "m", state(0))
    (folder / "config.json").unlink()
    found = run("inspect", folder / "model.safetensors")
    assert found.out.startswith("unknown architecture · 19 tensors")
    assert "there is no config.json" in found.out


def test_not_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for reference in ("./nothing", "./no@thing", "nothing.safetensors"):
        found = run("inspect", reference)
        assert found.code == 2
        assert found.err.startswith(f"error: model {reference!r} not found: no such file or folder")
        assert not found.out


def test_revision_is_told_from_the_id() -> None:
    with pytest.raises(NotFoundError, match=r"model 'org/name' not found: .* at revision 'v1'"):
        inspect("org/name@v1")


def test_a_folder_with_an_at_sign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "m@2", state(0))
    assert inspect("m@2").layers == 2


def test_no_torch_is_needed(models: Path) -> None:
    text = "import sys; from merganser.cli import main\ntry: main(['inspect', 'a'])\nfinally: print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"
