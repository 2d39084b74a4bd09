"""Signs in names and shapes that a checkpoint is incomplete, or that its config describes other tensors.

These are doubts, not proofs: the layers of a hybrid model differ from each other, and some classes have no final norm.
They decide whether it is worth building the model's class to find out, which takes seconds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from .experts import sizes_of_layers
from .infer import Anatomy, Shape
from .settings.config import is_tied, model_types, text_scopes, words
from .settings.mixtures import numbers_said
from .sizes import size_warnings

__all__ = ["doubts"]

_MOST = 4
"""Largest number of doubts of one kind; one is enough to look closer, and more would hide other messages."""


def _with_biases(modules: str) -> frozenset[str]:
    """Return the names of the weight and the bias of every module."""
    return frozenset(f"{module}.{kind}" for module in modules.split() for kind in ("weight", "bias"))


_LLAMA = """input_layernorm.weight post_attention_layernorm.weight self_attn.q_proj.weight self_attn.k_proj.weight
    self_attn.v_proj.weight self_attn.o_proj.weight mlp.gate_proj.weight mlp.up_proj.weight mlp.down_proj.weight"""
_GEMMA2 = f"{_LLAMA} pre_feedforward_layernorm.weight post_feedforward_layernorm.weight"

_IN_EVERY_LAYER: Mapping[str, frozenset[str]] = {
    **dict.fromkeys(("llama", "mistral", "gemma", "granite", "smollm3"), words(_LLAMA)),
    "qwen2": words(f"{_LLAMA} self_attn.q_proj.bias self_attn.k_proj.bias self_attn.v_proj.bias"),
    "qwen3": words(f"{_LLAMA} self_attn.q_norm.weight self_attn.k_norm.weight"),
    "gemma2": words(_GEMMA2),
    "gemma3_text": words(f"{_GEMMA2} self_attn.q_norm.weight self_attn.k_norm.weight"),
    "olmo2": words(
        """self_attn.q_proj.weight self_attn.k_proj.weight self_attn.v_proj.weight self_attn.o_proj.weight
        self_attn.q_norm.weight self_attn.k_norm.weight post_attention_layernorm.weight
        post_feedforward_layernorm.weight mlp.gate_proj.weight mlp.up_proj.weight mlp.down_proj.weight"""
    ),
    "gpt_neox": _with_biases(
        """input_layernorm post_attention_layernorm attention.query_key_value attention.dense mlp.dense_h_to_4h
        mlp.dense_4h_to_h"""
    ),
    "gpt2": _with_biases("ln_1 ln_2 attn.c_attn attn.c_proj mlp.c_fc mlp.c_proj"),
    "phi": _with_biases(
        "input_layernorm self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.dense mlp.fc1 mlp.fc2"
    ),
    **dict.fromkeys(
        ("bert", "roberta", "xlm-roberta"),
        _with_biases(
            """attention.self.query attention.self.key attention.self.value attention.output.dense
            attention.output.LayerNorm intermediate.dense output.dense output.LayerNorm"""
        ),
    ),
    "phi3": words(
        """input_layernorm.weight post_attention_layernorm.weight self_attn.qkv_proj.weight self_attn.o_proj.weight
        mlp.gate_up_proj.weight mlp.down_proj.weight"""
    ),
}
"""Names that every layer has in the most common classes; a test compares them with the installed transformers."""

_TOGETHER = (
    words("q_proj.weight k_proj.weight v_proj.weight"),
    words("query.weight key.weight value.weight"),
    words("up_proj.weight down_proj.weight"),
    words("fc1.weight fc2.weight"),
    words("dense_h_to_4h.weight dense_4h_to_h.weight"),
)
"""Matrices of one module of which classes have all or none."""

_CAUSAL = ("ForCausalLM", "LMHeadModel")


def doubts(shapes: Mapping[str, Shape], anatomy: Anatomy, config: Mapping[str, Any]) -> list[str]:
    """Return what makes it doubtful that a checkpoint is complete and that its config describes it.

    Args:
        shapes: Every tensor name and its shape.
        anatomy: The structure of these tensors.
        config: config.json; may be empty.

    Returns:
        Sentences without a full stop; empty if there is no doubt.
    """
    layers = _layers(anatomy)
    uneven = list(_uneven_layers(layers))
    incomplete = _incomplete_layers(layers, anatomy, config)
    return [
        *uneven,
        *(each for each in incomplete if not any(other.startswith(each) for other in uneven)),
        *_outside_layers(anatomy, config),
        *size_warnings(config, anatomy, shapes),
        *_other_experts(shapes, config),
    ]


def _other_experts(shapes: Mapping[str, Shape], config: Mapping[str, Any]) -> Iterator[str]:
    """Yield that layers hold other numbers of experts than the config says."""
    held, said = sizes_of_layers(shapes), numbers_said(config)
    if config and not held <= said:
        numbers = " or ".join(map(str, sorted(said))) or "no number of"
        yield f"config.json says {numbers} experts, and layers have {' or '.join(map(str, sorted(held)))}"


def _layers(anatomy: Anatomy) -> dict[str, list[frozenset[str]]]:
    """Return for each stack the names in every layer, without the stack's prefix and the layer's number."""
    names: dict[tuple[str, int], set[str]] = {}
    for name, part in anatomy.parts.items():
        if part.stack is not None and part.layer is not None:
            names.setdefault((part.stack, part.layer), set()).add(name[len(f"{part.stack}.{part.layer}.") :])
    # layers with the same names share one set, so that comparing thousands of layers is fast
    kinds: dict[frozenset[str], frozenset[str]] = {}
    return {
        stack: [kinds.setdefault(each, each) for i in range(count) for each in [frozenset(names.get((stack, i), ()))]]
        for stack, count in anatomy.stacks.items()
    }


def _uneven_layers(layers: Mapping[str, list[frozenset[str]]]) -> Iterator[str]:
    """Yield layers that lack names which most layers have, and have no others instead."""
    for stack, kinds in layers.items():
        counts = Counter(kinds)
        usual = max(counts, key=lambda kind: (counts[kind], len(kind)))
        common = frozenset(name for name, count in _counts(counts).items() if count >= max(len(kinds) - 1, 2))
        lacks = {kind: usual - kind if kind < usual else _unexplained(common - kind, kind - usual) for kind in counts}
        fewer = [index for index, kind in enumerate(kinds) if lacks[kind]]
        for index in fewer[:_MOST]:
            lacking = sorted(lacks[kinds[index]])
            what = "no tensors" if not kinds[index] else f"no {lacking[0]}"
            more = f" and lacks {len(lacking) - 1} more" if kinds[index] and len(lacking) > 1 else ""
            yield f"layer {index} of {stack} has {what}{more}, unlike most layers"


def _counts(kinds: Mapping[frozenset[str], int]) -> Counter[str]:
    """Return the number of layers that have each name."""
    counts: Counter[str] = Counter()
    for kind, count in kinds.items():
        counts.update(dict.fromkeys(kind, count))
    return counts


def _unexplained(lacking: frozenset[str], others: frozenset[str]) -> frozenset[str]:
    """Return the lacking names in whose module the layer has no others instead: such as a dense MLP instead of experts."""
    modules = {name.partition(".")[0] for name in others}
    return frozenset(name for name in lacking if name.partition(".")[0] not in modules)


def _incomplete_layers(
    layers: Mapping[str, list[frozenset[str]]], anatomy: Anatomy, config: Mapping[str, Any]
) -> Iterator[str]:
    """Yield kinds of layers that lack what their class has, a matrix without its counterpart, or some experts."""
    known = next((_IN_EVERY_LAYER[kind] for kind in model_types(config) if kind in _IN_EVERY_LAYER), frozenset())
    seen = 0
    for stack, kinds in layers.items():
        for kind in dict.fromkeys(kinds):
            lacking = sorted((known if stack == anatomy.main else frozenset()) - kind) or _lacking(kind)
            if kind and lacking and seen < _MOST:
                seen += 1
                yield f"layer {kinds.index(kind)} of {stack} has no {lacking[0]}"


def _lacking(names: frozenset[str]) -> list[str]:
    """Return names of matrices, and of experts, whose counterparts are there."""
    modules: dict[str, set[str]] = {}
    experts: dict[tuple[str, str], set[int]] = {}
    for name in names:
        path = name.split(".")
        modules.setdefault(".".join(path[:-2]), set()).add(".".join(path[-2:]))
        for position in range(1, len(path) - 1):
            if path[position].isdecimal() and "expert" in path[position - 1]:
                key = ".".join(path[:position]), ".".join(path[position + 1 :])
                experts.setdefault(key, set()).add(int(path[position]))
    lacking = [
        f"{module}.{name}".lstrip(".")
        for module, held in modules.items()
        for group in _TOGETHER
        if len(group & held) * 2 >= len(group) and not any("qkv" in each or "gate_up" in each for each in held)
        for name in group - held
    ]
    everywhere: dict[str, set[int]] = {}
    for (prefix, _), numbers in experts.items():
        everywhere.setdefault(prefix, set()).update(numbers)
    for (prefix, suffix), numbers in experts.items():
        wanted = set(range(max(everywhere[prefix]) + 1))
        lacking += [f"{prefix}.{number}.{suffix}" for number in wanted - numbers]
    return sorted(lacking)


def _outside_layers(anatomy: Anatomy, config: Mapping[str, Any]) -> Iterator[str]:
    """Yield the embedding, norms and head that are missing outside the layers."""
    if anatomy.stacks and anatomy.embedding is None and any("vocab_size" in scope for scope in text_scopes(config)):
        yield "there is no embedding of tokens"
    norms = [part for part in anatomy.parts.values() if part.role == "norm"]
    for part in norms:
        if part.stack is None and part.name.endswith(".bias") and f"{part.name[:-5]}.weight" not in anatomy.parts:
            yield f"there is {part.name} without its weight"
    architectures = config.get("architectures")
    name = str(architectures[0]) if isinstance(architectures, list) and architectures else ""
    if anatomy.main is None or not name.endswith(_CAUSAL):
        return
    if any(part.layer is not None for part in norms) and not any(part.position == "after" for part in norms):
        yield "there is no norm after the layers"
    if anatomy.head is None and is_tied(config) is False:
        yield "there is no output head, and config.json does not tie it to the embedding"
