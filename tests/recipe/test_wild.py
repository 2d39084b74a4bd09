"""Recipes as people write them for mergekit: each of its methods, every form of parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from merganser.recipe import ModelReference, Resolver, check_recipe, layer_depth, load_recipes

FOLDER = Path(__file__).with_name("wild")
FILES = sorted(FOLDER.glob("*.yaml"))
# those that mergekit 0.1.5 has
METHODS = [
    "arcee_fusion",
    "breadcrumbs",
    "breadcrumbs_ties",
    "dare_linear",
    "dare_ties",
    "della",
    "della_linear",
    "karcher",
    "linear",
    "model_stock",
    "multislerp",
    "nearswap",
    "nuslerp",
    "passthrough",
    "ram",
    "ramplus_tl",
    "sce",
    "slerp",
    "task_arithmetic",
    "ties",
]


def resolvers(name: str) -> list[Resolver]:
    return [check_recipe(recipe) for recipe in load_recipes(FOLDER / f"{name}.yaml")]


def test_every_method_is_tried() -> None:
    assert sorted({recipe.merge_method for file in FILES for recipe in load_recipes(file)}) == METHODS


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_resolves_for_every_tensor(file: Path) -> None:
    for resolver in resolvers(file.stem):
        for piece in range(len(resolver.slices)):
            models = resolver.sources(piece).models
            for layer in range(4):
                for part in ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj", "input_layernorm"):
                    name = f"model.layers.{layer}.{part}.weight"
                    found = resolver.parameters(piece, name, [name] * len(models), layer_depth(layer, 4))
                    assert list(found) == list(resolver.method.parameters)


@pytest.mark.parametrize(
    ("name", "tensor", "t", "expected"),
    [
        ("slerp-slices", "model.layers.1.self_attn.q_proj.weight", 0.25, {"t": 0.5}),
        ("slerp-slices", "model.layers.1.mlp.up_proj.weight", 0.375, {"t": 0.6}),
        ("slerp-slices", "lm_head.weight", 1.0, {"t": 0.5}),
        ("dare-ties-seeded", "x", 0.0, {"weight": (0.4, 0.3, 0.3), "density": (0.53,) * 3}),
        ("ties-gradients", "x", 0.5, {"weight": (1.0, 0.5, 0.0), "density": (0.7, 0.5, 0.33)}),
        ("ties-gradients", "mlp", 1.0, {"weight": (1.0, 1.0, 0.5), "density": (0.1, 0.5, 0.33), "normalize": True}),
        ("passthrough-models", "model.layers.3.mlp.down_proj.weight", 0.5, {"scale": (0.0,)}),
        ("linear-layered", "x", 0.5, {"weight": (0.5, 0.75), "normalize": True}),
        ("task-arithmetic", "x", 0.5, {"weight": (1.0, -0.5), "lambda": 0.8, "normalize": False}),
        ("dare-linear-anchors", "x", 0.5, {"weight": (0.5, 0.25), "density": (0.9, 0.9), "lambda": 1.05}),
        ("della", "x", 0.5, {"density": (0.6, 0.5), "epsilon": (0.1, 0.05), "lambda": 1.1}),
        ("breadcrumbs", "x", 0.5, {"gamma": (0.01, 0.01), "density": (0.9, 0.9)}),
        ("nuslerp", "model.layers.0.x", 0.0, {"weight": (0.3, 0.5), "nuslerp_flatten": False}),
        ("karcher", "x", 0.0, {"max_iter": 100, "tol": 1e-9}),
        ("nearswap", "x", 0.0, {"t": 1e-4}),
        ("sce", "x", 1.0, {"select_topk": 0.5}),
    ],
)
def test_values(name: str, tensor: str, t: float, expected: dict[str, Any]) -> None:
    (resolver,) = resolvers(name)
    found = resolver.parameters(0, tensor, [tensor] * len(resolver.sources(0).models), t)
    assert {key: found[key] for key in expected} == {
        key: pytest.approx(value, rel=1e-15) if not isinstance(value, bool) else value
        for key, value in expected.items()
    }


def test_tokenizer_seed_and_template() -> None:
    assert resolvers("linear-layered")[0].recipe.tokenizer_donor == ModelReference("org/B")
    assert resolvers("model-stock")[0].recipe.tokenizer_donor == ModelReference("org/Base-8B")
    assert resolvers("dare-ties-seeded")[0].recipe.random_seed == 0
    assert "<|im_start|>" in (resolvers("breadcrumbs")[0].recipe.chat_template or "")


def test_compat_brings_the_numbers_of_mergekit() -> None:
    (resolver,) = resolvers("della-linear")
    assert resolver.parameters(0, "x", ["x"], 0.0)["rescale_to"] == "l1"
    assert resolver.differences() == []
    (resolver,) = resolvers("della")
    assert resolver.parameters(0, "x", ["x", "x"], 0.0)["rescale_to"] == "expectation"
    assert len(resolver.differences()) == 2
