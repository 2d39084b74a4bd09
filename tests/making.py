"""Small checkpoints of Llama's shape, with random weights, and recipes that merge them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from merganser import catalogue
from merganser.method import MergeMethod, registry
from merganser.recipe import names

Tensors = dict[str, torch.Tensor]

VOCAB, HIDDEN, INNER = 32, 16, 24

SIDE_FILES = {
    "tokenizer.json": '{"version": "1.0"}',
    "tokenizer_config.json": "{}",
    "generation_config.json": '{"do_sample": false}',
    "chat_template.jinja": "{{ messages }}",
    "LICENSE": "free",
    "modeling_own.py": "raise SystemExit('this must not run')",
}
"""Files that an output must have from its donor."""

OTHER_FILES = {
    "README.md": "mine",
    "trainer_state.json": "{}",
    "optimizer.pt": "",
    "pytorch_model.bin.index.json.bak": "",
}
"""Files that describe the donor alone."""


def llama_config(layers: int = 2, *, tied: bool = False, vocab: int = VOCAB, hidden: int = HIDDEN) -> dict[str, Any]:
    """config.json as transformers writes it."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": INNER,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 64,
        "tie_word_embeddings": tied,
        "torch_dtype": "float32",
    }


def llama(
    seed: int,
    layers: int = 2,
    *,
    dtype: torch.dtype = torch.float32,
    head: bool = True,
    vocab: int = VOCAB,
    hidden: int = HIDDEN,
) -> Tensors:
    """Weights of standard deviation 0.1; the same seed gives the same numbers in any dtype, up to rounding."""
    generator = torch.Generator().manual_seed(seed)

    def weight(*shape: int) -> torch.Tensor:
        return (torch.randn(shape, generator=generator, dtype=torch.float64) * 0.1).to(dtype)

    tensors = {"model.embed_tokens.weight": weight(vocab, hidden)}
    for i in range(layers):
        prefix = f"model.layers.{i}"
        tensors[f"{prefix}.input_layernorm.weight"] = 1 + weight(hidden)
        tensors[f"{prefix}.self_attn.q_proj.weight"] = weight(hidden, hidden)
        tensors[f"{prefix}.self_attn.k_proj.weight"] = weight(hidden // 2, hidden)
        tensors[f"{prefix}.self_attn.v_proj.weight"] = weight(hidden // 2, hidden)
        tensors[f"{prefix}.self_attn.o_proj.weight"] = weight(hidden, hidden)
        tensors[f"{prefix}.post_attention_layernorm.weight"] = 1 + weight(hidden)
        tensors[f"{prefix}.mlp.gate_proj.weight"] = weight(INNER, hidden)
        tensors[f"{prefix}.mlp.up_proj.weight"] = weight(INNER, hidden)
        tensors[f"{prefix}.mlp.down_proj.weight"] = weight(hidden, INNER)
    tensors["model.norm.weight"] = 1 + weight(hidden)
    if head:
        tensors["lm_head.weight"] = weight(vocab, hidden)
    return tensors


def write_model(
    folder: Path,
    tensors: Tensors,
    config: Mapping[str, Any] | None = None,
    *,
    shards: int = 1,
    side_files: Mapping[str, str] | None = None,
) -> Path:
    """Write a checkpoint, its tensors divided in order among this many files."""
    folder.mkdir(parents=True)
    names = list(tensors)
    cuts = [round(i * len(names) / shards) for i in range(shards + 1)]
    weight_map = {}
    for i in range(shards):
        file = "model.safetensors" if shards == 1 else f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[cuts[i] : cuts[i + 1]]}
        save_file(part, folder / file, {"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    if shards > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    if config:
        (folder / "config.json").write_text(json.dumps(config))
    for name, text in (side_files or {}).items():
        (folder / name).write_text(text)
    return folder


def write_llamas(root: Path, n: int = 3, layers: int = 2, **options: Any) -> list[Path]:
    """Write models with the seeds 0, 1, ..."""
    config = llama_config(layers, **{key: options[key] for key in ("vocab", "hidden") if key in options})
    return [
        write_model(root / f"m{seed}", llama(seed, layers, **options), config, shards=1 + seed % 2) for seed in range(n)
    ]


def make_recipe(
    method: str,
    models: Sequence[Path | tuple[Path, Mapping[str, Any]]],
    base: Path | None = None,
    parameters: Mapping[str, Any] | None = None,
    **keys: Any,
) -> dict[str, Any]:
    """A recipe of `models`; a pair gives a model its own parameters."""
    listed: list[dict[str, Any]] = []
    for entry in models:
        path, own = entry if isinstance(entry, tuple) else (entry, None)
        listed.append({"model": str(path), **({"parameters": dict(own)} if own else {})})
    recipe: dict[str, Any] = {"merge_method": method, "models": listed, **keys}
    if base is not None:
        recipe["base_model"] = str(base)
    if parameters:
        recipe["parameters"] = dict(parameters)
    return recipe


def write_statistics(
    folder: Path,
    means: Mapping[str, Tensors],
    inputs: str = "own",
    *,
    loss: float | None = None,
    losses: Sequence[float] | None = None,
) -> Path:
    """Write statistics of one token: by the tensor's name, its means by the name of the statistic; and the loss.

    `losses` are those of single sequences.
    """
    folder.mkdir(parents=True)
    kinds = list(dict.fromkeys(kind for each in means.values() for kind in each))
    of_inputs = [
        kind for kind in kinds if kind in ("gram", "cross_gram", "second_moment", "magnitude", "coefficients", "groups")
    ]
    sums = {f"{kind}/{name}": own.contiguous() for name, each in means.items() for kind, own in each.items()}
    sums |= {f"count/{name}": torch.tensor(1) for name in means} if of_inputs else {}
    if len(of_inputs) < len(kinds) or loss is not None or losses is not None:
        kinds.append("loss")
        sums |= {"loss": torch.tensor(loss or 0.0, dtype=torch.float64), "predictions": torch.tensor(1)}
    if losses is not None:
        sums["losses"] = torch.tensor(losses, dtype=torch.float64)
    save_file(sums, folder / "s.safetensors")
    about = {
        "kind": "statistics",
        "format": 1,
        "statistics": ["count", *kinds],
        "inputs": inputs,
        "model": {"reference": "made up", "hash": "made up"},
        "tokenizer": "",
        "parts": [{"sequences": 1, "tokens": 1, "counted": 1, "data": []}],
        "files": ["s.safetensors"],
        "tensors": {name: {"axis": 1, "stored": name} for name in means} if of_inputs else {},
        "gradients": {name: [kind for kind in each if kind not in of_inputs] for name, each in means.items()},
    }
    (folder / "statistics.json").write_text(json.dumps(about))
    return folder


def register(patch: pytest.MonkeyPatch, **methods: MergeMethod) -> None:
    """Let recipes name these methods, too, as if a package had registered them."""
    points = {name: SimpleNamespace(load=lambda name=name: methods[name], value=name) for name in methods}
    for module in (catalogue, registry, names):
        patch.setattr(module, "third_party", lambda: points)


def read_model(folder: Path) -> Tensors:
    """All tensors of a checkpoint."""
    tensors: Tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors.update(load_file(file))
    return tensors


def read_files(folder: Path) -> dict[str, bytes]:
    """The weights and the files beside them, but not what tells the time."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "merge.json"
    }


def read_json(folder: Path, name: str) -> Any:
    return json.loads((folder / name).read_text())


def assert_equal(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    """Names, dtypes, shapes and bits are the same."""
    assert sorted(found) == sorted(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        same = torch.equal(
            found[name].contiguous().view(-1).view(torch.uint8), tensor.contiguous().view(-1).view(torch.uint8)
        )
        assert same, name
