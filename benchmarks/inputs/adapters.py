"""Merge eight adapters of rank 16 for a base in the shape of a model of 7 B into one adapter."""

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from ..merge.measure import run

COUNT, RANK, _LAYERS, _WIDTH, _INNER = 8, 16, 32, 4096, 11_008
_MODULES = {
    **dict.fromkeys(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"), (_WIDTH, _WIDTH)),
    **dict.fromkeys(("mlp.gate_proj", "mlp.up_proj"), (_INNER, _WIDTH)),
    "mlp.down_proj": (_WIDTH, _INNER),
}
SECONDS, BYTES = 10.0, 1e9
"""The bars: above the start of the program, and the peak."""

RECIPES: Mapping[str, Mapping[str, Any]] = {
    "cat": {"merge_method": "add_weighted_adapter", "parameters": {"weight": 0.125, "combination_type": "cat"}},
    "linear": {"merge_method": "linear", "parameters": {"weight": 1.0}, "rank": RANK},
    "ties": {"merge_method": "ties", "parameters": {"weight": 1.0, "density": 0.5}, "rank": RANK},
    "iso_c": {"merge_method": "iso_c", "rank": RANK},
    "lora_lego": {"merge_method": "lora_lego"},
    "robust_merge": {"merge_method": "robust_merge"},
}


def make(folder: Path, *, layers: int = _LAYERS) -> list[Path]:
    """Write the adapters, bfloat16, in the format of peft."""
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "base_model_name_or_path": "base"}
    config |= {"target_modules": [name.rpartition(".")[2] for name in _MODULES], "task_type": "CAUSAL_LM"}
    found = []
    for number in range(COUNT):
        path = folder / f"{layers}-{number}"
        found.append(path)
        if (path / "adapter_config.json").exists():
            continue
        path.mkdir(parents=True, exist_ok=True)
        draw = torch.Generator().manual_seed(number)
        tensors = {}
        for layer in range(layers):
            for module, (out, into) in _MODULES.items():
                name = f"base_model.model.model.layers.{layer}.{module}"
                tensors[f"{name}.lora_A.weight"] = torch.randn(RANK, into, generator=draw).bfloat16()
                tensors[f"{name}.lora_B.weight"] = (torch.randn(out, RANK, generator=draw) * 1e-3).bfloat16()
        save_file(tensors, path / "adapter_model.safetensors", metadata={"format": "pt"})
        (path / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
    return found


def measure(options: argparse.Namespace, _: Path) -> dict[str, Any]:
    """Merge as a process; what the same merge of one layer takes counts as the start of the program."""
    folder = options.folder / "adapters"
    rows = {}
    for name in options.methods:
        taken = {}
        for layers in (1, _LAYERS):
            recipe = {**RECIPES[name], "models": [{"model": str(path)} for path in make(folder, layers=layers)]}
            file = folder / "recipe.json"
            file.write_text(json.dumps(recipe), encoding="utf-8")
            command = [
                sys.executable,
                "-m",
                "merganser",
                "merge",
                str(file),
                str(folder / "out"),
                "--overwrite",
                "--quiet",
            ]
            taken[layers] = run(command, folder / "log.txt")
        start, whole = taken[1], taken[_LAYERS]
        rows[name] = {
            "cpu_seconds": whole.cpu_seconds,
            "seconds": whole.seconds,
            "cpu_seconds_of_one_layer": start.cpu_seconds,
            "seconds_of_one_layer": start.seconds,
            "cpu_seconds_above": whole.cpu_seconds - start.cpu_seconds,
            "seconds_above": whole.seconds - start.seconds,
            "peak_mb": whole.peak_bytes / 1e6,
            "elsewhere": whole.elsewhere,
        }
        sys.stdout.write(f"{name}: {json.dumps(rows[name])}\n")
        sys.stdout.flush()
    return {
        "adapters": COUNT,
        "rank": RANK,
        "layers": _LAYERS,
        "bars": {"seconds": SECONDS, "bytes": BYTES},
        "methods": rows,
    }
