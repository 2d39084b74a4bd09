"""The permutations of a decoder-only transformer that leave its output unchanged, as data.

Hidden units of an MLP, attention heads and channels of the residual stream may be put into another order, if every
tensor that holds them follows. Which tensors do is known for the families listed here; others are refused.

Source: S. K. Ainsworth, J. Hayase, S. Srinivasa, "Git Re-Basin: Merging Models modulo Permutation Symmetries", ICLR 2023
(arXiv 2209.04836); for attention heads N. Verma, M. Elbayad, "Merging Text Transformer Models from Different
Initializations", TMLR 2024 (arXiv 2403.00986).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import UnsupportedError
from .infer import Anatomy
from .settings.config import as_int, words

__all__ = ["UNITS", "Units", "Use", "find_units"]

UNITS = ("mlp", "heads", "residual")
"""Kinds of units that may be permuted."""

_IGNORED = (".inv_freq", ".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias")
"""Buffers that do not depend on the order of anything."""

# What the output and the input axis of each linear layer hold, by the module's name in its layer; vectors hold what the
# output axis holds.
_QKV = {
    "self_attn.q_proj": ("queries", "residual"),
    "self_attn.k_proj": ("keys", "residual"),
    "self_attn.v_proj": ("keys", "residual"),
}
_ATTENTION = _QKV | {
    "self_attn.o_proj": ("residual", "queries"),
    "self_attn.q_norm": ("query_norm", ""),
    "self_attn.k_norm": ("key_norm", ""),
}
_NORMS = dict.fromkeys(
    words("input_layernorm post_attention_layernorm pre_feedforward_layernorm post_feedforward_layernorm"),
    ("residual", ""),
)
_GATED = {
    "mlp.gate_proj": ("hidden", "residual"),
    "mlp.up_proj": ("hidden", "residual"),
    "mlp.down_proj": ("residual", "hidden"),
}
_LLAMA = _ATTENTION | _GATED | _NORMS
_PHI3 = _NORMS | {
    "self_attn.qkv_proj": ("queries_keys_values", "residual"),
    "self_attn.o_proj": ("residual", "queries"),
    "mlp.gate_up_proj": ("gate_up", "residual"),
    "mlp.down_proj": ("residual", "hidden"),
}
_PHI = (
    _QKV
    | _NORMS
    | {
        "self_attn.dense": ("residual", "queries"),
        "self_attn.q_layernorm": ("query_norm", ""),
        "self_attn.k_layernorm": ("key_norm", ""),
        "mlp.fc1": ("hidden", "residual"),
        "mlp.fc2": ("residual", "hidden"),
    }
)
_STARCODER2 = (
    _ATTENTION
    | _NORMS
    | {
        "mlp.c_fc": ("hidden", "residual"),
        "mlp.c_proj": ("residual", "hidden"),
    }
)
_GPT_NEOX = _NORMS | {
    "attention.query_key_value": ("whole_heads", "residual"),
    "attention.dense": ("residual", "queries"),
    "mlp.dense_h_to_4h": ("hidden", "residual"),
    "mlp.dense_4h_to_h": ("residual", "hidden"),
}
_GPT2 = {
    "attn.c_attn": ("queries_keys_values", "residual"),
    "attn.c_proj": ("residual", "queries"),
    "mlp.c_fc": ("hidden", "residual"),
    "mlp.c_proj": ("residual", "hidden"),
    "ln_1": ("residual", ""),
    "ln_2": ("residual", ""),
}
_TRANSPOSED = ("gpt2",)
"""Families whose linear layers store the input axis first."""

_UNGROUPED = ("gpt2", "gpt_neox")
"""Families without grouped queries, whatever the config says of heads of keys."""

_FAMILIES: dict[str, Mapping[str, tuple[str, str]]] = {
    **dict.fromkeys(
        words("arcee llama mistral qwen2 qwen3 gemma gemma2 gemma3_text granite olmo olmo2 smollm3 stablelm"), _LLAMA
    ),
    "phi": _PHI,
    "phi3": _PHI3,
    "starcoder2": _STARCODER2,
    "gpt_neox": _GPT_NEOX,
    "gpt2": _GPT2,
}


@dataclass(frozen=True, slots=True)
class Use:
    """A tensor that holds units along one axis: unit j is `width` indices, from `start + j * width` on.

    Attributes:
        tensor: Its name.
        axis: The axis.
        start: First index of the first unit.
        width: Indices of each unit.
    """

    tensor: str
    axis: int
    start: int
    width: int


@dataclass(frozen=True, slots=True)
class Units:
    """Units that may be put into any order, if all tensors that hold them follow.

    Attributes:
        name: A name: the layer and the kind.
        kind: "mlp", "heads" or "residual". Of attention with grouped queries, "heads" are the groups: a key, a value and
            their queries.
        size: Number of units.
        uses: The tensors that hold them.
        inner: For groups of queries, the query heads: those of one group may be put into any order, too, and move with
            their group; else None.
    """

    name: str
    kind: str
    size: int
    uses: tuple[Use, ...]
    inner: Units | None = None


@dataclass(frozen=True, slots=True)
class _Sizes:
    """Numbers of heads, of heads of keys, and of channels of a head; channels of the residual stream."""

    heads: int
    keys: int
    head: int
    residual: int


def find_units(shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any], anatomy: Anatomy) -> list[Units]:
    """Return the permutable units of a decoder-only transformer: the residual stream first, then layer by layer.

    Inside of a head nothing is permuted: rotary embeddings tie each channel of queries and keys to a frequency.

    Args:
        shapes: Every tensor name and its shape.
        config: The contents of config.json.
        anatomy: Its structure.

    Raises:
        UnsupportedError: The family is not known here, or a tensor is not; the message names it.
    """
    family = str(config.get("model_type"))
    if family not in _FAMILIES:
        raise UnsupportedError(
            f"model_type {family!r}: it is not known which permutations leave its output unchanged; known are "
            f"{', '.join(sorted(_FAMILIES))}; of mixtures of experts, 'units: experts' matches the experts alone"
        )
    sizes = _sizes(config, shapes, anatomy)
    found: dict[str, list[Use]] = {"residual": []}
    # sorted, so that nothing depends on the order of files
    for name, shape in sorted(shapes.items()):
        for axis, (units, start, width) in _held(name, shape, family, sizes, anatomy):
            found.setdefault(units, []).append(Use(name, axis, start, width))
    return _assemble(found, shapes, sizes)


def _sizes(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], anatomy: Anatomy) -> _Sizes:
    heads = as_int(config.get("num_attention_heads")) or as_int(config.get("n_head"))
    if anatomy.embedding is None or anatomy.main is None or not heads:
        raise UnsupportedError(
            "it has no embedding, no layers or no number of heads, so its permutations are not known"
        )
    residual = shapes[anatomy.embedding][-1]
    head = as_int(config.get("head_dim")) or residual // heads
    grouped = config.get("model_type") not in _UNGROUPED
    keys = as_int(config.get("num_key_value_heads")) if grouped else None
    return _Sizes(heads, keys or heads, head, residual)


def _held(
    name: str, shape: tuple[int, ...], family: str, sizes: _Sizes, anatomy: Anatomy
) -> list[tuple[int, tuple[str, int, int]]]:
    """Return what a tensor holds: axis, and name of the units, first index and indices of each unit."""
    part = anatomy.parts[name]
    if name.endswith(_IGNORED):
        return []
    if part.stack != anatomy.main or part.layer is None:
        if len(shape) == 2 and part.role in ("embedding", "position", "head") and shape[1] == sizes.residual:
            return [(1, ("residual", 0, 1))]
        if len(shape) == 1 and part.role == "norm" and shape[0] == sizes.residual:
            return [(0, ("residual", 0, 1))]
        if len(shape) == 1 and part.role == "head":
            return []
        raise _unknown(name, shape, family)
    module, _, parameter = name.removeprefix(f"{part.stack}.{part.layer}.").rpartition(".")
    labels = _FAMILIES[family].get(module)
    if labels is None or parameter not in ("weight", "bias"):
        raise _unknown(name, shape, family)
    layer = f"{part.stack}.{part.layer}"
    axes = {0: labels[0]} if len(shape) == 1 else dict(enumerate(reversed(labels) if family in _TRANSPOSED else labels))
    known = len(shape) == 1 or (len(shape) == 2 and labels[1])
    if not known or not all(_fits(label, shape[axis], sizes) for axis, label in axes.items()):
        raise _unknown(name, shape, family)
    return [(axis, each) for axis, label in axes.items() for each in _label(label, layer, shape[axis], sizes)]


def _label(label: str, layer: str, length: int, sizes: _Sizes) -> list[tuple[str, int, int]]:
    """Return the units on an axis: name, first index, and indices of each unit."""
    groups, size = f"{layer} heads", sizes.head
    queries = groups if sizes.heads == sizes.keys else f"{layer} queries"
    if label in ("query_norm", "key_norm"):
        # one norm for every head alike, or one over all heads
        label = "" if length == size else "queries" if label == "query_norm" else "keys"
    found = {
        "": [],
        "residual": [("residual", 0, 1)],
        "hidden": [(f"{layer} mlp", 0, 1)],
        "gate_up": [(f"{layer} mlp", 0, 1), (f"{layer} mlp", length // 2, 1)],
        "queries": [(queries, 0, size)],
        "keys": [(groups, 0, size)],
        "whole_heads": [(groups, 0, 3 * size)],
        "queries_keys_values": [
            (queries, 0, size),
            (groups, sizes.heads * size, size),
            (groups, (sizes.heads + sizes.keys) * size, size),
        ],
    }
    return found[label]


def _fits(label: str, length: int, sizes: _Sizes) -> bool:
    """Return whether an axis has the length that the config says."""
    queries, keys = sizes.heads * sizes.head, sizes.keys * sizes.head
    if sizes.heads % sizes.keys:
        return False
    return {
        "": True,
        "residual": length == sizes.residual,
        "hidden": True,
        "gate_up": length % 2 == 0,
        "queries": length == queries,
        "keys": length == keys,
        "query_norm": length in (sizes.head, queries),
        "key_norm": length in (sizes.head, keys),
        "whole_heads": length == 3 * queries and queries == keys,
        "queries_keys_values": length == queries + 2 * keys,
    }[label]


def _assemble(found: Mapping[str, list[Use]], shapes: Mapping[str, tuple[int, ...]], sizes: _Sizes) -> list[Units]:
    units = []
    for name, uses in found.items():
        kind = name.rpartition(" ")[2]
        if kind == "queries":
            continue
        inner = found.get(f"{name.removesuffix('heads')}queries") if kind == "heads" else None
        size = {"heads": sizes.keys, "residual": sizes.residual}.get(kind, 0)
        if kind == "mlp":
            size = _hidden(name, uses, shapes)
        queries = None if inner is None else Units(f"{name} queries", "heads", sizes.heads, tuple(inner))
        units.append(Units(name, kind, size, tuple(uses), queries))
    return units


def _hidden(name: str, uses: list[Use], shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Return the number of hidden units of an MLP, on which all its tensors must agree."""
    halves = {use.tensor for use in uses if use.start}
    lengths = {shapes[use.tensor][use.axis] // (2 if use.tensor in halves else 1) for use in uses}
    if len(lengths) > 1:
        raise UnsupportedError(f"{name}: its tensors have different numbers of hidden units: {sorted(lengths)}")
    return lengths.pop()


def _unknown(name: str, shape: tuple[int, ...], family: str) -> UnsupportedError:
    shown = "scalar" if not shape else f"shape {list(shape)}, {math.prod(shape):,} elements"
    return UnsupportedError(
        f"{name} ({shown}): it is not known what this tensor of a model of type {family!r} holds, so its units cannot be "
        "permuted"
    )
