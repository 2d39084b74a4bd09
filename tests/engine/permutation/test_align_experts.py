"""Mixtures whose experts are matched before they are merged: permuted copies are recovered, malformed ones refused."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from merganser.anatomy.experts import ExpertUnits, find_experts
from merganser.checkpoint import open_checkpoint
from merganser.engine.merge import merge, plan
from merganser.engine.permutation.experts import match_experts
from merganser.engine.permutation.keep import Kept
from merganser.errors import MergeError
from tests.calibration.families import FAMILIES, _config, save
from tests.cli.tiny import run
from tests.making import assert_equal
from tests.mixture.making import logits

OLMOE = (_config("Olmoe", num_experts_per_tok=2, num_experts=4), "OlmoeForCausalLM")
MIXTURES = ["mixtral", "qwen2-moe", "qwen3-moe", "olmoe", "deepseek-v3", "gpt-oss"]
Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("mixtures")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FAMILIES, "olmoe", OLMOE)
        return {family: save(root / family, family) for family in MIXTURES}


def weights_of(folder: Path) -> Weights:
    return load_file(folder / "model.safetensors")


def copied(folder: Path, to: Path, change: Callable[[Weights], Any] = dict, **config: Any) -> Path:
    """A copy with other weights and keys of its config."""
    shutil.copytree(folder, to)
    weights = weights_of(folder)
    changed = change(weights)
    weights = changed if isinstance(changed, dict) else weights
    save_file(
        {name: each.clone().contiguous() for name, each in weights.items()}, to / "model.safetensors", {"format": "pt"}
    )
    found = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps(found | config))
    return to


def permuted(weights: Weights, orders: list[list[int]]) -> Weights:
    """Experts in another order in every layer, written without the code that is tested."""
    moved = {}
    for name, tensor in weights.items():
        layer = re.search(r"layers\.(\d+)\.", name)
        order = orders[int(layer[1])] if layer else []
        single = re.fullmatch(r"(.*\.experts\.)(\d+)(\..*)", name)
        if single is not None:
            moved[f"{single[1]}{order.index(int(single[2]))}{single[3]}"] = tensor
        elif ".experts." in name or re.search(r"(moe|mlp)\.(gate|router)\.", name):
            moved[name] = tensor[order]
        else:
            moved[name] = tensor
    return moved


ORDERS = [[2, 3, 1, 0], [3, 2, 0, 1], [0, 1, 2, 3], [2, 3, 0, 1]]
"""Those of DeepSeek's two groups of two, too: a group stays together."""


def recipe(*models: Path, **keys: Any) -> dict[str, Any]:
    given = {"merge_method": "linear", "parameters": {"weight": 0.5}, "align": {"units": "experts"}}
    return {**given, "models": [{"model": str(path)} for path in models], **keys}


@pytest.mark.parametrize("family", MIXTURES)
def test_a_mixture_merged_with_its_permuted_copy_is_the_mixture(
    tmp_path: Path, made: dict[str, Path], family: str
) -> None:
    folder = made[family]
    copy = copied(folder, tmp_path / "copy", lambda weights: permuted(weights, ORDERS))
    if family in ("mixtral", "deepseek-v3", "gpt-oss"):
        # the others route as Mixtral does
        torch.testing.assert_close(logits(copy), logits(folder))
    result = merge(recipe(folder, copy), tmp_path / "out")
    assert_equal(weights_of(tmp_path / "out"), weights_of(folder))
    [found] = result.record["permutation"]["models"]
    dense_first = family == "deepseek-v3"
    assert found["moved"] == {"experts": {"units": 8 if dense_first else 12, "of": 12 if dense_first else 16}}


def test_experts_of_fine_tunes_stay_where_they_are(tmp_path: Path, made: dict[str, Path]) -> None:
    def tuned(weights: Weights) -> Weights:
        return {name: each + 0.02 * torch.randn_like(each) for name, each in weights.items()}

    torch.manual_seed(3)
    other = copied(made["mixtral"], tmp_path / "tuned", tuned)
    merge(recipe(made["mixtral"], other), tmp_path / "out")
    plain = recipe(made["mixtral"], other)
    del plain["align"]
    merge(plain, tmp_path / "plain")
    assert_equal(weights_of(tmp_path / "out"), weights_of(tmp_path / "plain"))


def test_experts_that_are_alike_are_told_apart_by_the_router(tmp_path: Path, made: dict[str, Path]) -> None:
    def alike(weights: Weights) -> Weights:
        return {name: weights[re.sub(r"experts\.\d+", "experts.0", name)] for name in weights}

    first = copied(made["mixtral"], tmp_path / "first", alike)
    second = copied(first, tmp_path / "second", lambda weights: permuted(weights, ORDERS))
    merge(recipe(first, second), tmp_path / "out")
    assert_equal(weights_of(tmp_path / "out"), weights_of(first))


def test_experts_are_told_apart_where_the_routers_say_nothing(tmp_path: Path, made: dict[str, Path]) -> None:
    def new_router(weights: Weights) -> Weights:
        return {name: torch.ones_like(each) if ".gate." in name else each for name, each in weights.items()}

    first = copied(made["mixtral"], tmp_path / "first", new_router)
    second = copied(first, tmp_path / "second", lambda weights: permuted(weights, ORDERS))
    merge(recipe(first, second), tmp_path / "out")
    assert_equal(weights_of(tmp_path / "out"), weights_of(first))


