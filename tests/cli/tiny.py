"""Models of two layers, without a gate in the MLP, recipes over them, and the command in this process."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import typer.testing
import yaml
from safetensors.torch import save_file
from typer.testing import CliRunner

from merganser.cli import make_app

# making the commands of all verbs takes longer than running most of them
typer.testing._get_command = lru_cache(typer.testing._get_command)  # type: ignore[attr-defined]

CONFIG: dict[str, Any] = {
    "architectures": ["ArceeForCausalLM"],
    "model_type": "arcee",
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 32,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


def state(
    seed: int, layers: int = 2, vocab: int = 32, width: int = 8, tied: bool = False, dtype: torch.dtype = torch.bfloat16
) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    tensors = {"model.embed_tokens.weight": draw(vocab, width), "model.norm.weight": draw(width)}
    if not tied:
        tensors["lm_head.weight"] = draw(vocab, width)
    for i in range(layers):
        layer = f"model.layers.{i}."
        for name in ("q", "k", "v", "o"):
            tensors[f"{layer}self_attn.{name}_proj.weight"] = draw(width, width)
        tensors[f"{layer}mlp.up_proj.weight"] = draw(16, width)
        tensors[f"{layer}mlp.down_proj.weight"] = draw(width, 16)
        tensors[f"{layer}input_layernorm.weight"] = draw(width)
        tensors[f"{layer}post_attention_layernorm.weight"] = draw(width)
    return tensors


def write(folder: Path, tensors: dict[str, torch.Tensor], **config: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    (folder / "tokenizer.json").write_text("{}")
    return folder


def recipe(file: Path, *documents: dict[str, Any]) -> Path:
    file.write_text(yaml.safe_dump_all(documents, sort_keys=False))
    return file


def linear(*models: str, **more: Any) -> dict[str, Any]:
    return {
        "merge_method": "linear",
        "models": [{"model": model, "parameters": {"weight": 1.0}} for model in models],
        **more,
    }


class Output:
    """What a command did.

    Args:
        code: Exit code.
        out: What it printed to stdout.
        err: What it printed to stderr.
    """

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def json(self) -> Any:
        return json.loads(self.out)


def run(*arguments: object) -> Output:
    """Run `merganser` in this process."""
    given = [str(argument) for argument in arguments]
    result = CliRunner().invoke(make_app(given[0] if given else None), given, prog_name="merganser")
    return Output(result.exit_code, result.stdout, result.stderr)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())
