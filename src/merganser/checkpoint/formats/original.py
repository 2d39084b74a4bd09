"""The original checkpoints of Llama and Mistral (`consolidated.*` and `params.json`), by the names of transformers.

Meta's and Mistral's programs rotate pairs of neighbouring elements of a head, transformers the first half against the
second: rows of queries and keys are put into that order. Meta's files for several GPUs hold a piece of every matrix each.
Sources: convert_llama_weights_to_hf.py and convert_mistral_weights_to_hf.py of transformers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...errors import CheckpointError
from ...wording import brief, plural
from ..derived.derived import Rows, derive, read_rows
from ..tensor import ByteReader, TensorInfo, renamed
from .gguf.values import Permuted

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Original", "has_original_names", "read_original"]

_NAMES = {
    "tok_embeddings": "model.embed_tokens",
    "norm": "model.norm",
    "output": "lm_head",
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "feed_forward.gate": "block_sparse_moe.gate",
}
_NUMBER = r"(?:0|[1-9]\d{0,4})"
_EXPERT = re.compile(rf"feed_forward\.experts\.({_NUMBER})\.(w[123])")
_NAME = re.compile(rf"(?:layers\.(?P<layer>{_NUMBER})\.)?(?P<module>.+)\.weight")
_RECOMPUTED = re.compile(r"rope\.freqs")
_ACROSS = ("self_attn.o_proj", "mlp.down_proj")
"""Modules whose columns are cut; of the others, rows are."""

_ALIKE = ("model.norm", "input_layernorm", "post_attention_layernorm")
"""Modules that every file holds whole."""

_SIZES = ("dim", "n_layers", "n_heads")
_KNOWN = frozenset(
    [*_SIZES, "n_kv_heads", "vocab_size", "multiple_of", "ffn_dim_multiplier", "norm_eps", "rope_theta", "use_scaled_rope",
     "rope_scaling_factor", "high_freq_factor", "head_dim", "hidden_dim", "sliding_window", "max_seq_len", "max_batch_size",
     "max_position_embeddings", "moe", "tied_embeddings", "model_type", "causal"]
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Original:
    """An original checkpoint.

    Args:
        tensors: Its tensors by the names of transformers.
        config: What config.json would say.
        left_out: Tensors that transformers computes, and why, by name.
        notes: What the config does not know for certain.
    """

    tensors: dict[str, TensorInfo]
    config: dict[str, Any]
    left_out: dict[str, str]
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Whole:
    """Rows of a stored tensor, in its own dtype."""

    stored: TensorInfo

    def __call__(self, reader: ByteReader, first: int, end: int) -> Tensor:
        return read_rows(reader, self.stored, first, end)


@dataclass(frozen=True, slots=True)
class _Stacked:
    """Rows of pieces that lie below each other."""

    pieces: tuple[TensorInfo, ...]

    def __call__(self, reader: ByteReader, first: int, end: int) -> Tensor:
        import torch

        found, start = [], 0
        for piece in self.pieces:
            low, high = max(first - start, 0), min(end - start, piece.shape[0])
            if low < high:
                found.append(read_rows(reader, piece, low, high))
            start += piece.shape[0]
        return torch.cat(found)


@dataclass(frozen=True, slots=True)
class _Beside:
    """Rows of pieces that lie beside each other."""

    pieces: tuple[TensorInfo, ...]

    def __call__(self, reader: ByteReader, first: int, end: int) -> Tensor:
        import torch

        return torch.cat([read_rows(reader, piece, first, end) for piece in self.pieces], dim=1)


def has_original_names(names: Mapping[str, object]) -> bool:
    """Return whether tensors have the names of Meta's and Mistral's own programs."""
    return "tok_embeddings.weight" in names and "layers.0.attention.wq.weight" in names


def read_original(file: Path, params: Mapping[str, Any], parts: Sequence[Mapping[str, TensorInfo]]) -> Original:
    """Return an original checkpoint by the names of transformers.

    Args:
        file: params.json, for messages.
        params: Its contents.
        parts: The tensors of the file; or those of several, where each has a piece of every matrix.

    Raises:
        CheckpointError: A tensor or a setting is not known, or sizes contradict each other.
    """
    _check_params(file, params)
    for number, part in enumerate(parts):
        if part.keys() != parts[0].keys():
            odd = min(part.keys() ^ parts[0].keys())
            raise CheckpointError(f"{file.parent}: tensor {odd!r} is not in both of the files 0 and {number}")
    head = params.get("head_dim") or params["dim"] // params["n_heads"]
    tensors: dict[str, TensorInfo] = {}
    left_out: dict[str, str] = {}
    for name in parts[0]:
        if _RECOMPUTED.fullmatch(name):
            left_out[name] = "model code computes it"
            continue
        new, module = _hf_name(file, name)
        pieces = tuple(part[name] for part in parts)
        tensors[new] = _joined(file, new, module, pieces, params["dim"], head)
    _check_heads(file, params, tensors, head)
    config, notes = _config(file, params, tensors, head)
    return Original(tensors, config, left_out, notes)


def _check_params(file: Path, params: Mapping[str, Any]) -> None:
    for key in _SIZES:
        value = params.get(key)
        if type(value) is not int or not 0 < value < 1 << 31:
            raise CheckpointError(f"{file}: {key} must be a whole number above 0, found {brief(value)}")
    for key in ("n_kv_heads", "head_dim"):
        value = params.get(key)
        if value is not None and (type(value) is not int or not 0 < value < 1 << 31):
            raise CheckpointError(f"{file}: {key} must be a whole number above 0, found {brief(value)}")
    if "head_dim" not in params and params["dim"] % params["n_heads"]:
        raise CheckpointError(f"{file}: dim {params['dim']} is not a multiple of n_heads {params['n_heads']}")
    # what is false or empty changes nothing
    for key, value in params.items():
        if key not in _KNOWN and value not in (None, False, {}, []):
            raise CheckpointError(
                f"{file}: the setting {key!r} is not known, so this is not a text model of Llama or Mistral that can be read; give "
                "the Hugging Face checkpoint"
            )


def _hf_name(file: Path, name: str) -> tuple[str, str]:
    """Return the name in transformers, and the module without layer.

    Raises:
        CheckpointError: It is not known.
    """
    match = _NAME.fullmatch(name)
    module = None if match is None else _NAMES.get(match["module"])
    if match is not None and module is None and (expert := _EXPERT.fullmatch(match["module"])):
        module = f"block_sparse_moe.experts.{expert[1]}.{expert[2]}"
    if (
        match is None
        or module is None
        or (module.startswith("model.") or module == "lm_head") is not (match["layer"] is None)
    ):
        raise CheckpointError(
            f"{file.parent}: tensor {name!r} is in no text model of Llama or Mistral that can be read; give the Hugging Face "
            "checkpoint"
        )
    layer = "" if match["layer"] is None else f"model.layers.{match['layer']}."
    return f"{layer}{module}.weight", module


def _joined(file: Path, name: str, module: str, pieces: tuple[TensorInfo, ...], dim: int, head: int) -> TensorInfo:
    """Return a tensor made of its pieces."""
    first = pieces[0]
    across = module in _ACROSS
    if module == "model.embed_tokens" and len(first.shape) == 2:
        across = first.shape[1] != dim  # Llama 1 and 2 cut its columns, Llama 3 its rows
    kept = 0 if across else 1
    flat = module in _ALIKE
    if any(
        len(piece.shape) != (1 if flat else 2)
        or piece.dtype != first.dtype
        or (not flat and piece.shape[kept] != first.shape[kept])
        for piece in pieces
    ):
        shapes = ", ".join(str(list(piece.shape)) for piece in pieces[:4])
        raise CheckpointError(f"{file.parent}: the pieces of {name} do not fit together: {shapes}")
    if flat or len(pieces) == 1:
        shape, rows = first.shape, _plain(first)
    elif across:
        shape, rows = (first.shape[0], sum(piece.shape[1] for piece in pieces)), _Beside(pieces)
    else:
        shape, rows = (sum(piece.shape[0] for piece in pieces), first.shape[1]), _Stacked(pieces)
    if module in ("self_attn.q_proj", "self_attn.k_proj"):
        if shape[0] % head or head % 2:
            raise CheckpointError(f"{file.parent}: the {shape[0]} rows of {name} are not those of heads of {head}")
        rows = Permuted(rows, head, flat=False)
    elif flat or len(pieces) == 1:
        return renamed(first, name)
    return derive(name, shape, pieces, rows, natural=first.dtype, dtype=first.dtype)


def _plain(stored: TensorInfo) -> Rows:
    return _Whole(stored)


def _check_heads(file: Path, params: Mapping[str, Any], tensors: Mapping[str, TensorInfo], head: int) -> None:
    """Compare the sizes of params.json with those of the tensors."""
    embedding = tensors.get("model.embed_tokens.weight")
    if embedding is None or embedding.shape[1] != params["dim"]:
        found = "no tok_embeddings.weight" if embedding is None else f"tok_embeddings.weight of {list(embedding.shape)}"
        raise CheckpointError(f"{file}: dim is {params['dim']}, and the files hold {found}")
    layers = {int(name.split(".")[2]) for name in tensors if name.startswith("model.layers.")}
    # the number is compared first: a set of as many as a damaged file says might not fit into memory
    if len(layers) != params["n_layers"] or layers != set(range(params["n_layers"])):
        raise CheckpointError(
            f"{file}: n_layers is {params['n_layers']}, and the files hold {plural(len(layers), 'layer')}"
        )
    for key, module in (("n_heads", "q"), ("n_kv_heads", "k")):
        name = f"model.layers.0.self_attn.{module}_proj.weight"
        heads = params.get(key) or params["n_heads"]
        rows = tensors[name].shape[0] if name in tensors else 0
        if rows != heads * head:
            raise CheckpointError(f"{file}: {key} is {heads} with heads of {head}, and {name} has {rows} rows")


def _config(
    file: Path, params: Mapping[str, Any], tensors: Mapping[str, TensorInfo], head: int
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return what config.json would say, and what of it is not certain."""
    embedding = tensors["model.embed_tokens.weight"]
    experts = "model.layers.0.block_sparse_moe.experts.0.w1.weight"
    inner = tensors.get("model.layers.0.mlp.gate_proj.weight") or tensors.get(experts)
    if inner is None:
        raise CheckpointError(f"{file.parent}: the first layer has no feed-forward matrices")
    mistral = "hidden_dim" in params or "moe" in params
    config: dict[str, Any] = {
        "architectures": ["MistralForCausalLM" if mistral else "LlamaForCausalLM"],
        "model_type": "mistral" if mistral else "llama",
        "hidden_size": params["dim"],
        "intermediate_size": inner.shape[0],
        "num_hidden_layers": params["n_layers"],
        "num_attention_heads": params["n_heads"],
        "num_key_value_heads": params.get("n_kv_heads") or params["n_heads"],
        "head_dim": head,
        "vocab_size": embedding.shape[0],
        "hidden_act": "silu",
        "rms_norm_eps": _number(file, params, "norm_eps", 1e-5),
        "rope_theta": _number(file, params, "rope_theta", 10000.0),
        "tie_word_embeddings": "lm_head.weight" not in tensors,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "torch_dtype": embedding.dtype.name,
    }
    length = _of_mistral(file, params, config) if mistral else _of_llama(file, params, config)
    config["max_position_embeddings"] = length
    if _stated_length(params) and "rope_scaling" not in config:
        return config, ()
    told = f"{file}: config.json was made from it, with max_position_embeddings {length:,}"
    if "rope_scaling" in config:
        told += f" and a factor of {config['rope_scaling']['factor']:g} in rope_scaling"
    return config, (f"{told}, which it does not say; put the model's config.json beside it to be certain",)


