"""Checkpoints to merge: random numbers in the shape of real models, written block by block."""

import json
import math
import os
import shutil
import struct
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

BASE_STD = 0.02
DELTA_STD = 0.001

_VERSION = 1
_BLOCK = 1 << 17
_WEIGHTS = "model.safetensors"
_SETTINGS = "settings.json"

Tensors = Sequence[tuple[str, tuple[int, ...]]]


@dataclass(frozen=True)
class Shape:
    """A decoder as Qwen2 names and shapes it, embeddings tied."""

    hidden: int
    ffn: int
    layers: int
    vocab: int
    heads: int
    kv_heads: int = 2

    @property
    def tensors(self) -> Tensors:
        """Names and shapes, in the order of the file."""
        return list(self._tensors())

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return count(self.tensors)

    @property
    def config(self) -> dict[str, Any]:
        """What config.json says."""
        return {
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
            "hidden_size": self.hidden,
            "intermediate_size": self.ffn,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "vocab_size": self.vocab,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "hidden_act": "silu",
            "rms_norm_eps": 1e-06,
            "rope_theta": 1000000.0,
            "max_position_embeddings": 32768,
        }

    def _tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        hidden, ffn, kv = self.hidden, self.ffn, self.hidden // self.heads * self.kv_heads
        yield "model.embed_tokens.weight", (self.vocab, hidden)
        for layer in range(self.layers):
            for name, shape in (
                ("input_layernorm.weight", (hidden,)),
                ("mlp.down_proj.weight", (hidden, ffn)),
                ("mlp.gate_proj.weight", (ffn, hidden)),
                ("mlp.up_proj.weight", (ffn, hidden)),
                ("post_attention_layernorm.weight", (hidden,)),
                ("self_attn.k_proj.bias", (kv,)),
                ("self_attn.k_proj.weight", (kv, hidden)),
                ("self_attn.o_proj.weight", (hidden, hidden)),
                ("self_attn.q_proj.bias", (hidden,)),
                ("self_attn.q_proj.weight", (hidden, hidden)),
                ("self_attn.v_proj.bias", (kv,)),
                ("self_attn.v_proj.weight", (kv, hidden)),
            ):
                yield f"model.layers.{layer}.{name}", shape
        yield "model.norm.weight", (hidden,)


