"""Infer the structure of a checkpoint from names, shapes and config."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from .roles import SIDE, Part, Position, Role, outside_position, outside_role, role_in_layer
from .settings.config import PREDICTION_KEYS, as_int, is_tied, layer_counts, model_types, text_scopes
from .stacks import Hit, find_stacks, first_in, walk

__all__ = ["Anatomy", "infer_anatomy"]

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Anatomy:
    """The structure of a checkpoint.

    Attributes:
        parts: Every tensor name, with its meaning.
        stacks: Prefix of each indexed stack and its number of layers, the main one first.
        main: The stack that slicing renumbers. None without stacks, and if several candidates are equally likely, as in
            encoder-decoder models.
        n_layers: Number of layers of the main stack; 0 without one.
        tied: `(alias, source)` pairs of names: the alias is absent from the file because it shares the source.
        embedding: Name of the input embedding.
        head: Name of the output matrix over the vocabulary, if the file holds one.
        vocab_size: Rows of the input embedding.
    """

    parts: dict[str, Part]
    stacks: dict[str, int]
    main: str | None
    n_layers: int
    tied: list[tuple[str, str]]
    embedding: str | None
    head: str | None
    vocab_size: int | None

    def rename_layer(self, name: str, new_index: int) -> str:
        """Return the name that the tensor has as part of layer `new_index` of its stack.

        Tensors outside layers keep their name.
        """
        part = self.parts[name]
        if part.layer is None:
            return name
        prefix = f"{part.stack}."
        rest = name[len(prefix) :].partition(".")[2]
        return f"{prefix}{new_index}.{rest}"

    def is_prediction_layer(self, name: str) -> bool:
        """Return whether the tensor is in a multi-token prediction layer, appended to the main stack."""
        part = self.parts[name]
        return part.layer is None and part.stack is not None and part.stack == self.main

    def rename_behind(self, name: str, n_layers: int) -> str:
        """Return the name of a prediction layer's tensor if the main stack had `n_layers` layers.

        Prediction layers stay after the last layer. Other tensors keep their name.
        """
        if not self.is_prediction_layer(name):
            return name
        index, _, rest = name.removeprefix(f"{self.main}.").partition(".")
        return f"{self.main}.{int(index) - self.n_layers + n_layers}.{rest}"

    def layer_count(self, name: str) -> int:
        """Return the number of layers of the tensor's stack; 0 for a tensor outside layers."""
        part = self.parts[name]
        return self.stacks[part.stack] if part.layer is not None and part.stack is not None else 0

    def depth(self, name: str) -> float | None:
        """Return the relative depth of the tensor's layer: 0 for the first, 1 for the last (1 for a single layer).

        In encoder-decoder models the depth is within the tensor's own stack. None for tensors outside layers.
        """
        part = self.parts[name]
        if part.position != "layer" or part.layer is None or part.stack is None:
            return None
        last = self.layer_count(name) - 1
        return part.layer / last if last else 1.0


def infer_anatomy(shapes: Mapping[str, Shape], config: Mapping[str, Any]) -> Anatomy:
    """Infer layers, roles and ties of a checkpoint.

    Args:
        shapes: Every tensor name and its shape.
        config: The contents of config.json; may be empty.
    """
    hits = {name: tuple(walk(name)) for name in shapes}
    stacks = find_stacks(hits, layer_counts(config))
    main = _main_stack(stacks, shapes, hits, config)
    n_layers = _without_prediction_layers(stacks[main], config) if main is not None else 0
    if main is not None:
        stacks[main] = n_layers
    order = sorted(stacks, key=lambda prefix: (prefix != main, "decoder" in prefix, prefix))
    stacks = {prefix: stacks[prefix] for prefix in order}
    parts = _parts(shapes, hits, stacks, main, config)
    embedding = _embedding(parts, shapes, config)
    head = _head(parts, shapes, embedding)
    return Anatomy(
        parts=parts,
        stacks=stacks,
        main=main,
        n_layers=n_layers,
        tied=_ties(parts, shapes, config, embedding, head),
        embedding=embedding,
        head=head,
        vocab_size=shapes[embedding][0] if embedding else None,
    )


