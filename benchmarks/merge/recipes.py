"""The recipes that are measured; mergekit reads the same files."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .checkpoints import Models


@dataclass(frozen=True)
class Method:
    """How a method is measured.

    Args:
        base: Whether the base is an input.
        models: Number of experts; None takes all there are.
        weighted: Whether each model has the weight 1 / number of models.
        each: Further parameters of every model.
        shared: Parameters of the method.
        bar: Largest time above start-up, as a multiple of the floor.
        peer_bar: Least number of times that mergekit takes our time.
        base_among_models: Whether the base is listed among the models, too.
    """

    bar: float
    base: bool = True
    models: int | None = None
    weighted: bool = True
    each: Mapping[str, Any] = field(default_factory=dict)
    shared: Mapping[str, Any] = field(default_factory=dict)
    peer_bar: float | None = None
    base_among_models: bool = False


METHODS: Mapping[str, Method] = {
    "linear": Method(1.25, base=False, peer_bar=6),
    "task_arithmetic": Method(1.25),
    "ram": Method(1.25, weighted=False),
    "nearswap": Method(1.25, models=1, weighted=False, shared={"t": 0.0005}),
    "dare_linear": Method(1.25, each={"density": 0.5}),
    "slerp": Method(2, models=1, weighted=False, shared={"t": 0.3}, base_among_models=True),
    "karcher": Method(2, base=False, weighted=False),
    "multislerp": Method(2, base=False),
    "model_stock": Method(2, weighted=False),
    "ties": Method(2, each={"density": 0.5}, peer_bar=20),
    "breadcrumbs": Method(2, each={"density": 0.9, "gamma": 0.01}),
    "sce": Method(2, weighted=False, shared={"select_topk": 0.5}),
    "dare_ties": Method(2, each={"density": 0.5}, peer_bar=15),
    "arcee_fusion": Method(2, models=1, weighted=False),
    "della": Method(5, each={"density": 0.5, "epsilon": 0.1}, peer_bar=15),
}


def inputs(name: str, models: Models) -> list[Path]:
    """Return the folders that a recipe reads, the base first."""
    method = METHODS[name]
    return [*([models.base] if method.base else []), *models.experts[: method.models]]


def recipe(name: str, models: Models) -> str:
    """Return the YAML of a recipe."""
    method = METHODS[name]
    experts = models.experts[: method.models]
    each = {**({"weight": round(1 / len(experts), 6)} if method.weighted else {}), **method.each}
    lines = [f"merge_method: {name}"]
    if method.base:
        lines.append(f"base_model: {json.dumps(str(models.base))}")
    lines.append("models:")
    if method.base_among_models:
        lines.append(f"  - model: {json.dumps(str(models.base))}")
    for expert in experts:
        lines.append(f"  - model: {json.dumps(str(expert))}")
        if each:
            lines.append(f"    parameters: {json.dumps(each)}")
    if method.shared:
        lines.append(f"parameters: {json.dumps(method.shared)}")
    lines.append("dtype: bfloat16")
    return "\n".join(lines) + "\n"
