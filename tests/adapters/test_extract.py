"""Extracting adapters: the error of the truncated decomposition, what peft loads, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from merganser.adapters import open_adapter
from merganser.engine.adapters.extract import extract
from merganser.errors import CheckpointError, MergeError, NonFiniteError, OutputError, UnsupportedError
from merganser.record.verification import verify
from tests.adapters.test_apply import applied
from tests.cli.tiny import names, run
from tests.making import HIDDEN, Tensors, llama, llama_config, read_json, write_model

UP = "model.layers.0.mlp.up_proj.weight"


def truncated(delta: torch.Tensor, rank: int) -> torch.Tensor:
    left, values, right = torch.linalg.svd(delta.double(), full_matrices=False)
    return left[:, :rank] * values[:rank] @ right[:rank]


def matrices(names: Tensors) -> list[str]:
    return [name for name in names if "_proj" in name]


@pytest.fixture
def models(tmp_path: Path) -> Path:
    write_model(tmp_path / "base", llama(0), llama_config())
    write_model(tmp_path / "tuned", llama(1), llama_config())
    return tmp_path


@pytest.mark.parametrize("rank", [1, 5, 100])
def test_error_of_the_truncated_decomposition(models: Path, rank: int) -> None:
    record = extract(models / "tuned", models / "base", models / "out", rank=rank).record
    assert all(file.problem is None for file in verify(models / "out").files)
    found, base, tuned = applied(models / "out", models / "base"), llama(0), llama(1)
    squares = norms = 0.0
    for name in base:
        delta = (tuned[name] - base[name]).double()
        wanted = truncated(delta, rank) if name in matrices(base) else delta
        best = (delta - wanted).norm()
        left = (tuned[name].double() - found[name].double()).norm()
        torch.testing.assert_close(left, best, rtol=1e-5, atol=1e-6)
        squares, norms = squares + float(left**2), norms + float(delta.norm() ** 2)
    assert record["extracted"]["error"] == pytest.approx((squares / norms) ** 0.5, rel=1e-4, abs=1e-6)
    assert record["extracted"]["factored"] == 14
    assert open_adapter(str(models / "out")).ranks == [rank]


def test_energy(models: Path) -> None:
    extract(models / "tuned", models / "base", models / "out", energy=0.9)
    adapter = open_adapter(str(models / "out"))
    assert len(adapter.ranks) > 1
    for module, change in adapter.changes.items():
        delta = (llama(1)[f"{module}.weight"] - llama(0)[f"{module}.weight"]).double()
        squares = torch.linalg.svdvals(delta) ** 2
        share = squares.cumsum(0) / squares.sum()
        assert share[change.rank - 1] >= 0.9 - 1e-6
        assert change.rank == 1 or share[change.rank - 2] < 0.9


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("embeddings", ["save", "low-rank"])
def test_peft_loads_it(tmp_path: Path, tied: bool, embeddings: Any) -> None:
    """At full rank the model with the adapter is the fine-tune; biases, norms, embeddings and head included."""
    import peft
    from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=24, hidden_size=16, intermediate_size=20, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=tied,
    )  # fmt: skip
    tokens = torch.arange(9)[None]
    logits = []
    for seed, name in enumerate(["base", "tuned"]):
        torch.manual_seed(seed)
        model = Qwen2ForCausalLM(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.3 * torch.randn(parameter.shape))
        model.save_pretrained(tmp_path / name)
        logits.append(model(tokens).logits)
    extract(tmp_path / "tuned", tmp_path / "base", tmp_path / "out", rank=24, embeddings=embeddings)
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "out").eval()
    torch.testing.assert_close(loaded(tokens).logits, logits[1], rtol=1e-4, atol=1e-4)
    assert (logits[1] - logits[0]).abs().max() > 0.1
    found = applied(tmp_path / "out", tmp_path / "base")
    own = Qwen2ForCausalLM(Qwen2Config(**{**config.to_dict(), "tie_word_embeddings": False})).eval()
    own.load_state_dict(found)
    torch.testing.assert_close(own(tokens).logits, logits[1], rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_weights_kept_transposed(tmp_path: Path) -> None:
    import peft
    from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

    tokens = torch.arange(5)[None]
    for seed, name in enumerate(["base", "tuned"]):
        torch.manual_seed(seed)
        model = GPT2LMHeadModel(GPT2Config(vocab_size=24, n_positions=16, n_embd=8, n_layer=1, n_head=2)).eval()
        model.save_pretrained(tmp_path / name)
    expected = model(tokens).logits
    extract(tmp_path / "tuned", tmp_path / "base", tmp_path / "out", rank=32)
    loaded = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "out")
    torch.testing.assert_close(loaded.eval()(tokens).logits, expected, rtol=1e-4, atol=1e-4)


def test_only_what_changed(tmp_path: Path) -> None:
    write_model(tmp_path / "base", llama(0), llama_config())
    changed = llama(0) | {UP: llama(1)[UP], "model.norm.weight": llama(1)["model.norm.weight"]}
    write_model(tmp_path / "tuned", changed, llama_config())
    kept = extract(tmp_path / "tuned", tmp_path / "base", tmp_path / "out", rank=2).record["extracted"]
    assert (kept["factored"], kept["saved"], kept["dropped"]) == (1, ["model.norm.weight"], [])
    config = read_json(tmp_path / "out", "adapter_config.json")
    # of two up_proj one is changed, so its whole name stands there
    assert config["target_modules"] == [UP.removesuffix(".weight")]
    assert config["modules_to_save"] == ["model.norm"]
    extract(tmp_path / "tuned", tmp_path / "base", tmp_path / "bare", rank=2, others="drop", dtype="bfloat16")
    adapter = open_adapter(str(tmp_path / "bare"))
    assert not adapter.replaced
    assert {tensor.dtype.name for tensor in adapter.tensors} == {"bfloat16"}


@pytest.mark.parametrize(
    ("tuned", "config", "kind", "message"),
    [
        (llama(0), {}, CheckpointError, "hold the same values; there is nothing to extract"),
        (llama(0) | {"model.norm.weight": torch.zeros(HIDDEN)}, {}, CheckpointError, "no matrix differs from"),
        (llama(1, layers=1), {}, CheckpointError, r"do not hold the same tensors; 9 only in .*base"),
        (
            llama(1, vocab=40),
            {"vocab_size": 40},
            CheckpointError,
            r"shapes differ: \[40, 16\] in .*tuned, \[32, 16\] in",
        ),
        (llama(1) | {UP: torch.full((24, 16), torch.nan)}, {}, NonFiniteError, f"{UP}: one of the models holds NaN"),
        (llama(1), {"tie_word_embeddings": True}, CheckpointError, "the head is tied in one of them only"),
        (llama(1) | {UP: torch.zeros(24, 16, dtype=torch.int32)}, {}, CheckpointError, f"{UP}: int32 in"),
    ],
)
def test_refused(tmp_path: Path, tuned: Tensors, config: dict[str, Any], kind: type[MergeError], message: str) -> None:
    write_model(tmp_path / "base", llama(0), llama_config())
    write_model(tmp_path / "tuned", tuned, llama_config() | config)
    with pytest.raises(kind, match=message):
        extract(tmp_path / "tuned", tmp_path / "base", tmp_path / "out", rank=2)
    assert names(tmp_path) == ["base", "tuned"]


def test_packed_experts_are_not_factored(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.experts.gate_up_proj"
    for seed, folder in enumerate(["base", "tuned"]):
        write_model(tmp_path / folder, llama(seed) | {name: torch.full((2, 4, 4), float(seed))}, llama_config())
    with pytest.raises(UnsupportedError, match=rf"{name}: is \[2, 4, 4\] and differs .* only matrices can be factored"):
        extract(tmp_path / "tuned", tmp_path / "base", tmp_path / "out", rank=2)
    found = extract(tmp_path / "tuned", tmp_path / "base", tmp_path / "out", rank=2, others="drop")
    assert name in found.record["extracted"]["dropped"]


def test_nothing_of_others_is_replaced(models: Path) -> None:
    (models / "out").mkdir()
    (models / "out" / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match="out: exists"):
        extract(models / "tuned", models / "base", models / "out", rank=2)
    with pytest.raises(OutputError, match=r"mine\.txt"):
        extract(models / "tuned", models / "base", models / "out", rank=2, overwrite=True)
    with pytest.raises(OutputError, match="an input, is in this folder"):
        extract(models / "tuned", models / "base", models / "base", rank=2, overwrite=True)
    assert names(models / "out") == ["mine.txt"]


KILLED = """
import os, sys
from merganser.engine.output.staging import Staging
from merganser.engine.adapters.extract import extract
setattr(Staging, sys.argv[1], lambda *_: os._exit(9))
extract("tuned", "base", "out", rank=2)
"""


@pytest.mark.parametrize("moment", ["write", "publish"])
def test_a_killed_run_leaves_nothing_that_looks_complete(models: Path, moment: str) -> None:
    ended = subprocess.run([sys.executable, "-c", KILLED, moment], cwd=models, check=False)
    assert ended.returncode == 9
    assert not (models / "out").exists()
    extract(models / "tuned", models / "base", models / "out", rank=2)
    assert all(file.problem is None for file in verify(models / "out").files)
    assert names(models) == ["base", "out", "tuned"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "extract: give --rank N or --energy X"),
        (["--rank", "2", "--energy", "0.5"], "extract: give --rank N or --energy X, not both"),
        (["--energy", "1.5"], "extract: --energy: must be above 0 and at most 1, got 1.5"),
        (["--energy", "nan"], "extract: --energy: must be above 0 and at most 1, got nan"),
        (["--rank", "2", "--others", "low-rank"], "--others: must be one of save, drop, got 'low-rank'"),
        (["--rank", "2", "--dtype", "int8"], "--dtype: must be one of float32, bfloat16, float16, got 'int8'"),
    ],
)
def test_options(models: Path, options: list[str], message: str) -> None:
    found = run("extract", str(models / "tuned"), "--base", str(models / "base"), "--out", str(models / "o"), *options)
    assert found.code == 2
    assert message in found.err


def test_command(models: Path) -> None:
    arguments = ["extract", str(models / "tuned"), "--base", str(models / "base"), "--out", str(models / "out")]
    found = run(*arguments, "--rank", "4")
    assert found.code == 0
    assert found.out.startswith("14 weights in factors of rank 4 · ")
    assert "stored whole: lm_head.weight, model.embed_tokens.weight, model.layers.0" in found.out
    assert "vLLM loads adapters of factors alone: for it, --others drop, and --embeddings low-rank or drop" in found.out
    again = run(*arguments, "--energy", "0.5", "--overwrite", "--json")
    assert json.loads(again.out)["record"]["extracted"]["energy"] == 0.5
    assert (
        run("report", str(models / "out")).err
        == f"error: {models / 'out'}: holds an adapter; a report is drawn of merged models\n"
    )
