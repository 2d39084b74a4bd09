"""Malformed quantised and foreign files: exit code 2, one message, and nothing left behind."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.cli.tiny import linear, names, recipe, run

Tensors = dict[str, torch.Tensor]
E4M3 = torch.float8_e4m3fn
CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "num_hidden_layers": 1}
NAME = "model.layers.0.mlp.up_proj"


def put(folder: Path, tensors: Tensors, settings: dict[str, Any] | None, key: str) -> None:
    folder.mkdir()
    config = CONFIG | ({} if settings is None else {key: settings})
    (folder / "config.json").write_text(json.dumps(config))
    save_file({f"{NAME}{name}": each.contiguous() for name, each in tensors.items()}, folder / "model.safetensors")


def refused(folder: Path, message: str) -> None:
    before = names(folder)
    found = run("merge", recipe(folder / "r.yaml", linear("bad")), "out")
    assert found.code == 2, found
    assert found.out == ""
    assert found.err.startswith("error: ")
    assert found.err.count("\n") == 1
    assert message in found.err, found.err
    assert "Traceback" not in found.err
    assert sorted(names(folder)) == sorted([*before, "r.yaml"])


def zeros(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.zeros(shape).to(dtype)


def i32(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int32)


def u8(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.uint8)


def text(content: object) -> torch.Tensor:
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    return torch.tensor(list(data), dtype=torch.uint8)


FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
TILES = {".weight": zeros(E4M3, 200, 130), ".weight_scale_inv": torch.ones(2, 2)}
PACKED = {"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": {"num_bits": 4}}}}
WORDS = {
    ".weight_packed": i32(8, 4),
    ".weight_scale": torch.ones(8, 1),
    ".weight_shape": torch.tensor([8, 32]),
}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32}
GPTQ_WORDS = {".qweight": i32(8, 16), ".qzeros": i32(2, 2), ".scales": torch.ones(2, 16)}
AWQ = {"quant_method": "awq", "bits": 4}
AWQ_WORDS = {".qweight": i32(64, 2), ".qzeros": i32(2, 2), ".scales": torch.ones(2, 16)}
STATE = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [8, 32]}
BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True}
STATE_NAME = ".weight.quant_state.bitsandbytes__nf4"
BLOCKS = {
    ".weight": u8(128, 1),
    ".weight.absmax": torch.ones(4),
    ".weight.quant_map": torch.ones(16),
    STATE_NAME: text(STATE),
}
EXPERTS = {"_blocks": u8(2, 8, 2, 16), "_scales": u8(2, 8, 2)}
NVFP4 = {
    ".weight_packed": u8(8, 16),
    ".weight_scale": zeros(E4M3, 8, 2),
    ".weight_global_scale": torch.ones(1),
}
MLX = {"group_size": 64, "bits": 4}
MLX_WORDS = {".weight": zeros(torch.uint32, 8, 16), ".scales": torch.ones(8, 2), ".biases": torch.ones(8, 2)}


def nested(**changes: object) -> Tensors:
    found = BLOCKS | {
        ".weight.absmax": u8(4),
        ".weight.nested_absmax": torch.ones(1),
        ".weight.nested_quant_map": torch.ones(256),
    }
    return found | {STATE_NAME: text(STATE | {"nested_blocksize": 256, "nested_offset": 0.0} | changes)}


def state(**changes: object) -> Tensors:
    return BLOCKS | {STATE_NAME: text(STATE | changes)}


def without(tensors: Tensors, name: str) -> Tensors:
    return {key: each for key, each in tensors.items() if key != name}


QUANTISED: dict[str, tuple[dict[str, Any] | None, Tensors, str]] = {
    "unknown method": ({"quant_method": "aqlm"}, TILES, "the method 'aqlm' cannot be read"),
    "method alone": (FP8, {".weight": torch.ones(2, 2)}, "no tensor is stored in a way that is known"),
    "fp8: no scale": (FP8, without(TILES, ".weight_scale_inv"), "the scales of float8_e4m3fn values"),
    "fp8: scale of a row too few": (FP8, TILES | {".weight_scale_inv": torch.ones(3, 2)}, "fits neither the tensor"),
    "fp8: scale transposed": (FP8, {".weight": zeros(E4M3, 300, 130), ".weight_scale_inv": torch.ones(2, 3)}, "fits neither the tensor"),
    "fp8: scale of three dimensions": (FP8, TILES | {".weight_scale_inv": torch.ones(2, 2, 2)}, "fits neither the tensor"),
    "fp8: scale of whole numbers": (FP8, TILES | {".weight_scale_inv": i32(2, 2)}, "scales must be floats"),
    "fp8: empty scale": (FP8, TILES | {".weight_scale_inv": torch.ones(0, 2)}, "fits neither the tensor"),
    "fp8: tile of zero": (FP8 | {"weight_block_size": [0, 128]}, TILES, "weight_block_size must be two whole numbers"),
    "fp8: tile of text": (FP8 | {"weight_block_size": "128x128"}, TILES, "weight_block_size must be two whole numbers"),
    "fp8: tile of one": (FP8 | {"weight_block_size": [128]}, TILES, "weight_block_size must be two whole numbers"),
    "fp8: a vector": (FP8, {".weight": zeros(E4M3, 8), ".weight_scale_inv": torch.ones(1)}, "only matrices have scales"),
    "awq: no zero points": (AWQ, without(AWQ_WORDS, ".qzeros"), "its zero points"),
    "awq: floats": (AWQ, AWQ_WORDS | {".qweight": torch.ones(64, 2)}, "must be a matrix of int32"),
    "awq: 3 bits": (AWQ | {"bits": 3}, AWQ_WORDS, "bits of the quantisation must be one of 4, found 3"),
    "packed: no scale": (PACKED, without(WORDS, ".weight_scale"), "its scales"),
    "packed: no shape": (PACKED, without(WORDS, ".weight_shape"), "its shape"),
    "packed: a shape that lies": (PACKED, WORDS | {".weight_shape": torch.tensor([8, 99])}, "does not hold numbers of 4 bits"),
    "packed: absurd shape": (PACKED, WORDS | {".weight_shape": torch.tensor([8, 1 << 60])}, "which is not a shape"),
    "packed: negative shape": (PACKED, WORDS | {".weight_shape": torch.tensor([-8, 32])}, "which is not a shape"),
    "packed: no bits": ({"quant_method": "compressed-tensors"}, WORDS, "num_bits of packed weights"),
    "packed: 99 bits": (PACKED | {"config_groups": {"g": {"weights": {"num_bits": 99}}}}, WORDS, "num_bits of packed weights"),
    "packed: groups of text": (PACKED | {"config_groups": "all"}, WORDS, "num_bits of packed weights"),
    "packed: zero points": (PACKED, WORDS | {".weight_zero_point": i32(8, 1)}, "must be int32 of shape [1, 1]"),
    "packed: group out of range": (PACKED, WORDS | {".weight_g_idx": torch.full((32,), 7)}, "names groups 7 to 7, there are 1"),
    "gptq: 5 bits": (GPTQ | {"bits": 5}, GPTQ_WORDS, "bits of the quantisation must be one of 2, 3, 4, 8, found 5"),
    "gptq: no bits": ({"quant_method": "gptq"}, GPTQ_WORDS, "bits of the quantisation must be one of"),
    "gptq: no zero points": (GPTQ, without(GPTQ_WORDS, ".qzeros"), "its zero points"),
    "gptq: zero points": (GPTQ, GPTQ_WORDS | {".qzeros": i32(2, 3)}, "must have the shape [2, 2], found [2, 3]"),
    "gptq: group size": (GPTQ | {"group_size": 7}, GPTQ_WORDS, "2 groups of 64 inputs contradict group_size 7"),
    "gptq: group size of text": (GPTQ | {"group_size": "x"}, GPTQ_WORDS, "contradict group_size"),
    "gptq: scales": (GPTQ, GPTQ_WORDS | {".scales": torch.ones(2, 15)}, "has 15 columns, the weight 16"),
    "gptq: group out of range": (GPTQ, GPTQ_WORDS | {".g_idx": torch.full((64,), 2, dtype=torch.int32)}, "names groups 2 to 2"),
    "gptq: groups of few": (GPTQ, GPTQ_WORDS | {".g_idx": i32(3)}, "has 3 entries, the weight has 64 inputs"),
    "gptq: floats": (GPTQ, GPTQ_WORDS | {".qweight": torch.ones(8, 16)}, "must be a matrix of int32"),
    "awq: gemv": (AWQ | {"version": "gemv"}, AWQ_WORDS, "AWQ in the layout 'gemv' cannot be read"),
    "awq: groups": (AWQ, AWQ_WORDS | {".scales": torch.ones(3, 16)}, "3 groups do not divide 64 inputs"),
    "awq: zero points": (AWQ, AWQ_WORDS | {".qzeros": i32(1, 2)}, "shapes do not fit"),
    "bnb: no state": (BNB, without(BLOCKS, STATE_NAME), "no tensor is stored in a way that is known"),
    "bnb: no absmax": (BNB, without(BLOCKS, ".weight.absmax"), "its scales"),
    "bnb: no table": (BNB, without(BLOCKS, ".weight.quant_map"), "the table of its values"),
    "bnb: no JSON": (BNB, BLOCKS | {STATE_NAME: text(b"\xff\xfe{")}, "quant_state"),
    "bnb: JSON of a list": (BNB, BLOCKS | {STATE_NAME: text([])}, "quant_state"),
    "bnb: block of zero": (BNB, state(blocksize=0), "blocksize must be a whole number above 0, found 0"),
    "bnb: absurd shape": (BNB, state(shape=[1 << 40, 1]), "shape must be whole numbers above 0"),
    "bnb: another shape": (BNB, state(shape=[8, 33]), "must be uint8 with 132 elements"),
    "bnb: a vector": (BNB, state(shape=[256]), "shape must have two dimensions"),
    "bnb: absmax of few": (BNB, BLOCKS | {".weight.absmax": torch.ones(3)}, "must be float32 with 4 elements"),
    "bnb: table of few": (BNB, BLOCKS | {".weight.quant_map": torch.ones(15)}, "must be float32 with 16 elements"),
    "bnb: nested missing": (BNB, BLOCKS | {".weight.absmax": u8(4)}, "the scale of these scales"),
    "bnb: nested block": (BNB, nested(nested_blocksize=-1), "nested_blocksize must be a whole number"),
    "bnb: nested offset": (BNB, nested(nested_offset=None), "nested_offset must be a number"),
    "bnb: int8 with few scales": (BNB, {".weight": torch.zeros(4, 4, dtype=torch.int8), ".SCB": torch.ones(3)}, "one number per row"),
    "mxfp4: no scales": ({"quant_method": "mxfp4"}, without(EXPERTS, "_scales"), "its scales"),
    "mxfp4: scales": ({"quant_method": "mxfp4"}, EXPERTS | {"_scales": u8(2, 8, 3)}, "must be bytes of shape [2, 8, 2]"),
    "mxfp4: blocks": ({"quant_method": "mxfp4"}, EXPERTS | {"_blocks": u8(2, 8, 2, 15)}, "must have the shape"),
    "nvfp4: scales": (PACKED, NVFP4 | {".weight_scale": zeros(E4M3, 8, 3)}, "one scale per 16 columns"),
    "nvfp4: dtype": (PACKED, NVFP4 | {".weight_scale": u8(8, 2)}, "must be float8_e4m3fn, found uint8"),
    "nvfp4: global scale": (PACKED, NVFP4 | {".weight_global_scale": torch.ones(3)}, "must be one float"),
    "int8: zero points": (PACKED, {".weight": torch.zeros(4, 4, dtype=torch.int8), ".weight_scale": torch.ones(4, 1), ".weight_zero_point": torch.zeros(2, 1, dtype=torch.int8)}, "must be whole numbers of the shape"),
    "int8: no scale": (PACKED, {".weight": torch.zeros(4, 4, dtype=torch.int8)}, "no tensor is stored in a way that is known"),
    "leftover": (FP8, TILES | {"2.qweight": i32(2, 2), "2.qzeros": i32(2, 2), "2.scales": torch.ones(2, 2)}, "bits of the quantisation"),
}  # fmt: skip


@pytest.mark.parametrize("case", QUANTISED)
def test_quantised(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings, tensors, message = QUANTISED[case]
    put(tmp_path / "bad", tensors, settings, "quantization_config")
    refused(tmp_path, message)


NO_NUMBERS: dict[str, tuple[dict[str, Any], Tensors]] = {
    "fp8: scale of NaN": (FP8, TILES | {".weight_scale_inv": torch.full((2, 2), torch.nan)}),
    "gptq: infinite scale": (GPTQ, GPTQ_WORDS | {".scales": torch.full((2, 16), torch.inf)}),
    "bnb: scale of NaN": (BNB, BLOCKS | {".weight.absmax": torch.full((4,), torch.nan)}),
    "nvfp4: divided by zero": (PACKED, NVFP4 | {".weight_global_scale": torch.zeros(1)}),
    "int8: scale of NaN": (PACKED, {".weight": torch.ones(4, 4, dtype=torch.int8), ".weight_scale": torch.full((4, 1), torch.nan)}),
}  # fmt: skip


@pytest.mark.parametrize("case", NO_NUMBERS)
def test_scales_that_are_no_numbers(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are seen when the values are read."""
    monkeypatch.chdir(tmp_path)
    settings, tensors = NO_NUMBERS[case]
    put(tmp_path / "bad", tensors, settings, "quantization_config")
    config = {"model_type": "x", "quantization_config": settings}
    (tmp_path / "bad" / "config.json").write_text(json.dumps(config))
    before = names(tmp_path)
    found = run("merge", recipe(tmp_path / "r.yaml", linear("bad")), "out", "-q")
    assert (found.code, found.out) == (2, "")
    assert "holds NaN or infinity; merge it all the same with --allow-nonfinite" in found.err
    assert names(tmp_path) == sorted([*before, "r.yaml"])


