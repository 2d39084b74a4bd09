"""Which tensors of an output are stored as float8, and what its config says of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ...anatomy.roles import SIDE
from ...checkpoint.float8 import FLOAT8_SCHEMES, Float8, float8_settings
from ...errors import RecipeError
from ...recipe import Recipe
from ...wording import plural
from .tensor import PlannedTensor, Quantised

_LINEAR = ("attention", "mlp", "expert")
"""Roles of the matrices of linear layers; embeddings, heads, norms, routers and recurrences keep their precision."""

# Classes whose linear layers (Conv1D) store weights as [in, out]; no program reads these as float8.
_TURNED = ("GPT2", "OpenAIGPT", "ImageGPT", "DecisionTransformer")


_JOINED = (".self_attn.q_proj.weight", ".self_attn.k_proj.weight", ".gate_proj.weight")
"""Matrices that vLLM joins with the one behind them: queries, keys and values; gate and up projections."""


def quantise_output(
    recipe: Recipe, drafts: Sequence[PlannedTensor], config: Mapping[str, Any]
) -> tuple[list[PlannedTensor], dict[str, Any], list[str]]:
    """Store the weights of linear layers as the recipe's `quantize` says.

    Returns:
        The tensors, the config with its `quantization_config`, and warnings.

    Raises:
        RecipeError: This output cannot be stored so.
    """
    if recipe.quantize is None:
        return list(drafts), dict(config), []
    place = recipe.place_of("quantize")
    scheme = FLOAT8_SCHEMES[recipe.quantize]
    if not config:
        raise RecipeError(f"{place}: the output has no config.json, without which no program knows what the scales are")
    named = next((name for name in config.get("architectures") or () if str(name).startswith(_TURNED)), None)
    if named is not None:
        raise RecipeError(f"{place}: {named} stores the weights of its layers turned, which no program reads as float8")
    if any(draft.method.sidecar is not None for draft in drafts):
        raise RecipeError(
            f"{place}: the method stores what restores each model from the merged weights, and these must not be rounded "
            "to float8; leave 'quantize' out"
        )
    names = {draft.name for draft in drafts}
    tensors = [_quantised(draft, scheme) if _is_linear(draft) else draft for draft in drafts]
    for tensor in tensors:
        if tensor.quantised is not None and tensor.scale_name in names:
            raise RecipeError(f"{place}: the scales of {tensor.name} need the name of another tensor of the output")
    if all(tensor.quantised is None for tensor in tensors):
        raise RecipeError(f"{place}: none of the output's tensors is the weight of a linear layer in a layer")
    settings = float8_settings(scheme, _kept(tensors))
    return tensors, {**config, "quantization_config": settings}, _warnings(tensors, scheme)


def _is_linear(draft: PlannedTensor) -> bool:
    return (
        not draft.copy
        and draft.layer is not None
        and len(draft.shape) == 2
        and draft.size > 0
        and draft.role in _LINEAR
        and draft.name.endswith(".weight")
        and SIDE.search(draft.name.lower()) is None
    )


def _quantised(draft: PlannedTensor, scheme: Float8) -> PlannedTensor:
    """Return a tensor with whole tiles in every block, so that a block's scales need its own rows alone."""
    columns = draft.shape[1]
    height = scheme.tile[0]
    rows = max(draft.block_limit // (columns * height), 1) * height
    return replace(draft, quantised=Quantised(scheme), block_limit=rows * columns)


def _kept(tensors: Sequence[PlannedTensor]) -> list[str]:
    """Return the modules that programs could take for linear layers and that are not float8."""
    found = {"lm_head": None}
    for tensor in tensors:
        module, _, last = tensor.name.rpartition(".")
        matrix = last == "weight" and len(tensor.shape) == 2 and tensor.role not in ("embedding", "norm")
        if tensor.quantised is None and module and (matrix or _is_packed(tensor)):
            found[module] = None
    return list(found)


def _is_packed(tensor: PlannedTensor) -> bool:
    return tensor.role == "expert" and len(tensor.shape) == 3


def _warnings(tensors: Sequence[PlannedTensor], scheme: Float8) -> list[str]:
    warnings = []
    partial = [
        t.name
        for t in tensors
        if t.quantised is not None and any(n % m for n, m in zip(t.shape, scheme.tile, strict=True) if m)
    ]
    if partial:
        warnings.append(
            f"quantize: {plural(len(partial), 'weight')} such as {partial[0]} {_shape(tensors, partial[0])} "
            f"{'has' if len(partial) == 1 else 'have'} tiles of less than {scheme.tile[0]} x {scheme.tile[1]} at the edges, which "
            "transformers refuses where there is no GPU, as other programs may; fp8_channel fits every shape"
        )
    height = scheme.tile[0]
    joined = [t.name for t in tensors if t.quantised is not None and t.name.endswith(_JOINED) and t.shape[0] % height]
    if joined:
        warnings.append(
            f"quantize: not for vLLM, which refuses it or takes other scales: it joins {joined[0]} {_shape(tensors, joined[0])} with the matrix behind it, "
            f"whose tiles would then begin within one of {height} rows; fp8_channel fits every shape"
        )
    packed = [t.name for t in tensors if _is_packed(t)]
    if packed:
        warnings.append(
            f"quantize: {plural(len(packed), 'stack')} of experts such as {packed[0]} "
            f"{'keeps its' if len(packed) == 1 else 'keep their'} precision: no program is known to read stacks of this family as "
            "float8; only experts that are stored one by one, or can be taken apart, become float8"
        )
    return warnings


def _shape(tensors: Sequence[PlannedTensor], name: str) -> list[int]:
    return list(next(tensor.shape for tensor in tensors if tensor.name == name))