def _stated_length(params: Mapping[str, Any]) -> int | None:
    """Return the length of texts that Mistral's models state; Meta's programs take max_seq_len for the size of a cache."""
    if "hidden_dim" not in params and "moe" not in params:
        return None
    given = params.get("max_position_embeddings") or params.get("max_seq_len")
    return given if type(given) is int and given > 0 else None


def _of_mistral(file: Path, params: Mapping[str, Any], config: dict[str, Any]) -> int:
    """Add what Mistral's models have; return the length of texts."""
    window = params.get("sliding_window")
    if window is not None and not str(window).isdecimal():
        raise CheckpointError(f"{file}: sliding_window must be a whole number, found {brief(window)}")
    config["sliding_window"] = None if window is None else int(window)
    if "moe" in params:
        moe = params["moe"]
        counts = [moe.get(key) if isinstance(moe, dict) else None for key in ("num_experts", "num_experts_per_tok")]
        if not all(type(count) is int and count > 0 for count in counts):
            raise CheckpointError(f"{file}: moe must give num_experts and num_experts_per_tok, found {brief(moe)}")
        config |= {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral"}
        config |= {"num_local_experts": counts[0], "num_experts_per_tok": counts[1]}
    return _stated_length(params) or 32_768


def _of_llama(file: Path, params: Mapping[str, Any], config: dict[str, Any]) -> int:
    """Add what Llama's models have; return the length of texts."""
    theta = config["rope_theta"]
    if theta == 500_000:  # Llama 3
        config |= {"bos_token_id": 128_000, "eos_token_id": 128_001}
    if params.get("use_scaled_rope"):
        # Llama 3.2 has 16 or 28 layers, the models of Llama 3.1 have 32 and more
        default = 32.0 if params["n_layers"] in (16, 28) else 8.0
        config["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": _number(file, params, "rope_scaling_factor", default),
            "low_freq_factor": 1.0,
            "high_freq_factor": _number(file, params, "high_freq_factor", 4.0),
            "original_max_position_embeddings": 8192,
        }
        return 131_072
    if theta == 500_000:
        return 8192
    if theta > 10_000:  # Code Llama
        return 16_384
    return 2048 if config["rms_norm_eps"] == 1e-6 else 4096  # Llama 1, Llama 2


def _number(file: Path, params: Mapping[str, Any], key: str, default: float) -> float:
    value = params.get(key)
    if value is None:
        return default
    if type(value) not in (int, float) or not math.isfinite(value) or value <= 0:
        raise CheckpointError(f"{file}: {key} must be a number above 0, found {brief(value)}")
    return float(value)
