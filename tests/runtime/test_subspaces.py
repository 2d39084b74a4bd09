"""MergeVLA's router: its scores beside the definition, texts of tiny models, and parts that cannot be read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from merganser import merge
from merganser.errors import MergeError
from merganser.evaluation import evaluate
from merganser.inference.language_model import open_model
from merganser.inference.stored import open_stored
from merganser.runtime.routed import RoutedModel
from merganser.runtime.routed.subspaces import Subspaces, SubspaceSettings, open_subspaces
from merganser.runtime.routed.tasks import TaskSet, Weights
from tests.evaluation.tiny import make_model
from tests.reference.mergevla import task_scores

IDS = torch.tensor([[5, 9, 30, 41], [7, 100, 3, 60]])
TASKS = ("a", "b", "c")
PARTS = ("head.v_task.weight", "head.v_action.weight")


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tasks_of(each: Mapping[str, Mapping[str, Tensor]], shared: Mapping[str, Tensor]) -> TaskSet:
    """Tasks whose tensors are given; nothing of them is on disk."""
    weights = {task: Weights(tuple(own), own.__getitem__, frozenset()) for task, own in each.items()}
    source: Any = SimpleNamespace(read=lambda: dict(shared))
    return TaskSet("out", "sidecars", tuple(each), source, {}, weights.__getitem__, Path("router"), None)


@pytest.fixture
def shared() -> dict[str, Tensor]:
    return {PARTS[0]: random(6, 8, seed=0), PARTS[1]: random(6, 5, seed=1), "head.norm.weight": torch.ones(8)}


@pytest.fixture
def each(shared: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Task c changes one weight by a matrix of rank 1, and the other not at all."""
    found = {
        task: {name: tensor + random(*tensor.shape, seed=10 * seed) for name, tensor in shared.items()}
        for seed, task in enumerate(TASKS, 1)
    }
    found["c"][PARTS[0]] = shared[PARTS[0]] + torch.outer(random(6, seed=2), random(8, seed=3))
    found["c"][PARTS[1]] = shared[PARTS[1]]
    return found


@pytest.mark.parametrize("of", ["task", "shared", "change"])
def test_scores_are_those_of_the_definition(
    shared: dict[str, Tensor], each: dict[str, dict[str, Tensor]], of: Any
) -> None:
    found = open_subspaces(tasks_of(each, shared), SubspaceSettings(("v_",), 3, of))
    assert [*found.directions] == [*PARTS]
    # rows of four and three tokens: what is behind them does not count
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 0, 0]])
    widths = dict(zip(PARTS, (8, 5), strict=True))
    states = {t: {p: random(2, 5, w, seed=len(p) + ord(t)) for p, w in widths.items()} for t in TASKS}
    weights = [[shared[p] if of == "shared" else each[t][p] for p in PARTS] for t in TASKS]
    if of == "change":
        weights = [[own.double() - shared[p].double() for p, own in zip(PARTS, row, strict=True)] for row in weights]
    rows = [[[states[t][p][0, :4], states[t][p][1, :3]] for p in PARTS] for t in TASKS]
    wanted = task_scores(weights, rows, 3)
    scores = found.scores(states, mask)
    torch.testing.assert_close(scores.double(), wanted, rtol=1e-5, atol=1e-5)
    assert found.choose(states, mask) == [TASKS[index] for index in wanted.argmax(1).tolist()]
    whole = found.scores({t: {p: s[:, :3] for p, s in own.items()} for t, own in states.items()})
    torch.testing.assert_close(whole[1], scores[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda states: states["b"].pop(PARTS[1]), "states that head.v_action.weight reads in task 'b' are missing"),
        (lambda states: states.pop("a"), "states that head.v_task.weight reads in task 'a' are missing"),
        (
            lambda states: states["a"].update({PARTS[0]: torch.ones(1, 2, 7)}),
            r"of the shape \[rows, tokens, 8\], got \[1, 2, 7\]",
        ),
        (lambda states: states["a"].update({PARTS[0]: torch.full((1, 2, 8), torch.nan)}), "NaN or infinity"),
    ],
)
def test_states_that_do_not_fit(
    shared: dict[str, Tensor], each: dict[str, dict[str, Tensor]], change: Any, message: str
) -> None:
    found = open_subspaces(tasks_of(each, shared), SubspaceSettings(("v_",)))
    states = {t: {PARTS[0]: torch.ones(1, 2, 8), PARTS[1]: torch.ones(1, 2, 5)} for t in TASKS}
    change(states)
    with pytest.raises(MergeError, match=message):
        found.scores(states)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"parts": ("v_task", "vision")}, None),
        ({"parts": ("vision", "eyes")}, "no tensor has 'vision' or 'eyes' in its name"),
        ({"parts": ("norm",)}, r"head.norm.weight is not a matrix: its shape is \[8\]"),
        ({"parts": ("v_action",), "of": "change"}, "no task changes head.v_action.weight"),
        ({}, r"and there is no such tensor; name the weights that are to be read: parts"),
        ({"parts": "v_proj"}, "parts: must be a list of texts"),
        ({"parts": ()}, "parts: must be a list of texts"),
        ({"rank": 0}, "rank: must be a whole number of at least 1, found 0"),
        ({"of": "base"}, "of: must be 'task', 'shared', 'change', found 'base'"),
    ],
)
def test_parts_that_cannot_be_read(
    shared: dict[str, Tensor], each: dict[str, dict[str, Tensor]], settings: dict[str, Any], message: str | None
) -> None:
    for own in each.values():
        own[PARTS[1]] = shared[PARTS[1]]
    tasks = tasks_of(each, shared)
    if message is None:
        assert [*open_subspaces(tasks, SubspaceSettings(**settings)).directions] == [PARTS[0]]
        return
    with pytest.raises(MergeError, match=message):
        open_subspaces(tasks, SubspaceSettings(**settings))


