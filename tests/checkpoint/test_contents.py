"""What a checkpoint holds beside its weights, and whether its weights are quantised."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.checkpoint.making import Tensors, put, some_tensors, write_shards

from merganser.checkpoint import open_checkpoint
from merganser.errors import CheckpointError

A: Tensors = {"a": torch.arange(4.0)}

SIDE = ["../x.safetensors", "/etc/x.safetensors", "a/../../x.safetensors", "C:\\x.safetensors", "..\\x.safetensors"]


@pytest.mark.parametrize("name", [*OUTSIDE, "\\\\host\\x.safetensors", "C:x.safetensors", "x\0.safetensors"])
def test_index_may_not_leave_the_folder(name: str, tmp_path: Path) -> None:
    write_shards(tmp_path, {"x.safetensors": A})
    put(tmp_path / "model", {INDEX: mapping(a=name)})
    with pytest.raises(CheckpointError, match="is not inside the checkpoint's folder") as caught:
        open_checkpoint(str(tmp_path / "model"))
    assert str(tmp_path / "model" / INDEX) in str(caught.value)


def test_link_of_an_index_may_not_leave_the_folder(tmp_path: Path) -> None:
    write_shards(tmp_path, {"x.safetensors": A})
    put(tmp_path / "model", {INDEX: mapping(a="y.safetensors")})
    (tmp_path / "model" / "y.safetensors").symlink_to("../x.safetensors")
    with pytest.raises(CheckpointError, match=r"'y\.safetensors' is a link that leaves the checkpoint's folder"):
        open_checkpoint(str(tmp_path / "model"))


def test_dead_link(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").symlink_to("gone")
    with pytest.raises(NotFoundError, match=r"model\.safetensors: is a link to a file that is not there"):
        open_checkpoint(str(tmp_path))


def test_directory_in_place_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").mkdir()
    with pytest.raises(CheckpointError, match=r"model\.safetensors: is a directory"):
        open_checkpoint(str(tmp_path))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes on this system")
def test_pipe_in_place_of_a_file_does_not_wait(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: is not a regular file"):
        open_checkpoint(str(tmp_path))


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("closed", ["model.safetensors", "config.json", "pytorch_model.bin", "."])
def test_no_permission(closed: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    write_shards(folder, {"pytorch_model.bin" if closed.endswith("bin") else "model.safetensors": A})
    (folder / "config.json").write_text("{}")
    target = folder / closed
    target.chmod(0)
    try:
        with pytest.raises(CheckpointError, match="cannot be read: permission denied"):
            open_checkpoint(str(folder))
    finally:
        target.chmod(0o700)


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("./nope", "model './nope' not found: no such file or folder"),
        ("/nope/nope", "model '/nope/nope' not found: no such file or folder"),
        ("~/nope-nope", "model '~/nope-nope' not found: no such file or folder"),
        ("~no-such-user/x", "not found: no such file or folder"),
        ("a/b/c", "model 'a/b/c' not found: no such file or folder"),
        ("a\\b", r"model 'a\\\\b' not found: no such file or folder"),
        ("nope/model.safetensors", "not found: no such file or folder"),
        ("", "model '' not found: the path is empty"),
        ("a\0b", r"model 'a\\x00b' not found"),
        ("./\ud800", "not found"),
        ("./" + "x" * 5000, "not found: no such file or folder"),
    ],
)
def test_no_such_path(reference: str, message: str) -> None:
    with pytest.raises(NotFoundError, match=message):
        open_checkpoint(reference)


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("x.gguf", UnsupportedError, r"x\.gguf: GGUF inputs come with a later version"),
        ("adapter_model.safetensors", UnsupportedError, "LoRA references come with a later version"),
        ("config.json", CheckpointError, "not a checkpoint: give a folder, or a file that ends in .safetensors"),
    ],
)
def test_file_that_is_no_checkpoint(name: str, kind: type[MergeError], message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"{}")
    with pytest.raises(kind, match=message):
        open_checkpoint(str(tmp_path / name))


def test_revision_of_a_local_folder_is_refused(tmp_path: Path) -> None:
    write_shards(tmp_path, {"model.safetensors": A})
    with pytest.raises(CheckpointError, match="revision 'main' is given, but the model is a folder"):
        open_checkpoint(str(tmp_path), revision="main")


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
