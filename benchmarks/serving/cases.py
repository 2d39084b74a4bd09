"""The outputs that are served, each made by commands of merganser."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from . import tiny
from .work import ADAPTERS, TASKS, Work

FLOAT32 = 2e-3
"""Nats by which log-probabilities may differ in float32, as sums are rounded in another order and mlx has its own exponential."""

TEXTS = (
    "The patient has a fever and a cough. The doctor",
    "Tom has 3 apples and buys 4 more. How many apples",
    "module Main where\n\nmain :: IO ()\nmain =",
)


@dataclass(frozen=True)
class Case:
    """An output, and how it is compared.

    Args:
        name: Its name.
        what: What it is, for the table.
        make: Returns the folder that is served.
        adapters: Returns adapters that are served beside it, by name.
        reference: What transformers loads instead of that folder, where it cannot load that.
        define: Whether the reference is a dense model, with the experts of the folder put in by the definition of
            DeepSeek-MoE.
        rank: Largest rank of the adapters that vLLM makes room for.
        stand_in: Whether float8 weights are multiplied by the stand-in for vLLM's kernels.
        tolerance: Largest difference of log-probabilities, in nats; None if none is expected to hold.
        because: Why.
        mlx: Whether mlx-lm loads it, too.
    """

    name: str
    what: str
    make: Callable[[Work], Path]
    adapters: Callable[[Work], Mapping[str, Path]] | None = None
    reference: Callable[[Work], Path] | None = None
    define: bool = False
    rank: int = 16
    stand_in: bool = False
    tolerance: float | None = FLOAT32
    because: str = ""
    mlx: bool = False
    texts: tuple[str, ...] = field(default=TEXTS)


def small(work: Work, family: str, seed: int) -> Path:
    """Return a tiny model."""
    return work.made(f"tiny-{family}-{seed}", partial(tiny.write, family=family, seed=seed))


def pair(work: Work, family: str) -> list[dict[str, Any]]:
    """Return the entries of two tiny models in a recipe."""
    return [{"model": str(small(work, family, seed)), "parameters": {"weight": 0.5}} for seed in (1, 2)]


def ties(work: Work, **keys: Any) -> dict[str, Any]:
    """Return a recipe that merges two experts of the zoo."""
    models = [{"model": str(work.experts[name])} for name in ("maths", "medicine")]
    own = {"weight": 0.7, "density": 0.3}
    return {"merge_method": "ties", "base_model": str(work.base), "models": models, "parameters": own, **keys}


def dense(work: Work) -> Path:
    return work.merge("dense", ties(work))


def stack(work: Work) -> Path:
    parts = [(work.base, [0, 20]), (work.experts["maths"], [10, 30])]
    slices = [{"sources": [{"model": str(model), "layer_range": span}]} for model, span in parts]
    return work.merge("stack", {"merge_method": "passthrough", "slices": slices, "dtype": "bfloat16"})


def union(work: Work) -> Path:
    grown = [
        work.made(f"grown-{name}", partial(tiny.grow, model=work.experts[name], tokens=tokens))
        for name, tokens in (("maths", ["<think>", "</think>"]), ("haskell", ["</think>", "<tool>", "<think>"]))
    ]
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": str(work.base),
        "models": [{"model": str(path)} for path in grown],
        "parameters": {"weight": 0.5},
        "tokenizer_source": "union",
    }
    return work.merge("union", recipe)


def transplant(work: Work) -> Path:
    text = work.texts["middle_english"]
    return work.command("transplant", "transplant", work.base, "--text", text, "--new-tokens", "300")


def on_base(work: Work, adapter: str) -> dict[str, str]:
    return {"model": f"{work.base}+{ADAPTERS / adapter}"}


def with_adapters(work: Work) -> Path:
    models = [on_base(work, name) for name in ("maths", "haskell")]
    recipe = {"merge_method": "linear", "models": models, "parameters": {"weight": 0.5}, "dtype": "bfloat16"}
    return work.merge("with-adapters", recipe)


def merged_adapters(work: Work) -> dict[str, Path]:
    models = [{"model": str(ADAPTERS / name)} for name in TASKS]
    cat = {"merge_method": "add_weighted_adapter", "parameters": {"weight": 0.25, "combination_type": "cat"}}
    return {
        "maths": ADAPTERS / "maths",
        "merged: iso_c": work.merge("adapter-iso", {"merge_method": "iso_c", "models": models, "rank": 16}),
        "merged: cat": work.merge("adapter-cat", {**cat, "models": models}),
    }


def extracted(work: Work) -> dict[str, Path]:
    given = (work.experts["maths"], "--base", work.base, "--rank", "8")
    return {
        "factors alone": work.command("extract", "extract", *given, "--others", "drop", "--embeddings", "drop"),
        "by default": work.command("extract-whole", "extract", *given),
    }


def extracted_tiny(work: Work) -> dict[str, Path]:
    given = (small(work, "llama-tied", 1), "--base", small(work, "llama-tied", 0), "--rank", "8", "--others", "drop")
    return {
        "embeddings left": work.command("extract-tied", "extract", *given, "--embeddings", "drop"),
        "embeddings in factors": work.command("extract-tied-low", "extract", *given, "--embeddings", "low-rank"),
    }


def sidecars(work: Work, method: str, family: str, name: str, **own: Any) -> Path:
    models = [{"model": str(small(work, family, seed)), "name": f"task{seed}"} for seed in (1, 2)]
    base = str(small(work, family, 0))
    return work.merge(name, {"merge_method": method, "base_model": base, "models": models, "parameters": own})


def exported(work: Work, out: Path, name: str) -> dict[str, Path]:
    folder = work.command(name, "export", out, out="")
    return {f"{name}: {path.name}": path for path in sorted(folder.iterdir())}


def twin(work: Work) -> Path:
    return sidecars(work, "twin", "llama", "twin", rank=0.25, others="merged")


def twin_whole(work: Work) -> Path:
    return sidecars(work, "twin", "llama", "twin-whole", rank=0.25)


def skillpack(work: Work) -> Path:
    return sidecars(work, "skillpack", "llama", "skillpack-merged", rank=0.25, others="merged", origin="merged")


def skillpack_on_base(work: Work) -> Path:
    return sidecars(work, "skillpack", "llama", "skillpack", rank=0.25, others="merged")


def float8(work: Work, family: str, scheme: str) -> Path:
    if family == "zoo":
        return work.merge(f"{scheme}-zoo", ties(work, quantize=scheme))
    recipe = {"merge_method": "linear", "models": pair(work, family), "quantize": scheme}
    return work.merge(f"{scheme}-{family}", recipe)


def restored(work: Work, family: str, scheme: str) -> Path:
    """Return the float8 output as plain float32 numbers, by our reader."""
    models = [{"model": str(float8(work, family, scheme))}]
    return work.merge(f"{scheme}-{family}-plain", {"merge_method": "passthrough", "models": models, "dtype": "float32"})


def mixture(work: Work, name: str, family: str, **keys: Any) -> Path:
    experts = [{"source_model": str(small(work, family, seed))} for seed in (1, 2, 3)]
    base = str(small(work, family, 0))
    recipe = {"base_model": base, "experts": experts, "gate_mode": "random", "experts_per_token": 2, **keys}
    return work.merge(name, recipe, "mix")


def shared(work: Work, family: str) -> dict[str, Any]:
    return {"shared_experts": [{"source_model": str(small(work, family, 0))}]}


def zoo_mixture(work: Work) -> Path:
    prompts = {"maths": ["How many apples are there?"], "medicine": ["The patient has a fever."]}
    experts = [{"source_model": str(work.experts[name]), "positive_prompts": said} for name, said in prompts.items()]
    return work.merge("zoo-mixture", {"base_model": str(work.base), "experts": experts, "gate_mode": "hidden"}, "mix")


def merged_mixtures(work: Work, family: str) -> Path:
    recipe = {"merge_method": "linear", "models": pair(work, family), "dtype": "float32"}
    return work.merge(f"merged-{family}", recipe)


def joined(work: Work) -> Path:
    first = small(work, "flex_olmo", 0)
    return work.merge("joined", {"join": [{"source_model": str(first), "experts": [0, 2]}]}, "mix")


def shrunk(work: Work, family: str, method: str) -> Path:
    texts = work.folder / "texts.txt"
    texts.write_text("\n\n".join(tiny.text(seed, 400) for seed in range(8)), encoding="utf-8")
    given = (small(work, family, 0), "--experts", "2", "--method", method, "--data", texts)
    asked = ("--sequences", "16", "--length", "64")
    target = work.folder / f"shrunk-{family}"
    if not target.exists():
        model, *rest = map(str, given)
        work.run("shrink", model, str(target), *rest, *asked)
    return target


SMALL_TEXTS = tuple(tiny.text(seed, 12) for seed in (101, 102, 103))


def _float8(model: str, kind: str) -> dict[str, Any]:
    """Return what a case takes of a model stored as float8: what makes it, and its numbers in float32 beside it."""
    return {"make": lambda w: float8(w, model, kind), "reference": lambda w: restored(w, model, kind)}


def _tiny(name: str, what: str, make: Callable[[Work], Path], **keys: Any) -> Case:
    return Case(name, what, make, texts=SMALL_TEXTS, **keys)


_DEEPSEEK = {"architecture": "deepseek"}
_NOISE = "vLLM rounds what the layers read to float8, too"

CASES = (
    Case("base", "SmolLM2-135M-Instruct itself, not merged", lambda w: w.base, mlx=True),
    Case("dense", "TIES of two experts", dense, mlx=True),
    Case("stack", "passthrough: 40 layers of two models", stack, mlx=True),
    Case("union", "task arithmetic, union of three vocabularies", union, mlx=True),
    Case("transplant", "300 tokens merged from text", transplant, mlx=True),
    Case("with adapters", "mean of the base with two adapters", with_adapters, mlx=True),
    Case("adapters", "adapters on the base", lambda w: w.base, merged_adapters, rank=32),
    Case("extracted", "adapters extracted from an expert, rank 8", lambda w: w.base, extracted, rank=8),
    _tiny(
        "extracted, tied",
        "adapters extracted from a tied Llama, rank 8",
        lambda w: small(w, "llama-tied", 0),
        adapters=extracted_tiny,
        rank=8,
    ),
    _tiny("twin", "sidecars exported: twin", twin, adapters=lambda w: exported(w, twin(w), "twin-peft"), rank=32),
    _tiny(
        "skillpack",
        "sidecars exported: skillpack with origin: merged",
        skillpack,
        adapters=lambda w: exported(w, skillpack(w), "skillpack-merged-peft"),
        rank=32,
    ),
    _tiny(
        "skillpack, on the base",
        "sidecars exported: skillpack",
        lambda w: small(w, "llama", 0),
        adapters=lambda w: exported(w, skillpack_on_base(w), "skillpack-peft"),
        rank=32,
    ),
    _tiny(
        "twin, norms whole",
        "sidecars exported with others: own",
        twin_whole,
        adapters=lambda w: exported(w, twin_whole(w), "twin-whole-peft"),
        rank=32,
    ),
    Case(
        "fp8_channel",
        "TIES of two experts, fp8_channel",
        **_float8("zoo", "fp8_channel"),
        tolerance=None,
        because=_NOISE,
    ),
    Case(
        "fp8_channel, weights",
        "the same, what the layers read not rounded",
        **_float8("zoo", "fp8_channel"),
        stand_in=True,
    ),
    Case(
        "fp8_block",
        "TIES of two experts, fp8_block",
        **_float8("zoo", "fp8_block"),
        stand_in=True,
    ),
    _tiny(
        "fp8_block, whole tiles",
        "two Llamas of whole tiles, fp8_block",
        **_float8("llama-wide", "fp8_block"),
        stand_in=True,
    ),
    Case("mixtral, zoo", "mix of two experts: Mixtral, tied", zoo_mixture),
    _tiny("mixtral", "mix of Llamas: Mixtral", lambda w: mixture(w, "mixtral", "llama")),
    _tiny("qwen2_moe", "mix of Qwen2: Qwen2-MoE", lambda w: mixture(w, "qwen2_moe", "qwen2", **shared(w, "qwen2"))),
    _tiny(
        "qwen2_moe, llama",
        "mix of Llamas: Qwen2-MoE",
        lambda w: mixture(w, "qwen2_moe-llama", "llama", **shared(w, "llama")),
    ),
    _tiny("qwen3_moe", "mix of Qwen3: Qwen3-MoE", lambda w: mixture(w, "qwen3_moe", "qwen3")),
    _tiny(
        "qwen3_moe, dense",
        "the same, first layer dense",
        lambda w: mixture(w, "qwen3_moe-dense", "qwen3", dense_layers=1),
    ),
    _tiny("flex_olmo", "mix of OLMo 2: FlexOlmo", lambda w: mixture(w, "flex_olmo", "olmo2")),
    _tiny(
        "deepseek",
        "mix of Llamas: DeepSeek-MoE, a shared expert",
        lambda w: mixture(w, "deepseek", "llama", **_DEEPSEEK, **shared(w, "llama"), dense_layers=1),
        reference=lambda w: small(w, "llama", 0),
        define=True,
    ),
    _tiny(
        "deepseek, tied",
        "mix of tied Llamas: DeepSeek-MoE",
        lambda w: mixture(w, "deepseek-tied", "llama-tied", **_DEEPSEEK),
        reference=lambda w: small(w, "llama-tied", 0),
        define=True,
    ),
    *(
        _tiny(f"merged {family}", f"mean of two mixtures: {kind}", partial(merged_mixtures, family=family))
        for family, kind in (("olmoe", "OLMoE"), ("qwen2_moe", "Qwen2-MoE"), ("deepseek_v3", "DeepSeek-V3"))
    ),
    _tiny("joined", "FlexOlmo with an expert dropped", joined),
    *(
        _tiny(
            f"shrunk {family}",
            f"4 experts shrunk to 2 by {method}: {kind}",
            partial(shrunk, family=family, method=method),
        )
        for family, kind, method in (
            ("mixtral", "Mixtral", "hc_smoe"),
            ("qwen2_moe", "Qwen2-MoE", "msmoe"),
            ("qwen3_moe", "Qwen3-MoE", "ream"),
            ("olmoe", "OLMoE", "reap"),
            ("deepseek_v3", "DeepSeek-V3", "merge_moe"),
        )
    ),
)
