"""The experts of a mixture in models of transformers, as its classes hold them: in parts that are not public."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "ExpertInputs",
    "expert_matrices",
    "expert_modules",
    "has_gate",
    "has_norm",
    "observed_experts",
    "router_modules",
]


@dataclass(frozen=True, slots=True)
class ExpertInputs:
    """The inputs of one expert of a mixture.

    Args:
        parameter: Name of the stacked parameter in its module: gate_up_proj, up_proj or down_proj.
        expert: Index of the expert.
        rows: The inputs, shape [tokens of the expert, in].
        tokens: Index of each row among the module's tokens, int64, shape [tokens of the expert].
    """

    parameter: str
    expert: int
    rows: Tensor
    tokens: Tensor


def expert_modules(module: nn.Module) -> dict[str, nn.Module]:
    """Return the modules within `module` that hold a mixture's experts as stacked parameters, by name."""
    return {name: each for name, each in module.named_modules() if hasattr(each, "_apply_gate")}


def router_modules(module: nn.Module) -> dict[str, nn.Module]:
    """Return the routers within `module` that are not linear layers of their own class, by name.

    A router stands beside the experts, and has a row of its weight for each of them.
    """
    found = {}
    modules = dict(module.named_modules())
    for name, experts in expert_modules(module).items():
        parent = name.rpartition(".")[0]
        for own in ("gate", "router"):
            router = modules.get(f"{parent}.{own}" if parent else own)
            weight = getattr(router, "weight", None)
            if (
                router is not None
                and isinstance(weight, Tensor)
                and weight.dim() == 2
                and len(weight) == experts.num_experts
            ):
                found[f"{parent}.{own}" if parent else own] = router
    return found


def expert_matrices(experts: Any) -> dict[str, int]:
    """Return the stacked parameters of a module of experts, and the axis of each that is contracted with the input."""
    axis = 1 if experts.is_transposed else 2
    return dict.fromkeys(("gate_up_proj" if has_gate(experts) else "up_proj", "down_proj"), axis)


def has_gate(experts: Any) -> bool:
    """Return whether experts multiply by a gate; those of older versions of transformers, which do not say, do."""
    return bool(getattr(experts, "has_gate", True))


def has_norm(experts: Any) -> bool:
    """Return whether experts normalise their outputs; those of older versions, which do not say, do not."""
    return bool(getattr(experts, "has_post_expert_norm", False))


def observed_experts(experts: Any, observe: Callable[[ExpertInputs], None]) -> Callable[..., Tensor]:
    """Return a forward for a module of experts that passes every expert's inputs to `observe`; results are unchanged.

    Args:
        experts: A module that `expert_modules` returned.
        observe: Called for both matrices of every expert that receives tokens.
    """
    return partial(_forward_experts, experts, observe)


def _forward_experts(
    experts: Any,
    observe: Callable[[ExpertInputs], None],
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
) -> Tensor:
    """Compute the same as transformers' grouped form, with every operation on the same rows in the same order."""
    first, second = expert_matrices(experts)
    count, top_k = top_k_index.shape
    chosen, order = torch.sort(top_k_index.reshape(-1))
    tokens = order // top_k
    ends = torch.searchsorted(chosen, torch.arange(experts.num_experts), right=True).tolist()

    def multiply(name: str, rows: Tensor) -> Tensor:
        weight: Tensor = getattr(experts, name) if experts.is_transposed else getattr(experts, name).transpose(1, 2)
        product = rows.new_empty(len(rows), weight.shape[2])
        for expert, (start, end) in enumerate(pairwise([0, *ends])):
            if start < end:
                observe(ExpertInputs(name, expert, rows[start:end], tokens[start:end]))
                torch.mm(rows[start:end], weight[expert], out=product[start:end])
        return product.add_(getattr(experts, f"{name}_bias")[chosen]) if experts.has_bias else product

    inner = multiply(first, hidden_states[tokens])
    outputs = multiply(second, experts._apply_gate(inner) if has_gate(experts) else experts.act_fn(inner))
    if has_norm(experts):
        outputs = experts.post_expert_norm(outputs)
    # weights may be wider than the outputs
    products = outputs * top_k_weights.reshape(-1)[order, None]
    weighted = torch.empty_like(products)
    weighted[order] = products
    return weighted.view(count, top_k, -1).sum(dim=1).to(hidden_states.dtype)
