"""What a checkpoint holds beside its weights, and whether its weights are quantised."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from merganser.checkpoint import open_checkpoint
from merganser.errors import CheckpointError
from tests.checkpoint.making import Tensors, put, some_tensors, write_shards

A: Tensors = {"a": torch.arange(4.0)}

SIDE = [
    "LICENSE", "LICENSE.txt", "NOTICE", "USE_POLICY.md", "added_tokens.json", "additional_chat_templates/tool.jinja",
    "chat_template.jinja", "configuration_my.py", "generation_config.json", "merges.txt", "modeling_my.py",
    "preprocessor_config.json", "processor_config.json", "qwen.tiktoken", "sentencepiece.bpe.model",
    "special_tokens_map.json", "spiece.model", "tekken.json", "tokenizer.json", "tokenizer.model",
    "tokenizer_config.json", "video_preprocessor_config.json", "vocab.json", "vocab.txt",
]  # fmt: skip
NOT_SIDE = [
    ".gitattributes", ".hidden.json", "README.md", "adapter_note.json", "config.json", "consolidated.safetensors",
    "flax_model.msgpack", "ggml.gguf", "image.png", "merge.json", "mergekit_config.yml", "model.onnx", "optimizer.pt",
    "other.safetensors.index.json", "params.json", "pytorch_model.bin", "runs/events.json", "scheduler.pt",
    "train_results.json", "trainer_state.json", "training_args.bin", "training_args.json",
]  # fmt: skip


def test_side_files(tmp_path: Path) -> None:
    for name in SIDE + NOT_SIDE:
        put(tmp_path, {name: b"{}"})
    write_shards(tmp_path, {"model.safetensors": A})
    assert open_checkpoint(str(tmp_path)).side_files == [tmp_path / name for name in sorted(SIDE)]


def test_side_file_may_not_be_a_link_out_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    write_shards(tmp_path / "model", {"model.safetensors": A})
    (tmp_path / "model" / "tokenizer.json").symlink_to("../secret")
    checkpoint = open_checkpoint(str(tmp_path / "model"))
    with pytest.raises(CheckpointError, match=r"'tokenizer\.json' is a link that leaves the checkpoint's folder"):
        _ = checkpoint.side_files


def int8(*names: str) -> Tensors:
    return {name: torch.zeros(2, dtype=torch.uint8) for name in names}


QUANTISED: list[tuple[dict[str, object], Callable[[], Tensors], str | None]] = [
    ({}, some_tensors, None),
    ({"quantization_config": None}, some_tensors, None),
    (
        {"quantization_config": {"quant_method": "fp8"}},
        some_tensors,
        "fp8 (config.json quantization_config.quant_method)",
    ),
    ({"quantization_config": {"bits": 4}}, some_tensors, "config.json has quantization_config"),
    ({"quantization": {"bits": 4, "group_size": 64}}, some_tensors, "config.json has quantization"),
    (
        {"text_config": {"quantization_config": {"quant_method": "awq"}}},
        some_tensors,
        "awq (config.json text_config.quantization_config.quant_method)",
    ),
    ({}, lambda: {"w": torch.zeros(2).to(torch.float8_e4m3fn)}, "float8_e4m3fn (tensor 'w')"),
    ({}, lambda: int8("l.qweight", "l.qzeros", "l.scales"), "tensor 'l.qweight' belongs to quantised weights"),
    ({}, lambda: int8("l.weight", "l.weight.absmax"), "tensor 'l.weight.absmax' belongs to quantised weights"),
    ({}, lambda: int8("l.weight", "l.weight.quant_state.bitsandbytes__nf4"), "belongs to quantised weights"),
    ({}, lambda: int8("l.weight", "l.SCB"), "tensor 'l.SCB' belongs to quantised weights"),
    ({}, lambda: int8("l.weight", "l.weight_scale"), "uint8 with scales (tensors 'l.weight' and 'l.weight_scale')"),
    ({}, lambda: int8("l.w_blocks", "l.w_scales"), "uint8 with scales (tensors 'l.w_blocks' and 'l.w_scales')"),
    ({}, lambda: {"l.weight": torch.zeros(2), "l.scales": torch.zeros(2), "l.weight_scale": torch.zeros(2)}, None),
    ({}, lambda: int8("position_ids", "l.weight"), None),
]


@pytest.mark.parametrize(("config", "tensors", "why"), QUANTISED)
def test_quantised(config: dict[str, object], tensors: Callable[[], Tensors], why: str | None, tmp_path: Path) -> None:
    write_shards(tmp_path, {"model.safetensors": tensors()})
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = open_checkpoint(str(tmp_path)).quantised
    if why is None:
        assert found is None
    else:
        assert found is not None
        assert re.search(re.escape(why), found)


def test_opening_safetensors_loads_no_heavy_library(tmp_path: Path) -> None:
    write_shards(tmp_path, {"model.safetensors": A})
    code = (
        "import sys; from merganser.checkpoint import open_checkpoint; open_checkpoint(sys.argv[1]); "
        "print(sorted({'torch', 'transformers', 'huggingface_hub', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