def _main_stack(
    stacks: Mapping[str, int], shapes: Mapping[str, Shape], hits: Mapping[str, Sequence[Hit]], config: Mapping[str, Any]
) -> str | None:
    candidates = [prefix for prefix in stacks if not SIDE.search(prefix.lower())] or list(stacks)
    if len(candidates) <= 1:
        return candidates[0] if candidates else None
    mirrored = {prefix.replace("encoder", "decoder") for prefix in candidates if "encoder" in prefix}
    if config.get("is_encoder_decoder") is True or mirrored & set(candidates):
        return None
    counts = layer_counts(config)
    named = [p for p in candidates if stacks[p] in counts or _without_prediction_layers(stacks[p], config) in counts]
    if len(named) <= 1:
        return named[0] if named else None
    weight: Counter[str] = Counter()
    for name, shape in shapes.items():
        if hit := first_in(hits[name], named):
            weight[hit[0]] += math.prod(shape)
    (first, most), (_, second) = weight.most_common(2)
    return first if most >= 2 * second else None


def _without_prediction_layers(found: int, config: Mapping[str, Any]) -> int:
    """Return the number of layers without DeepSeek's prediction layers, which follow the others in the same list."""
    for scope in text_scopes(config):
        for key in PREDICTION_KEYS:
            extra = as_int(scope.get(key))
            if extra and found - extra in layer_counts(config) and found not in layer_counts(config):
                return found - extra
    return found


def _side_prefixes(stacks: Mapping[str, int], main: str | None) -> tuple[str, ...]:
    """Return the root prefixes of towers: each stack's prefix up to the first component that differs from main's."""
    if main is None:
        return ()
    roots = []
    for prefix in stacks:
        words, main_words = prefix.split("."), main.split(".")
        shared = next(
            (i for i, pair in enumerate(zip(words, main_words, strict=False)) if pair[0] != pair[1]), len(main_words)
        )
        if prefix != main and shared < len(words):
            roots.append(".".join(words[: shared + 1]) + ".")
    return tuple(roots)


def _parts(
    shapes: Mapping[str, Shape],
    hits: Mapping[str, Sequence[Hit]],
    stacks: Mapping[str, int],
    main: str | None,
    config: Mapping[str, Any],
) -> dict[str, Part]:
    places = {name: first_in(hits[name], stacks) for name in shapes}
    ssm: dict[tuple[str, int], list[str]] = defaultdict(list)
    for hit in places.values():
        if hit and hit[2].endswith(".A_log"):
            ssm[hit[:2]].append(hit[2].removesuffix(".A_log"))
    has_experts = any("expert" in name or "moe" in name for name in shapes)
    side_prefixes = _side_prefixes(stacks, main)

    def is_side(name: str) -> bool:
        return name.startswith(side_prefixes) or (main is not None and bool(SIDE.search(name.lower())))

    @cache  # layers are alike, and searching names takes most of the time of large plans
    def inside(suffix: str, dimensions: int, ssm_modules: tuple[str, ...]) -> tuple[Role, int | None]:
        role = role_in_layer(suffix, dimensions, ssm_modules=ssm_modules, has_experts=has_experts)
        return role, _expert_index(suffix)

    parts = {}
    for name, shape in shapes.items():
        hit = places[name]
        if hit is None:
            side = is_side(name)
            role = outside_role(name, side=side)
            expert = _expert_index(name) if role == "expert" else None
            parts[name] = Part(name, None, None, _position_outside(name, role, side, config), role, expert)
            continue
        stack, index, suffix = hit
        role, expert = inside(suffix, len(shape), tuple(ssm.get(hit[:2], ())))
        layer = index if index < stacks[stack] else None
        position: Position = "layer" if main in (stack, None) else outside_position(name, role, side=is_side(name))
        if layer is None:
            # A prediction layer has its own embedding and head.
            position, role = "after", outside_role(suffix, side=False) if role == "other" else role
        parts[name] = Part(name, stack, layer, position, role, expert if role == "expert" else None)
    return parts


def _position_outside(name: str, role: Role, side: bool, config: Mapping[str, Any]) -> Position:
    # LFM2's final norm is called "embedding_norm".
    if name.endswith("embedding_norm.weight") and any(kind.startswith("lfm2") for kind in model_types(config)):
        return "after"
    return outside_position(name, role, side=side)


