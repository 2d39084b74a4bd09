"""Tiny dense models with a tokenizer, and recipes that make mixtures of them."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.calibration.families import save
from tests.evaluation.tiny import add_tokenizer

LAYERS = 4


def make_models(root: Path, family: str, count: int = 3) -> list[Path]:
    """Write a base and models around it; all have the base's tokenizer."""
    base = save(root / "base", family)
    add_tokenizer(base)
    weights = load_file(base / "model.safetensors")
    found = [base]
    for number in range(1, count):
        folder = root / f"m{number}"
        shutil.copytree(base, folder)
        draw = torch.Generator().manual_seed(number)
        moved = {name: w + 0.1 * torch.randn(w.shape, generator=draw) for name, w in weights.items()}
        save_file(moved, folder / "model.safetensors", {"format": "pt"})
        found.append(folder)
    return found


def recipe(base: Path, experts: list[Path], **keys: Any) -> dict[str, Any]:
    """A recipe of a mixture with random routers, unless `keys` say otherwise."""
    listed = [{"source_model": str(expert)} for expert in experts]
    return {"base_model": str(base), "gate_mode": "random", "experts": listed, **keys}


def logits(folder: Path, *, together: bool = False, **options: Any) -> torch.Tensor:
    """The logits of a few tokens; `together`: a dense model's gate and up projections are one product, as in mixtures."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
    if together:
        for layer in model.model.layers:
            layer.mlp.forward = partial(_together, layer.mlp)
    tokens = torch.tensor([[5, 9, 100, 33, 7, 250, 11]])
    with torch.no_grad():
        found: torch.Tensor = model(tokens).logits
    return found


def _together(mlp: Any, inputs: torch.Tensor) -> torch.Tensor:
    both = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])
    gate, up = torch.nn.functional.linear(inputs.flatten(0, 1), both).chunk(2, dim=-1)
    return torch.nn.functional.linear(mlp.act_fn(gate) * up, mlp.down_proj.weight).view(inputs.shape)