def shape_of(billions: float) -> Shape:
    """Return the shape with about so many billion weights; 0.54 gives 27 layers of Qwen2.5-0.5B, 538.8 M.

    Width and depth grow with the cube root of the size, the vocabulary with its square.
    """
    if billions == 0.54:
        return Shape(896, 4864, 27, 151936, heads=14)
    ratio = billions / 0.5388
    hidden = max(round(896 * ratio ** (1 / 3) / 128), 1) * 128
    ffn = round(hidden * 4864 / 896 / 128) * 128
    vocab = max(round(151936 * ratio ** (2 / 3) / 64), 1) * 64
    one, two = (Shape(hidden, ffn, layers, vocab, hidden // 64).parameters for layers in (1, 2))
    layers = max(round((billions * 1e9 - one) / (two - one)) + 1, 1)
    return Shape(hidden, ffn, layers, vocab, hidden // 64)


def tiny_of(shape: Shape) -> Shape:
    """Return the same tensors, by name, at the least size: what takes time here is start-up."""
    return Shape(hidden=16, ffn=32, layers=shape.layers, vocab=64, heads=2)


def count(tensors: Tensors) -> int:
    """Number of elements of all tensors."""
    return sum(math.prod(shape) for _, shape in tensors)


@dataclass(frozen=True)
class Models:
    """A base and its experts, each a folder with one file of weights."""

    base: Path
    experts: tuple[Path, ...]
    tensors: Tensors


def make_models(folder: Path, tensors: Tensors, n_experts: int, config: Mapping[str, Any] | None = None) -> Models:
    """Make what is missing of a base and experts; what was made before with the same settings is kept.

    Args:
        folder: Where they lie, one folder each.
        tensors: Names and shapes; the dtype is bfloat16.
        n_experts: Number of experts.
        config: What config.json says; none by default.

    Raises:
        OSError: The disk has no room for them.
    """
    base = folder / "base"
    experts = tuple(folder / f"expert-{i}" for i in range(1, n_experts + 1))
    settings = _settings(tensors, config)
    missing = [path for path in (base, *experts) if not _made(path, settings)]
    _check_room(folder, len(missing) * 2 * count(tensors))
    if base in missing:
        _make(base, tensors, config, settings, seed=0, origin=None)
        missing.remove(base)
    with ThreadPoolExecutor(min(os.cpu_count() or 1, 4)) as pool:
        jobs = [
            pool.submit(_make, path, tensors, config, settings, seed=int(path.name.split("-")[1]), origin=base)
            for path in missing
        ]
        for job in jobs:
            job.result()
    return Models(base, experts, tensors)


def make_headers(folder: Path, shape: Shape, n_shards: int) -> None:
    """Make a checkpoint of sparse files: whole headers and an index, and no weights on the disk."""
    tensors = shape.tensors
    target = 2 * count(tensors) / n_shards
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[] for _ in range(n_shards)]
    done = 0
    for name, dims in tensors:
        shards[min(int(done / target), n_shards - 1)].append((name, dims))
        done += 2 * math.prod(dims)
    folder.mkdir(parents=True, exist_ok=True)
    where = {}
    for number, held in enumerate(shards, 1):
        file = f"model-{number:05}-of-{n_shards:05}.safetensors"
        where.update({name: file for name, _ in held})
        header = header_of(held)
        with (folder / file).open("wb") as out:
            out.write(header)
            out.truncate(len(header) + 2 * count(held))
    (folder / "config.json").write_text(json.dumps(shape.config, indent=1) + "\n", encoding="utf-8")
    index = {"metadata": {"total_size": done}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def header_of(tensors: Tensors) -> bytes:
    """Return the header of a safetensors file that holds these, in bfloat16, one behind the other."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in tensors:
        end = offset + 2 * math.prod(shape)
        entries[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """Round float32 to bfloat16, to nearest even, as uint16; the values must be finite."""
    bits = values.view(np.uint32)
    odd = bits >> np.uint32(16)
    odd &= np.uint32(1)
    odd += np.uint32(0x7FFF)
    odd += bits
    odd >>= np.uint32(16)
    return odd.astype(np.uint16)


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    """Widen bfloat16, as uint16, to float32."""
    wide = bits.astype(np.uint32)
    wide <<= np.uint32(16)
    return wide.view(np.float32)


def _settings(tensors: Tensors, config: Mapping[str, Any] | None) -> dict[str, Any]:
    facts = {"version": _VERSION, "base_std": BASE_STD, "delta_std": DELTA_STD, "config": config}
    return {**facts, "tensors": len(tensors), "parameters": count(tensors), "first": tensors[0][0]}


def _made(folder: Path, settings: Mapping[str, Any]) -> bool:
    file = folder / _SETTINGS
    return file.exists() and json.loads(file.read_text(encoding="utf-8")) == json.loads(json.dumps(settings))


def _check_room(folder: Path, nbytes: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if nbytes > free * 0.9:
        raise OSError(f"{folder}: the models to make take {nbytes / 1e9:.1f} GB, {free / 1e9:.1f} GB are free there")


def _make(
    folder: Path,
    tensors: Tensors,
    config: Mapping[str, Any] | None,
    settings: Mapping[str, Any],
    *,
    seed: int,
    origin: Path | None,
) -> None:
    """Write one model; the settings come last, so that an interrupted one is made again."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _SETTINGS).unlink(missing_ok=True)
    header = header_of(tensors)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    with (folder / _WEIGHTS).open("wb", buffering=0) as out:
        out.write(header)
        for block in _blocks(count(tensors), seed, None if origin is None else origin / _WEIGHTS, len(header)):
            out.write(block)
        os.fsync(out.fileno())
    (folder / _SETTINGS).write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")


def _blocks(size: int, seed: int, origin: Path | None, skip: int) -> Iterator[memoryview]:
    """Draw a model's weights, a block at a time, as bytes."""
    random = np.random.Generator(np.random.SFC64([_VERSION, seed]))
    drawn = np.empty(_BLOCK, np.float32)
    if origin is None:
        for start in range(0, size, _BLOCK):
            part = drawn[: min(_BLOCK, size - start)]
            random.standard_normal(out=part, dtype=np.float32)
            part *= np.float32(BASE_STD)
            yield memoryview(to_bfloat16(part)).cast("B")
        return
    with origin.open("rb", buffering=0) as file:
        file.seek(skip)
        for piece in iter(partial(file.read, 2 * _BLOCK), b""):
            before = np.frombuffer(piece, np.uint16)
            part = drawn[: len(before)]
            random.standard_normal(out=part, dtype=np.float32)
            part *= np.float32(DELTA_STD)
            part += from_bfloat16(before)
            yield memoryview(to_bfloat16(part)).cast("B")


def settings_of(shape: Shape) -> dict[str, Any]:
    """What a result says of a shape."""
    return {**asdict(shape), "parameters": shape.parameters, "dtype": "bfloat16"}
