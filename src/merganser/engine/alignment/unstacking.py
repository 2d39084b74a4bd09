"""Stacks of experts, read as one tensor per expert and projection: so are float8 models of their families published."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from ...checkpoint import Checkpoint, TensorInfo
from ...checkpoint.derived.unstacked import matrix_of
from ...wording import plural

__all__ = ["unstacked"]

_STACK = re.compile(r"(?P<home>.+\.mlp\.experts)\.gate_up_proj")

# Families of which transformers stacks gate_proj, up_proj and down_proj of `mlp.experts.N` when it loads them, gate above up.
_FAMILIES = frozenset(
    ["deepseek_v2", "deepseek_v3", "dots1", "ernie4_5_moe", "exaone_moe", "flex_olmo", "glm4_moe", "olmoe", "qwen2_moe",
     "qwen3_moe", "qwen3_next", "solar_open"]
)  # fmt: skip


def unstacked(where: str, checkpoint: Checkpoint) -> tuple[Checkpoint, list[str]]:
    """Return a checkpoint with its stacks of experts as single experts, where its family is published so.

    Args:
        where: The checkpoint as the recipe names it.
        checkpoint: An input.

    Returns:
        The checkpoint, and a message if something was unstacked. Stacks of other families, or with biases, stay.
    """
    stacks = dict(_stacks(checkpoint))
    if not stacks:
        return checkpoint, []
    tensors: dict[str, TensorInfo] = {}
    for name, tensor in checkpoint.tensors.items():
        single = stacks.get(name)
        tensors |= {name: tensor} if single is None else single
    message = (
        f"{where}: {plural(len(stacks), 'stack')} of experts such as {next(iter(stacks))} are merged and written one expert at a time, "
        "as programs that load float8 models of this family expect"
    )
    return replace(checkpoint, tensors=tensors), [message]


def _stacks(checkpoint: Checkpoint) -> Iterator[tuple[str, dict[str, TensorInfo]]]:
    """Yield the stacks that can be taken apart, and what they become."""
    config: Mapping[str, Any] = checkpoint.config
    if config.get("model_type") not in _FAMILIES:
        return
    width = config.get("hidden_size")
    for name, both in checkpoint.tensors.items():
        match = _STACK.fullmatch(name)
        down = checkpoint.tensors.get(f"{match['home']}.down_proj") if match is not None else None
        if match is None or down is None or f"{name}_bias" in checkpoint.tensors:
            continue
        if len(both.shape) != 3 or len(down.shape) != 3:
            continue
        count, inner = both.shape[0], down.shape[-1]
        if not isinstance(width, int) or both.shape != (count, 2 * inner, width) or down.shape != (count, width, inner):
            continue
        home = match["home"]
        yield (
            name,
            {
                single: matrix_of(both, number, rows, single)
                for number in range(count)
                for leaf, rows in (("gate_proj", range(inner)), ("up_proj", range(inner, 2 * inner)))
                for single in [f"{home}.{number}.{leaf}.weight"]
            },
        )
        yield (
            down.name,
            {
                single: matrix_of(down, number, range(width), single)
                for number in range(count)
                for single in [f"{home}.{number}.down_proj.weight"]
            },
        )
