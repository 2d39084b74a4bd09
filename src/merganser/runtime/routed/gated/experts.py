"""Experts: copies of a model's attention or MLP with the tensors of a task."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from ....errors import UnsupportedError
from ...libraries import cache_utils
from ..tasks import Factors, TaskSet
from .parts import task_tensor

__all__ = ["ROLES", "Change", "Changes", "collect_experts", "expert_of", "find_modules", "with_shared_keys"]

ROLES = {"self_attn": "attention", "mlp": "mlp"}
"""What the modules of a layer are, by the last word of their names."""

_MODELS = (
    "cohere",
    "cohere2",
    "gemma",
    "gemma2",
    "gemma3_text",
    "granite",
    "llama",
    "mistral",
    "olmo2",
    "phi3",
    "qwen2",
    "qwen3",
    "smollm3",
)
"""Types of models whose layers were tried with experts."""

_MODULE = re.compile(r"(^|\.)layers\.\d+\.(self_attn|mlp)$")
_KEYS = ("k_proj", "v_proj", "k_norm")
_FUSED = "qkv_proj"

Change = Factors | Tensor | None
"""A tensor of a task: left and right factors of what it adds to the shared model's, or the whole; None where it is that."""

Changes = Mapping[str, Sequence[Change]]
"""By the name of a tensor, those of all tasks."""


def find_modules(model: Any, where: str) -> dict[str, Any]:
    """Return the modules of a model that may have experts, by name.

    Args:
        model: A causal language model of transformers.
        where: "mlp", "attention", or "all".

    Raises:
        UnsupportedError: The model is of a type that was not tried, or its layers need another cache than keys and values.
    """
    config = model.config
    if config.model_type not in _MODELS:
        raise UnsupportedError(
            f"experts whose outputs are mixed (bam): models of type {config.model_type!r} are not supported; "
            f"{', '.join(_MODELS)} are. Other kinds of gates take more types"
        )
    utils = cache_utils()
    layers = utils.DynamicCache(config=config).layers
    others = {type(each).__name__ for each in layers} - {"DynamicLayer", "DynamicSlidingWindowLayer"}
    if others:
        raise UnsupportedError(
            f"experts whose outputs are mixed (bam): the model's cache has layers of {', '.join(sorted(others))}; attention to "
            "all tokens before, or to the last ones, is supported"
        )
    found = {name: module for name, module in model.named_modules() if _MODULE.search(name)}
    return {name: module for name, module in found.items() if where in ("all", ROLES[name.rpartition(".")[2]])}


def collect_experts(tasks: TaskSet, shared: Mapping[str, Tensor], modules: Mapping[str, Any]) -> tuple[Changes, int]:
    """Read the tensors that the tasks have in some modules.

    Args:
        tasks: The tasks.
        shared: Tensors of the shared model, by name.
        modules: Modules of the loaded model, by name.

    Returns:
        The tensors that are not the shared model's in all tasks; and how many other tensors tasks have that are not those of
        the shared model, which are not used.

    Raises:
        CheckpointError: A task has no such tensor, or another shape.
        UnsupportedError: A tensor has another name in the checkpoint than in the loaded model.
    """
    weights = {task: tasks.weights(task) for task in tasks.tasks}
    found: dict[str, Sequence[Change]] = {}
    used: set[str] = set()
    for site, module in modules.items():
        for leaf, _ in module.named_parameters():
            name = f"{site}.{leaf}"
            if name not in shared:
                raise UnsupportedError(
                    f"{tasks.name}: {name} has another name in the checkpoint, so its experts cannot be read"
                )
            used.add(name)
            factored = isinstance(module.get_submodule(leaf.rpartition(".")[0]), torch.nn.Linear)
            own = [_change(tasks, task, name, shared[name], factored=factored) for task in tasks.tasks]
            if any(change is not None for change in own):
                found[name] = own
    others = {name for own in weights.values() for name in own if name not in own.shared} - used
    return found, len(others)


def _change(tasks: TaskSet, task: str, name: str, base: Tensor, *, factored: bool) -> Change:
    if name in tasks.weights(task).shared:
        return None
    factors = tasks.factors(task, name) if factored and name.endswith(".weight") else None
    if factors is not None:
        return factors
    value = task_tensor(tasks, task, name, base)
    same = torch.promote_types(value.dtype, base.dtype)
    return None if torch.equal(value.to(same), base.to(same)) else value


def with_shared_keys(changes: Changes, modules: Mapping[str, Any]) -> Changes:
    """Replace keys and values by their mean over the tasks, which is computed in float32 and rounded once.

    Args:
        changes: Tensors of the tasks.
        modules: Attention modules of the shared model, by name; others are left as they are.
    """
    found = dict(changes)
    for site, module in modules.items():
        for leaf, parameter in module.named_parameters():
            name, first = f"{site}.{leaf}", leaf.partition(".")[0]
            if name not in changes or first not in (*_KEYS, _FUSED):
                continue
            whole = [_whole(change, parameter) for change in changes[name]]
            total = reduce(torch.add, (each.to(_wide(each)) for each in whole))
            mean = (total / len(whole)).to(parameter.dtype)
            if first in _KEYS:
                found[name] = [mean] * len(whole)
                continue
            queries = module.config.num_attention_heads * module.head_dim
            found[name] = [torch.cat([each[:queries].to(mean), mean[queries:]]) for each in whole]
    return found


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _whole(change: Change, parameter: Tensor) -> Tensor:
    base = parameter.detach()
    if change is None:
        return base
    if isinstance(change, tuple):
        left, right = (each.to(base.device, _wide(base)) for each in change)
        return base.to(_wide(base)) + left @ right
    return change.to(base.device)


def expert_of(module: Any, changes: Mapping[str, Change]) -> Any:
    """Return a copy of a module with the tensors of a task; what the task does not change is not copied.

    Args:
        module: The shared model's.
        changes: Tensors of the task, by their names in the module.
    """
    # deepcopy takes what the memo has in place of a copy
    memo: dict[int, Any] = {id(each.config): each.config for each in module.modules() if hasattr(each, "config")}
    low = {}
    for name, parameter in module.named_parameters():
        change = changes.get(name)
        if isinstance(change, tuple):
            low[name.removesuffix(".weight")] = tuple(each.to(parameter.device, parameter.dtype) for each in change)
        own = change.to(parameter.device, parameter.dtype) if isinstance(change, Tensor) else None
        memo[id(parameter)] = parameter if own is None else torch.nn.Parameter(own, requires_grad=False)
    made = copy.deepcopy(module, memo)
    for name, (left, right) in low.items():
        made.get_submodule(name).register_forward_hook(partial(_add, left, right))
    return made


def _add(left: Tensor, right: Tensor, module: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """Add what an adapter adds to the output of a linear layer."""
    return output + linear(linear(args[0], right), left)
