"""Exporting sidecars as adapters: what peft loads is what `restore` writes, and what is refused."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from merganser import merge, restore
from merganser.engine.adapters.export import export_adapters
from merganser.errors import CheckpointError, NotFoundError, OutputError, UnsupportedError
from merganser.record.verification import verify
from tests.cli.tiny import run
from tests.evaluation.tiny import load, make_model

IDS = torch.tensor([[5, 9, 30, 41], [7, 100, 3, 60]])


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("export")
    make_model(root / "base", 0)
    make_model(root / "tied", 0, tie_word_embeddings=True)
    for seed, name in enumerate("ab", 1):
        make_model(root / name, seed, like=root / "base")
        make_model(root / f"tied-{name}", seed, like=root / "tied", tie_word_embeddings=True)
    return root


def merged(root: Path, method: str, prefix: str = "", base: str = "base", **parameters: Any) -> Path:
    out = root / "-".join([method, base, *(str(value) for value in parameters.values())])
    if not out.exists():
        models = [{"model": str(root / f"{prefix}{name}"), "name": name} for name in "ab"]
        recipe = {"merge_method": method, "base_model": str(root / base), "models": models, "parameters": parameters}
        merge(recipe, out)
    return out


def loaded(start: Path, adapter: Path) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return what the model with its adapter computes, and its weights with the adapter merged into them."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32)
    with torch.inference_mode(), warnings.catch_warnings():
        # peft asks for attributes of transformers that are deprecated, and warns of tied weights
        warnings.simplefilter("ignore")
        adapted = PeftModel.from_pretrained(model, adapter)
        logits = adapted(input_ids=IDS).logits
        return logits, dict(adapted.merge_and_unload().state_dict())


@pytest.mark.parametrize(
    ("method", "parameters", "start", "prefix", "base"),
    [
        ("twin", {"rank": 0.5}, "out", "", "base"),
        ("twin", {"rank": 0.25, "embeddings": "matrix"}, "out", "tied-", "tied"),
        ("twin", {"rank": 0.25, "others": "own"}, "out", "tied-", "tied"),
        ("skillpack", {"rank": 0.5}, "base", "", "base"),
        ("skillpack", {"rank": 0.5, "origin": "merged", "others": "merged"}, "out", "", "base"),
    ],
)
def test_peft_loads_what_restore_writes(
    models: Path, tmp_path: Path, method: str, parameters: dict[str, Any], start: str, prefix: str, base: str
) -> None:
    out = merged(models, method, prefix, base, **parameters)
    found = export_adapters(out, tmp_path / "adapters")
    assert [each.task for each in found] == ["a", "b"]
    each = found[1]
    assert verify(each.out).ok
    model = out if start == "out" else models / base
    assert each.record["exported"]["base"] == str(model)
    restored = load_file(restore(out, "b", tmp_path / "restored").out / "model.safetensors")
    of_start = load_file(model / "model.safetensors")
    logits, state = loaded(model, each.out)
    with torch.inference_mode():
        expected = load(tmp_path / "restored")[0](input_ids=IDS).logits
    assert torch.allclose(logits, expected, atol=1e-4)
    stated = {entry["tensor"]: entry for entry in each.record["changes"]}
    tied = each.record["exported"]["tied_in_factors"]
    assert bool(tied) == (parameters.get("embeddings") == "matrix")
    for name, tensor in restored.items():
        if tied and name == "model.embed_tokens.weight":
            continue  # merging the adapter adds both factors to the tied tensor
        change = torch.linalg.vector_norm(tensor - of_start[name])
        error = float(torch.linalg.vector_norm(state[name] - tensor) / change) if change else 0.0
        assert error <= stated.get(name, {"relative_error": 0})["relative_error"] + 1e-6, name
        assert (name in stated) == (not tensor.equal(of_start[name]))
    assert {entry["kept"] for entry in stated.values()} <= {"factored", "saved"}
    assert each.record["exported"]["error"] < 1e-5
    if base == "tied" and not tied:
        assert state["lm_head.weight"].allclose(restored["model.embed_tokens.weight"], atol=1e-5)


def test_what_no_adapter_can_hold_is_refused(models: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"emr stores no low-rank factors.*merganser restore.*merganser extract"):
        export_adapters(merged(models, "emr"), tmp_path / "x")
    out = merged(models, "twin", rank=0.5)
    with pytest.raises(NotFoundError, match="'c'"):
        export_adapters(out, tmp_path / "x", tasks=["c"])
    with pytest.raises(NotFoundError, match=r"no sidecars|no merge.json"):
        export_adapters(models / "base", tmp_path / "x")
    with pytest.raises(OutputError, match="lies in"):
        export_adapters(out, out / "adapters")
    with pytest.raises(CheckpointError, match="no factors above rank 0"):
        export_adapters(merged(models, "twin", rank=0.0), tmp_path / "x")
    (tmp_path / "x" / "b").mkdir(parents=True)
    (tmp_path / "x" / "b" / "mine").write_text("notes")
    with pytest.raises(OutputError, match="exists"):
        export_adapters(out, tmp_path / "x")
    assert not (tmp_path / "x" / "a").exists()


def test_command(models: Path, tmp_path: Path) -> None:
    out = merged(models, "twin", rank=0.5)
    found = run("export", out, "--to", "peft", tmp_path / "x", "--task", "b")
    assert found.code == 0, found
    assert "1 adapter of" in found.out
    assert "vLLM loads adapters of factors alone: for it, merge with others: merged" in found.out
    assert sorted(path.name for path in (tmp_path / "x").iterdir()) == ["b"]
    assert run("export", out, tmp_path / "x", "--task", "b", "--overwrite", "--quiet").code == 0
    assert run("export", out, tmp_path / "x", "--to", "gguf").code == 2