MLX_CASES: dict[str, tuple[dict[str, Any], Tensors, str]] = {
    "no biases": (MLX, without(MLX_WORDS, ".biases"), "its biases"),
    "no scales": (MLX, without(MLX_WORDS, ".scales"), "its scales"),
    "group of zero": (MLX | {"group_size": 0}, MLX_WORDS, "group_size of config.json must be a whole number above 0"),
    "bits": (MLX | {"group_size": 60}, MLX_WORDS, "16 words hold no whole number of bits"),
    "mode": (MLX | {"mode": "mxfp4"}, MLX_WORDS, "the mode 'mxfp4' of MLX cannot be read"),
    "scales of another shape": (MLX, MLX_WORDS | {".scales": torch.ones(7, 2)}, "does not fit the weight"),
}


@pytest.mark.parametrize("case", MLX_CASES)
def test_mlx(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings, tensors, message = MLX_CASES[case]
    put(tmp_path / "bad", tensors, settings, "quantization")
    refused(tmp_path, message)


def word(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def entry(key: str | bytes, kind: int, value: bytes) -> bytes:
    return word(key) + struct.pack("<I", kind) + value


ARCHITECTURE = entry("general.architecture", 8, word("qwen2"))


def described(
    name: str | bytes = "blk.0.ffn_up.weight", dims: tuple[int, ...] = (8, 4), kind: int = 0, offset: int = 0
) -> bytes:
    return word(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def file(
    tensors: list[bytes] | None = None,
    entries: list[bytes] | None = None,
    *,
    start: bytes = b"GGUF" + struct.pack("<I", 3),
    counts: tuple[int, int] | None = None,
    data: int = 512,
) -> bytes:
    tensors = [described()] if tensors is None else tensors
    entries = [ARCHITECTURE, *(entries or [])]
    numbers = counts or (len(tensors), len(entries))
    head = start + struct.pack("<QQ", *numbers) + b"".join(entries) + b"".join(tensors)
    return head + bytes(-len(head) % 32) + bytes(data)


GGUF: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "the file is empty"),
    "magic": (b"GGML" + file()[4:], "not a GGUF file"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS"),
    "version": (file(start=b"GGUF" + struct.pack("<I", 99)), "GGUF version 99 cannot be read"),
    "version 1": (file(start=b"GGUF" + struct.pack("<I", 1)), "GGUF version 1 cannot be read"),
    "big-endian": (file(start=b"GGUF" + struct.pack(">I", 3)), "the file is big-endian"),
    "cut in the header": (file()[:60], "truncated"),
    "cut in the data": (file(data=100), "truncated: tensor 'blk.0.ffn_up.weight' ends at byte"),
    "absurd count of tensors": (file(counts=(1 << 60, 1)), "the header counts 1,152,921,504,606,846,976 tensors"),
    "absurd count of entries": (file(counts=(1, 1 << 60)), "the header counts 1 tensors and 1,152,921"),
    "more tensors than there are": (file(counts=(900_000, 1)), ""),
    "absurd length of a key": (file(entries=[struct.pack("<Q", 1 << 50)]), "a key of 1,125,899,906,842,624 bytes"),
    "absurd length of a text": (file(entries=[entry("x", 8, struct.pack("<Q", 1 << 50))]), "a text of 1,125"),
    "absurd list": (file(entries=[entry("x", 9, struct.pack("<IQ", 8, 1 << 50))]), "which the file cannot hold"),
    "absurd list of numbers": (file(entries=[entry("x", 9, struct.pack("<IQ", 4, 1 << 61))]), "truncated"),
    "list of lists": (file(entries=[entry("x", 9, struct.pack("<IQ", 9, 1))]), "is a list of the type 9"),
    "a text beyond the end": (file(entries=[entry("x", 9, struct.pack("<IQQ", 8, 1, 1 << 62))]), "truncated"),
    "type of an entry": (file(entries=[entry("x", 77, b"")]), "has the type 77, which does not exist"),
    "entry twice": (file(entries=[ARCHITECTURE]), "entry 'general.architecture' is there twice"),
    "name with NUL": (file([described("blk.0\0.weight")]), "holds a NUL character"),
    "name that is not text": (file([described(b"\xff\xfe")]), "is not valid UTF-8"),
    "no dimensions": (file([described(dims=())]), "0 dimensions; 1 to 8 are accepted"),
    "many dimensions": (file([described(dims=(1,) * 9)]), "9 dimensions"),
    "dimension of zero": (file([described(dims=(8, 0))]), "is empty or too large"),
    "absurd dimensions": (file([described(dims=(1 << 40, 1 << 40))]), "is empty or too large"),
    "type": (file([described(kind=99)]), "the type 99 is not known"),
    "type that is gone": (file([described(dims=(32, 4), kind=4)]), "the type 4 is not known"),
    "type of activations": (file([described(dims=(256, 1), kind=15)]), "the type Q8_K cannot be read"),
    "rows that fill no block": (file([described(dims=(33, 4), kind=2)]), "rows of 33 do not fill blocks of Q4_0, 32"),
    "offset": (file([described(offset=7)]), "offset 7 is not a multiple of the alignment 32"),
    "offset beyond the end": (file([described(offset=1 << 40)]), "truncated: tensor"),
    "twice": (file([described(), described(offset=128)]), "is there twice"),
    "overlap": (file([described(), described("blk.0.ffn_down.weight", offset=32)]), "overlap"),
    "alignment": (file(entries=[entry("general.alignment", 4, struct.pack("<I", 3))]), "must be a power of two, found 3"),
    "alignment of zero": (file(entries=[entry("general.alignment", 4, bytes(4))]), "must be a power of two, found 0"),
    "alignment of text": (file(entries=[entry("general.alignment", 8, word("x"))]), "must be a power of two"),
    "architecture": (file().replace(b"qwen2", b"rwkv9"), "the architecture 'rwkv9' of GGUF cannot be read"),
    "tensor of another family": (file([described("blk.0.ssm_a.weight")]), "has no such tensor here"),
    "layer of a tensor outside the layers": (file([described("blk.0.output_norm.weight")]), "has no such tensor here"),
    "part of a model": (file(entries=[entry("split.count", 2, struct.pack("<H", 3))]), "is one of 3 parts of a model, 1 are here"),
    "heads": (file([described("blk.0.attn_q.weight")]).replace(word("qwen2"), word("llama")), "the order of rows is not known"),
    "negative heads": (file([described("blk.0.attn_q.weight")], [entry("llama.attention.head_count", 5, struct.pack("<i", -2))]).replace(word("qwen2"), word("llama")), "the order of rows is not known"),
    "a stack of very many": (file([described("blk.0.ffn_gate_exps.weight", dims=(1, 1, 20_000))], data=80_000).replace(word("qwen2"), word("llama")), "stacks 20,000 matrices; at most 10,000 are accepted"),
    "no tensors": (file([]), "holds no tensors"),
}  # fmt: skip


@pytest.mark.parametrize("case", GGUF)
def test_gguf(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    content, message = GGUF[case]
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "bad" / "m.gguf").write_bytes(content)
    refused(tmp_path, message)


def test_grids_that_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A base that is not quantised, and an expert that is; AWQ with any base."""
    monkeypatch.chdir(tmp_path)
    put(tmp_path / "base", {".weight": torch.ones(200, 130)}, None, "")
    put(tmp_path / "fp8", TILES, FP8, "quantization_config")
    put(tmp_path / "awq", AWQ_WORDS, AWQ, "quantization_config")
    document: dict[str, Any] = {"merge_method": "task_arithmetic", "base_model": "base", "models": [{"model": "fp8"}]}
    document["parameters"] = {"weight": 1.0}
    found = run("merge", recipe(tmp_path / "r.yaml", document), "out")
    assert (found.code, found.out) == (2, "")
    assert found.err == (
        f"error: {tmp_path}/r.yaml:4 models[0]: fp8 is quantised (float8_e4m3fn per 128x128), its base base is not quantised: the "
        "difference of the two would be mostly rounding. Use models that are stored alike, or write "
        "'quantised: allow' into the recipe\n"
    )
    allowed = run("merge", recipe(tmp_path / "r.yaml", document | {"quantised": "allow"}), "out")
    assert "mostly rounding" not in allowed.err
    document["models"] = [{"model": "awq"}]
    found = run("merge", recipe(tmp_path / "r.yaml", document | {"quantised": "allow"}), "out2")
    assert found.code == 2
    assert "AWQ scales norms and weights before it rounds them" in found.err