@pytest.mark.parametrize(
    ("names", "read"),
    [
        (["layers.2.attn.v_proj.weight", "layers.10.attn.v_proj.weight", "layers.9.v_proj.weight"], "layers.10.attn"),
        (["text.layers.0.v_proj.weight", "vision.layers.3.v_proj.weight"], None),
    ],
)
def test_the_last_layer_is_read_by_default(names: list[str], read: str | None) -> None:
    each = {task: {name: torch.eye(2) for name in names} for task in TASKS}
    if read is not None:
        [found] = open_subspaces(tasks_of(each, each["a"])).directions
        assert found.startswith(read)
        return
    with pytest.raises(MergeError, match=r"several stacks of layers have one: text\.layers, vision\.layers"):
        open_subspaces(tasks_of(each, each["a"]))


@pytest.mark.parametrize(("without", "who"), [("b", "task 'b'"), ("shared", "the shared model")])
def test_a_part_that_not_all_have(
    shared: dict[str, Tensor], each: dict[str, dict[str, Tensor]], without: str, who: str
) -> None:
    del ({**each, "shared": shared})[without][PARTS[1]]
    with pytest.raises(MergeError, match=f"{who} has no tensor {PARTS[1]}"):
        open_subspaces(tasks_of(each, shared), SubspaceSettings(("v_",), of="change"))


def test_weights_that_are_not_finite(shared: dict[str, Tensor], each: dict[str, dict[str, Tensor]]) -> None:
    each["b"][PARTS[0]][0, 0] = torch.inf
    with pytest.raises(MergeError, match=r"v_task\.weight has NaN or infinity in task 'b'"):
        open_subspaces(tasks_of(each, shared), SubspaceSettings(("v_",)))


def test_names_that_there_are_not() -> None:
    found = Subspaces(("a",), {"v": torch.ones(1, 1, 2)})
    for task, part in (("b", "v"), ("a", "w")):
        with pytest.raises(MergeError, match=r"no task 'b'|w: is not among the weights that are read: v"):
            found.strength(task, part, torch.ones(1, 1, 2))


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("subspaces")
    make_model(root / "base", 0)
    for seed, name in enumerate("ab", 1):
        make_model(root / name, seed, like=root / "base")
    (root / "a.txt").write_text("the cat sat on a mat and then it was " * 12)
    models = [{"model": str(root / name), "name": name} for name in "ab"]
    return merge({"merge_method": "emr", "base_model": str(root / "base"), "models": models}, root / "out").out


@pytest.mark.parametrize(("parts", "first"), [(None, 1), (("v_proj.weight",), 0)])
def test_texts_are_routed_by_what_value_projections_read(out: Path, parts: Any, first: int) -> None:
    """By default those of the last of two layers."""
    settings = SubspaceSettings(parts, rank=4)
    model = RoutedModel(out, by="subspaces", subspaces=settings)
    weights, states = [], []
    for task in "ab":
        opened = open_model(open_stored(f"{out}#{task}"))
        loaded = opened.load(opened.source.read(), torch.float32, torch.device("cpu"))
        with torch.inference_mode():
            hidden = loaded(input_ids=IDS, output_hidden_states=True).hidden_states
            layers = loaded.model.layers
            states.append([layers[layer].input_layernorm(hidden[layer]) for layer in range(first, 2)])
        weights.append([layer.self_attn.v_proj.weight.detach() for layer in layers[first:]])
    wanted = task_scores(weights, states, 4)
    assert model._subspaces is not None
    found = model._strengths(model._subspaces, IDS, torch.ones_like(IDS))
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-4)
    chosen = ["ab"[index] for index in wanted.argmax(1).tolist()]
    assert model.choose(IDS) == chosen
    # padding is not counted
    padded = torch.cat([IDS, torch.zeros(2, 3, dtype=torch.int64)], 1)
    mask = torch.tensor([[1] * 4 + [0] * 3] * 2)
    torch.testing.assert_close(model._strengths(model._subspaces, padded, mask), found, rtol=1e-4, atol=1e-4)
    blended = RoutedModel(out, by="subspaces", blend=2, subspaces=settings).mixes(IDS)
    for row, mix in enumerate(blended):
        assert abs(dict(mix).get("a", 0.0) - float(found[row].softmax(0)[0])) < 0.026


def test_an_evaluation_chooses_by_them(out: Path) -> None:
    found = evaluate([f"by={out}#subspaces"], [out.parent / "a.txt"], dtype="float32", context=24, limit=3)
    assert sum(found.outcomes["by"]["a"].chosen.values()) == 3
    assert found.right("by", "a") is not None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"subspaces": SubspaceSettings(("embed_tokens.weight",))}, "is not the weight of a linear layer in Llama"),
        ({"by": "router", "subspaces": SubspaceSettings()}, "subspaces: are for by 'subspaces', found by 'router'"),
    ],
)
def test_texts_that_cannot_be_routed(out: Path, given: dict[str, Any], message: str) -> None:
    with pytest.raises(MergeError, match=message):
        RoutedModel(out, **{"by": "subspaces", **given}).choose(IDS)
