"""Read the YAML of mergekit-evolve as a recipe with open values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..adapters import open_reference
from ..anatomy.settings.config import layer_counts
from ..errors import UnsupportedError
from ..recipe.document.parsing import Document
from ..recipe.document.place import Entry, Place
from ..wording import brief

_KEYS = (
    "genome",
    "tasks",
    "limit",
    "num_fewshot",
    "shuffle",
    "random_init",
    "apply_chat_template",
    "fewshot_as_multiturn",
    "model_name",
)
_WITHOUT_EFFECT = ("shuffle", "random_init", "model_name")
"""Keys that change nothing here; mergekit-evolve itself ignores the last one, which real files have."""
_GENOME = (
    "models",
    "merge_method",
    "base_model",
    "tokenizer_source",
    "layer_granularity",
    "normalize",
    "allow_negative_weights",
    "filters",
    "smooth",
)
_OPEN = {
    "linear": ("weight",),
    "task_arithmetic": ("weight",),
    "ties": ("weight", "density"),
    "dare_ties": ("weight", "density"),
    "slerp": ("t",),
}
"""Parameters that mergekit-evolve searches, by method."""

_METRIC = "acc"
"""What a task is judged by where nothing is said."""

_NORMALISED = ("linear", "ties", "dare_ties")
_OF_TASK_VECTORS = ("task_arithmetic", "ties", "dare_ties")

_PASSED = ("num_fewshot", "apply_chat_template", "fewshot_as_multiturn")
"""Keys that are arguments of lm-eval."""


@dataclass(frozen=True)
class Evolve:
    """What a file of mergekit-evolve says.

    Args:
        recipe: The genome, as a recipe with open values.
        tasks: Names of tasks of lm-eval.
        objective: The weighted sum of their metrics; None without tasks.
        limit: Number of items of each task; None for all.
        arguments: Arguments of lm-eval.
        without_effect: Keys of the file that change nothing here.
    """

    recipe: dict[str, Any]
    tasks: tuple[str, ...] = ()
    objective: str | None = None
    limit: int | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    without_effect: tuple[str, ...] = ()


def read_evolve(document: Document, cache_dir: Path | None = None) -> Evolve | None:
    """Return what a file of mergekit-evolve says.

    Args:
        document: What may be the YAML of mergekit-evolve.
        cache_dir: Folder for models from the Hub.

    Returns:
        None if it is another recipe.

    Raises:
        RecipeError: A key is unknown, or a value is wrong.
        UnsupportedError: The genome asks for what a recipe cannot say.
    """
    root = document.root
    if not isinstance(root.value, dict) or "genome" not in root.value or "merge_method" in root.value:
        return None
    fields = Entry(root, Place(document.file, root.line, "")).mapping(_KEYS, required=["genome"])
    tasks = [_task(item) for item in fields["tasks"].items()] if "tasks" in fields else []
    genome = fields["genome"].mapping(_GENOME, required=["models", "merge_method"])
    return Evolve(
        _recipe(genome, cache_dir),
        tuple(dict.fromkeys(name for name, _ in tasks)),
        "+".join(term for _, term in tasks) or None,
        fields["limit"].whole_number(1) if "limit" in fields else None,
        {name: _argument(name, fields[name]) for name in _PASSED if name in fields},
        tuple(name for name in _WITHOUT_EFFECT if name in fields),
    )


def _argument(name: str, entry: Entry) -> Any:
    return entry.whole_number() if name == "num_fewshot" else entry.flag()


def _task(entry: Entry) -> tuple[str, str]:
    """Return the name of a task, and its term of the objective."""
    if isinstance(entry.value, str):
        return entry.text(), f"{entry.text()}/{_METRIC}"
    fields = entry.mapping(("name", "weight", "metric"), required=["name"])
    name, metric = fields["name"].text(), fields["metric"].text() if "metric" in fields else _METRIC
    weight = fields["weight"].value if "weight" in fields else 1.0
    if isinstance(weight, bool) or not isinstance(weight, int | float) or weight <= 0:
        raise fields["weight"].error(
            f"must be a number above 0, got {brief(weight)}: metrics of which less is better are known as such; for others give "
            "--tasks and --objective"
        )
    # a filter without a name is not written
    return name, f"{weight:g}*{name}/{metric.removesuffix(',none')}"


def _recipe(genome: Mapping[str, Entry], cache_dir: Path | None) -> dict[str, Any]:
    method = genome["merge_method"].choice([*_OPEN])
    models = [item.text() for item in genome["models"].items()]
    base = genome["base_model"].text() if "base_model" in genome else None
    smooth = genome["smooth"].flag() if "smooth" in genome else False
    size = genome["layer_granularity"].whole_number() if "layer_granularity" in genome else 0
    filters = [item.text() for item in genome["filters"].items()] if "filters" in genome else []
    if method in _OF_TASK_VECTORS:
        # the base has no task vector, so a weight of it would be a free value without effect
        models = [model for model in models if model != base]
    if method == "slerp" and (len(models) != 2 or smooth or filters):
        raise UnsupportedError(
            f"{genome['merge_method'].place}: slerp is searched between two models, without smooth and filters"
        )
    layers = _layers(models[0], genome, cache_dir) if size else 0
    if size and layers % size:
        raise genome["layer_granularity"].error(f"must divide the {layers} layers of {models[0]}, got {size}")
    low = -1 if "allow_negative_weights" in genome and genome["allow_negative_weights"].flag() else 0
    groups = layers // size if size else 1
    # mergekit-evolve writes every merge in bfloat16
    recipe: dict[str, Any] = {"merge_method": method, "dtype": "bfloat16"}
    recipe |= {key: genome[key].text() for key in ("base_model", "tokenizer_source") if key in genome}
    if method == "slerp":
        recipe.setdefault("base_model", models[0])
        shared, own = {"t": {"search": [0, 1]}}, {}
    else:
        shared = {}
        own = {name: _open(name, low, filters, groups if smooth else 1) for name in _OPEN[method]}
        if "normalize" in genome or method in _NORMALISED:
            recipe["parameters"] = {"normalize": genome["normalize"].flag() if "normalize" in genome else True}
    sources = [{"model": model, **({"parameters": own} if own else {})} for model in models]
    if base is not None and base not in models:
        sources.append({"model": base})
    if groups == 1 or smooth:
        # one range of all layers, or a schedule along them
        recipe["parameters"] = {**recipe.get("parameters", {}), **shared}
        return recipe | {"models": sources}
    recipe["slices"] = [
        {
            "sources": [{**source, "layer_range": [first, first + size]} for source in sources],
            **({"parameters": shared} if shared else {}),
        }
        for first in range(0, layers, size)
    ]
    return recipe


def _open(name: str, low: int, filters: list[str], groups: int) -> Any:
    """Return the open value of one parameter of one model: along the depth, and by filter."""
    one = {"search": [low, 1] if name == "weight" else [0.05, 1]}
    value: Any = [dict(one) for _ in range(groups)] if groups > 1 else one
    if not filters:
        return value
    return [*({"filter": word, "value": value} for word in filters), {"value": value}]


def _layers(model: str, genome: Mapping[str, Entry], cache_dir: Path | None) -> int:
    found = layer_counts(open_reference(model, cache_dir=cache_dir).config)
    if len(found) != 1:
        raise genome["layer_granularity"].error(f"the number of layers of {model} is not known")
    return found.pop()
