"""The YAML of mergekit-evolve as a recipe with open values."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from merganser.errors import MergeError
from merganser.recipe import check_recipe, load_recipe
from merganser.recipe.load import read_documents
from merganser.search import search
from merganser.search.evolve import read_evolve
from merganser.search.space.space import Space
from merganser.search.trials import Silent

GENOME = """\
genome:
  models: [a, b]
  merge_method: ties
  base_model: base
tasks:
  - name: gsm8k_train
    weight: 0.5
    metric: exact_match
  - hellaswag_train
"""


def space_of(text: str) -> Space:
    found = read_evolve(read_documents(text)[0])
    assert found is not None
    return Space(found.recipe)


def resolved(text: str, value: float | None = None) -> Any:
    space = space_of(text)
    point = space.start() if value is None else {d.name: value for d in space.dimensions}
    check_recipe(load_recipe(space.resolve(point)))
    return yaml.safe_load(space.resolve(point))


def test_one_group() -> None:
    assert resolved(GENOME, 0.25) == {
        "merge_method": "ties",
        "dtype": "bfloat16",
        "base_model": "base",
        "parameters": {"normalize": True},
        "models": [
            {"model": "a", "parameters": {"weight": 0.25, "density": 0.25}},
            {"model": "b", "parameters": {"weight": 0.25, "density": 0.25}},
            {"model": "base"},
        ],
    }
    # the first trial of mergekit-evolve: an equal share of each model
    assert [model["parameters"]["weight"] for model in resolved(GENOME)["models"][:2]] == [0.5, 0.5]


def test_a_base_among_the_models_has_no_weight_of_its_own() -> None:
    # a task vector of zeros: a weight of it would be a free value without effect
    assert resolved(GENOME.replace("[a, b]", "[a, base, b]"), 0.25) == resolved(GENOME, 0.25)
    assert len(space_of(GENOME.replace("[a, b]", "[a, base, b]").replace("base_model", "layer_granularity: 1\n  base_model")).dimensions) == 8  # fmt: skip
    # an average has one
    average = GENOME.replace("ties", "linear").replace("[a, b]", "[a, base, b]")
    assert len(space_of(average).dimensions) == 3


def test_groups_of_layers() -> None:
    recipe = resolved(GENOME.replace("base_model", "layer_granularity: 1\n  base_model"), 0.25)
    assert [[s["layer_range"] for s in piece["sources"]] for piece in recipe["slices"]] == [[[0, 1]] * 3, [[1, 2]] * 3]
    assert recipe["slices"][1]["sources"][0]["parameters"] == {"weight": 0.25, "density": 0.25}
    assert len(space_of(GENOME.replace("base_model", "layer_granularity: 1\n  base_model")).dimensions) == 8


def test_smooth_and_filters() -> None:
    text = GENOME.replace("base_model", "layer_granularity: 1\n  smooth: true\n  filters: [self_attn]\n  base_model")
    (first, _, _) = resolved(text, 0.25)["models"]
    assert first["parameters"]["weight"] == [{"filter": "self_attn", "value": [0.25, 0.25]}, {"value": [0.25, 0.25]}]


def test_slerp() -> None:
    text = "genome: {models: [a, b], merge_method: slerp, layer_granularity: 1}\n"
    recipe = resolved(text, 0.25)
    assert [piece["parameters"] for piece in recipe["slices"]] == [{"t": 0.25}, {"t": 0.25}]


def test_negative_weights() -> None:
    lows = [
        d.low for d in space_of(GENOME.replace("base_model", "allow_negative_weights: true\n  base_model")).dimensions
    ]
    assert lows == [-1, 0.05, -1, 0.05]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GENOME, "gsm8k_train: no such file"),
        (GENOME[: GENOME.index("tasks")], "tasks: give --tasks, whose items are scored, or --command"),
        (GENOME.replace("0.5", "-1"), ":7 tasks[0].weight: must be a number above 0, got -1: metrics of which less is better"),
        (GENOME.replace("tasks", "limit: 0\ntasks"), "limit: expected a whole number of at least 1, got 0"),
        (GENOME.replace("ties", "della"), "<recipe>:3 genome.merge_method: 'della' is not known."),
        (GENOME.replace("models: [a, b]", "model: [a, b]"), "unknown key 'model'. Did you mean 'models'?"),
        (GENOME.replace("tasks", "task"), "unknown key 'task'. Did you mean 'tasks'?"),
        (GENOME.replace("base_model", "layer_granularity: 3\n  base_model"), "layer_granularity: must divide the 2 layers of a, got 3"),
        (GENOME.replace("ties", "slerp").replace("[a, b]", "[a, b, c]"), "slerp is searched between two models"),
    ],
)  # fmt: skip
def test_what_is_refused(tmp_path: Any, text: str, message: str) -> None:
    with pytest.raises(MergeError) as caught:
        search(text, tmp_path / "out")
    assert message in str(caught.value)


def test_tasks_of_lm_eval() -> None:
    text = GENOME + "limit: 40\nnum_fewshot: 5\napply_chat_template: true\nshuffle: true\n"
    found = read_evolve(read_documents(text)[0])
    assert found is not None
    assert found.tasks == ("gsm8k_train", "hellaswag_train")
    assert found.objective == "0.5*gsm8k_train/exact_match+hellaswag_train/acc"
    assert (found.limit, found.arguments) == (40, {"num_fewshot": 5, "apply_chat_template": True})
    named = read_evolve(read_documents(GENOME.replace("exact_match", "'exact_match,strict-match'"))[0])
    assert named is not None
    assert named.objective == "0.5*gsm8k_train/exact_match,strict-match+hellaswag_train/acc"
    plain = read_evolve(read_documents(GENOME.replace("exact_match", "'acc,none'"))[0])
    assert plain is not None
    assert plain.objective == "0.5*gsm8k_train/acc+hellaswag_train/acc"


def test_another_recipe() -> None:
    assert read_evolve(read_documents("merge_method: linear\nmodels: [{model: a}]\n")[0]) is None


class Noted(Silent):
    """Keeps the notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def test_it_is_searched(tmp_path: Any) -> None:
    noted, given = Noted(), {"trials": 1, "sampler": "random", "dtype": "float32"}
    text = f"model_name: mine\n{GENOME}limit: 8\nshuffle: true\nnum_fewshot: 2\n"
    found = search(text, tmp_path / "out", ["one.jsonl"], progress=noted, **given)
    assert found.best is not None
    # the limit of the file counts; what has no effect is said
    assert found.held_out == 4
    assert noted.notes == [
        "shuffle: of mergekit-evolve, has no effect here",
        "model_name: of mergekit-evolve, has no effect here",
        "tasks: gsm8k_train, hellaswag_train of the file is not among --tasks, which replace those of the file",
        "num_fewshot: has no effect, since no task is of lm-eval",
    ]
    # --tasks say where the tasks of the file are, and their weights stay
    named = GENOME.replace("exact_match", "bits_per_byte").replace(
        "- hellaswag_train", "- {name: hellaswag_train, metric: bits_per_byte}"
    )
    where = {"gsm8k_train": "one.jsonl", "hellaswag_train": "two.jsonl"}
    found = search(named, tmp_path / "named", where, limit=8, **given)
    assert [o.text for o in found.objectives] == ["0.5*gsm8k_train/bits_per_byte+1*hellaswag_train/bits_per_byte"]