def test_a_group_of_the_router_stays_together(tmp_path: Path, made: dict[str, Path]) -> None:
    """Two experts of different groups cannot change places, as groups decide what the router chooses among."""
    crossed = copied(made["deepseek-v3"], tmp_path / "b", lambda weights: permuted(weights, [[0, 2, 1, 3]] * 4))
    opened = [open_checkpoint(str(folder)) for folder in (made["deepseek-v3"], crossed)]
    units = [find_experts({name: t.shape for name, t in each.tensors.items()}, each.config) for each in opened]
    found = match_experts(opened[0].tensors, opened[1].tensors, *units, Kept(None, ""))
    assert len(found) == 3
    for order in found.values():
        assert {frozenset(order[:2].tolist()), frozenset(order[2:].tolist())} == {frozenset((0, 1)), frozenset((2, 3))}


def test_what_was_found_is_kept(made: dict[str, Path]) -> None:
    opened = open_checkpoint(str(made["gpt-oss"]))
    units = find_experts({name: t.shape for name, t in opened.tensors.items()}, opened.config)
    kept = Kept(None, "")
    kept.orders = {own.name: np.array([1, 0, 3, 2]) for own in units}
    found = match_experts(opened.tensors, opened.tensors, units, units, kept)
    assert all(order.tolist() == [1, 0, 3, 2] for order in found.values())


def test_command_says_how_many_experts_move(tmp_path: Path, made: dict[str, Path]) -> None:
    copied(made["mixtral"], tmp_path / "b", lambda weights: permuted(weights, ORDERS))
    written = recipe(made["mixtral"], tmp_path / "b")
    (tmp_path / "r.yaml").write_text(json.dumps(written))
    found = run("plan", tmp_path / "r.yaml")
    assert found.code == 0, found
    assert "12 of 16 experts move" in found.out


def _without(pattern: str) -> Callable[[Weights], Weights]:
    return lambda weights: {name: each for name, each in weights.items() if not re.search(pattern, name)}


def _rows(pattern: str) -> Callable[[Weights], Weights]:
    return lambda weights: {name: each[:3] if re.search(pattern, name) else each for name, each in weights.items()}


@pytest.mark.parametrize(
    ("family", "change", "config", "message"),
    [
        ("mixtral", _without(r"layers\.1.*experts\.2\."), {}, r"layers\.1.*: expert 2 is missing; there should be 4"),
        ("mixtral", _without(r"experts\.3\."), {"num_local_experts": 3}, "has 4 rows, and there are 3 experts"),
        (
            "mixtral",
            lambda weights: _without(r"experts\.3\.")(_rows(r"\.gate\.")(weights)),
            {"num_local_experts": 3},
            "the reference has 4 experts, this model 3; only mixtures with the same number",
        ),
        ("mixtral", _without(r"layers\.1.*experts\.2\.w3"), {}, r"experts\.2\.w3\.weight: is missing; other experts"),
        ("mixtral", _rows(r"experts\.2\.w3"), {}, r"shape \[3, 32\], that of expert 0 has \[48, 32\]"),
        ("mixtral", _rows(r"\.gate\."), {}, "gate.weight: has 3 rows, and there are 4 experts"),
        ("mixtral", _without(r"layers\.1.*\.gate\."), {}, "its router's weight is missing"),
        ("mixtral", _without(r"layers\.1.*moe\."), {}, r"layers\.1\.\S+ experts: only one of the models has experts"),
        ("mixtral", dict, {"num_local_experts": 3}, "has an expert 3; config.json says 3 experts"),
        ("gpt-oss", _rows(r"experts\.down_proj$"), {}, "down_proj: has 3 experts, and there are 4"),
        ("gpt-oss", _rows(r"router\.bias"), {}, "router.bias: has 3 rows, and there are 4"),
        ("deepseek-v3", dict, {"n_group": 3}, "4 experts cannot be divided into 3 groups"),
        ("deepseek-v3", dict, {"n_group": 1}, "or other groups"),
        (
            "mixtral",
            lambda weights: weights | {"model.layers.0.block_sparse_moe.table.weight": torch.ones(4)},
            {},
            "not known what this tensor beside the experts holds",
        ),
        (
            "mixtral",
            lambda weights: {n: each * torch.nan if "experts.1.w1" in n else each for n, each in weights.items()},
            {},
            "holds NaN or infinity here, so its experts cannot be matched",
        ),
    ],
)
def test_malformed_mixtures_are_refused(
    tmp_path: Path,
    made: dict[str, Path],
    family: str,
    change: Callable[[Weights], Any],
    config: dict[str, Any],
    message: str,
) -> None:
    bad = copied(made[family], tmp_path / "bad", change, **config)
    with pytest.raises(MergeError, match=message):
        plan(recipe(made[family], bad))


def test_a_dense_model_has_no_experts(tmp_path: Path) -> None:
    dense = save(tmp_path / "dense", "llama")
    (tmp_path / "r.yaml").write_text(json.dumps(recipe(dense, dense / "../dense")))
    found = run("plan", tmp_path / "r.yaml")
    assert (found.code, "it has no experts" in found.err) == (2, True), found
    units = ExpertUnits("x", 2, 1, (("a", "b"),), ("c",), ("d",))
    assert units.tensors == ["a", "b", "c", "d"]