def _expert_index(suffix: str) -> int | None:
    return next((index for prefix, index, _ in walk(suffix) if "expert" in prefix.rsplit(".", 1)[-1]), None)


_EMBEDDING_WORDS = (
    "embed_tokens",
    "wte",
    "word_embeddings",
    "tok_embeddings",
    "embed_in",
    "shared",
    "embeddings",
    "embedding",
)


def _embedding(parts: Mapping[str, Part], shapes: Mapping[str, Shape], config: Mapping[str, Any]) -> str | None:
    sizes = {size for scope in text_scopes(config) if (size := as_int(scope.get("vocab_size"))) is not None}
    best: tuple[tuple[bool, bool, int, str], str] | None = None
    for name, part in parts.items():
        shape = shapes[name]
        if part.role != "embedding" or part.stack is not None or len(shape) != 2 or SIDE.search(name.lower()):
            continue
        module = name.removesuffix(".weight").rsplit(".", 1)[-1]
        if module not in _EMBEDDING_WORDS and shape[0] not in sizes:
            continue
        # T5 and BART: "shared" is the source; the copies in encoder and decoder are aliases.
        word = _EMBEDDING_WORDS.index(module) if module in _EMBEDDING_WORDS else len(_EMBEDDING_WORDS)
        rank = (bool(sizes) and shape[0] not in sizes, module != "shared", word, name)
        if best is None or rank < best[0]:
            best = (rank, name)
    return best[1] if best else None


def _head(parts: Mapping[str, Part], shapes: Mapping[str, Shape], embedding: str | None) -> str | None:
    if embedding is None:
        return None
    rows = shapes[embedding][0]
    fits = [
        name
        for name, part in parts.items()
        if part.role == "head" and part.position == "after" and len(shapes[name]) == 2 and name != embedding
    ]
    named = [name for name in fits if name.removesuffix(".weight").endswith(("lm_head", "embed_out", "proj_out"))]
    return next(iter(sorted(name for name in fits if shapes[name][0] == rows) or sorted(named)), None)


# Names of output matrices other than lm_head.
_HEAD_NAMES = {"gpt_neox": "embed_out.weight", "gpt_neox_japanese": "embed_out.weight", "whisper": "proj_out.weight"}
_LM_SUFFIXES = ("CausalLM", "LMHeadModel", "MaskedLM", "PreTraining", "ConditionalGeneration", "WithLMHead")


def _ties(
    parts: Mapping[str, Part],
    shapes: Mapping[str, Shape],
    config: Mapping[str, Any],
    embedding: str | None,
    head: str | None,
) -> list[tuple[str, str]]:
    if embedding is None:
        return []
    ties = []
    if embedding.rsplit(".", 2)[-2:] == ["shared", "weight"]:
        root = embedding.removesuffix("shared.weight")
        copies = (f"{root}{side}.embed_tokens.weight" for side in ("encoder", "decoder"))
        ties += [(copy, embedding) for copy in copies if copy not in parts]
    architectures = config.get("architectures")
    named = str(architectures[0]) if isinstance(architectures, list) and architectures else None
    has_head = named is None or named.endswith(_LM_SUFFIXES)
    # An unknown config class without the flag: if the file of a language model has no head, it must be tied.
    tied = is_tied(config) if named is None else is_tied(config) is not False
    if head is None and has_head and tied:
        ties += _head_aliases(parts, shapes, config, embedding)
    return ties


def _head_aliases(
    parts: Mapping[str, Part], shapes: Mapping[str, Shape], config: Mapping[str, Any], embedding: str
) -> list[tuple[str, str]]:
    rows = shapes[embedding][0]
    # Encoders store the bias of the tied matrix; the matrix has the same prefix as its bias.
    for name, part in parts.items():
        if part.role == "head" and shapes[name] == (rows,) and name.endswith(".bias"):
            module = name.removesuffix(".bias")
            if any(other.startswith(module + ".") and other != name for other in parts):
                return [(f"{module}.decoder.weight", embedding), (f"{module}.decoder.bias", name)]
            return [(f"{module}.weight", embedding)]
    for kind in model_types(config):
        if kind in _HEAD_NAMES:
            return [(_HEAD_NAMES[kind], embedding)]
    root = "language_model." if embedding.startswith("language_model.") else ""
    return [(f"{root}lm_head.weight", embedding)]
