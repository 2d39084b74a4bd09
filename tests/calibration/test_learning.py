"""Coefficients that are learnt by gradients of the whole merged model."""

from __future__ import annotations

import json
import math
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from merganser.calibration.learning import learn_coefficients, learner
from merganser.calibration.learning.sequences import of_step
from merganser.calibration.single.preparation import prepare
from merganser.cli import main
from merganser.engine.merge import merge, plan
from merganser.engine.planner.planner import build_plan
from merganser.engine.run import Interrupted
from merganser.errors import DataError, RecipeError, UnsupportedError
from merganser.recipe import load_recipe
from merganser.statistics import Statistics
from tests.calibration.interrupting import killed_after_removing
from tests.calibration.merging import LENGTH, Family, choice, make_family
from tests.reference.adamerging import adamerging_steps
from tests.reference.dam import dam_steps
from tests.reference.expert_merging_whole import steps_of as expert_merging_steps
from tests.reference.fw import fw_steps

ALL = 99


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return small(tmp_path_factory.mktemp("llama"), "llama")


def small(root: Path, name: str) -> Family:
    """A family with two texts for each model."""
    family = make_family(root, name)
    for data in family.data:
        data.write_text("\n".join(data.read_text().splitlines()[:2]))
    return family


def written(family: Family, method: str, **parameters: Any) -> dict[str, Any]:
    """A recipe in which each model has its data."""
    recipe = family.recipe(method, **parameters)
    for entry, data in zip(recipe["models"], family.data, strict=True):
        entry["data"] = {"files": str(data), "length": LENGTH}
    if method == "dam":
        del recipe["base_model"]
    return recipe


def learn(family: Family, method: str, out: Path, weight: Any = None, **parameters: Any) -> list[Statistics]:
    recipe = family.recipe(method, **parameters)
    for entry, own in zip(recipe["models"], weight or [], strict=False):
        entry["parameters"] = {"weight": own}
    if method == "dam":
        del recipe["base_model"]
    with ExitStack() as stack:
        prepared = [
            stack.enter_context(prepare(model, [data], choice=choice()))
            for model, data in zip(family.models, family.data, strict=True)
        ]
        return learn_coefficients(build_plan(load_recipe(recipe), measured=False), prepared, out)


def coefficients(found: list[Statistics]) -> dict[str, torch.Tensor]:
    """By tensor, shape [models, ...]."""
    parts = [
        {name: t for file in own.about["files"] for name, t in load_file(own.path / file).items()} for own in found
    ]
    names = [name for name in parts[0] if name.startswith("coefficients/")]
    return {name.removeprefix("coefficients/"): torch.stack([own[name] for own in parts]) for name in names}


def losses(found: list[Statistics]) -> list[list[float]]:
    """By step and model, and after all of them."""
    told = [own.about["learning"] for own in found]
    return [list(step) for step in zip(*([*own["losses"], own["after"]] for own in told), strict=True)]


def double(family: Family) -> tuple[Any, list[Any], list[Any]]:
    """Base, models, and all their data for each of three steps."""
    models = [family.open(model).double() for model in family.models]
    return family.open(family.base).double(), models, [[family.sequences(0), family.sequences(1)]] * 3


def compare(family: Family, found: list[Statistics], expected: Any, history: Any, start: float) -> None:
    learnt = coefficients(found)
    assert learnt.keys() == expected.keys()
    assert max(float((own - start).abs().max()) for own in expected.values()) > 0.05
    for name, own in expected.items():
        torch.testing.assert_close(
            learnt[name].double().reshape(own.shape),
            own,
            rtol=0,
            atol=5e-3,
            msg=lambda text, name=name: f"{name}: {text}",
        )
    torch.testing.assert_close(torch.tensor(losses(found)), torch.tensor(history), rtol=1e-4, atol=1e-5)


def test_adamerging_agrees_with_whole_models_in_memory(llama: Family, tmp_path: Path) -> None:
    given = {"steps": 3, "rate": 0.03, "start": 0.3, "weight": [1.0, 0.5]}
    found = learn(llama, "adamerging", tmp_path / "run", by="layer", batch=ALL, **given)

    def group(name: str) -> str:
        return name[: len("model.layers.0")] if ".layers." in name else ""

    compare(llama, found, *adamerging_steps(*double(llama), group=group, **given), start=0.3)


def test_dam_agrees_with_whole_models_in_memory(tmp_path: Path) -> None:
    # matrices are stored [inputs, outputs], and head and embedding are one
    family = small(tmp_path, "gpt2")
    given = {"steps": 3, "rate": 0.03, "temperature": 2.0, "similarity": 0.2}
    found = learn(family, "dam", tmp_path / "run", batch=ALL, **given)
    compare(family, found, *dam_steps(*double(family)[1:], **given), start=0.5)


def test_expert_merging_of_chunks_agrees_with_whole_models_in_memory(llama: Family, tmp_path: Path) -> None:
    # norms have 32 entries, which no 5 equal chunks hold
    given: dict[str, Any] = {"steps": 3, "rate": 0.1, "chunks": 5, "regulariser": 0.3, "temperature": 1.5}
    given |= {"weight": [1.0, 0.5]}
    found = learn(llama, "expert_merging_whole", tmp_path / "run", batch=ALL, **given)
    expected, history = expert_merging_steps(*double(llama), **given)
    assert {own.shape for own in expected.values()} == {(2, 5)}
    compare(llama, found, expected, history, start=math.log(1 / 9))


def test_a_tensor_has_no_more_chunks_than_elements(llama: Family, tmp_path: Path) -> None:
    found = learn(llama, "expert_merging_whole", tmp_path / "run", steps=1, chunks=1000)
    learnt = coefficients(found)
    sizes = {name: own.numel() for name, own in load_file(llama.base / "model.safetensors").items()}
    assert {name: own.shape[1] for name, own in learnt.items()} == {
        name: min(1000, size) for name, size in sizes.items()
    }
    assert min(sizes.values()) < 1000 < max(sizes.values())
    planned = plan(written(llama, "expert_merging_whole", steps=1, chunks=1000)).calibrations[0]
    stored = sum(t.nbytes for file in found[0].about["files"] for t in load_file(found[0].path / file).values())
    assert planned.statistics_bytes == stored


@pytest.mark.parametrize(("granularity", "selection"), [("model", "soft"), ("tensor", "hard")])
def test_steps_of_frank_wolfe_agree_with_whole_models_in_memory(
    granularity: str, selection: str, llama: Family, tmp_path: Path
) -> None:
    given: dict[str, Any] = {"steps": 3, "rate": 0.6, "weight": [1.0, 0.5]}
    given |= {"granularity": granularity, "selection": selection}
    found = learn(llama, "fw", tmp_path / "run", batch=ALL, **given)
    base, models, data = double(llama)
    expected, history = fw_steps(base, models, data, **given)
    torch.testing.assert_close(torch.tensor(losses(found)[:-1]), torch.tensor(history), rtol=1e-4, atol=1e-5)
    learnt = coefficients(found)
    assert len({tuple(own.flatten().tolist()) for own in learnt.values()}) > 2 * (granularity == "tensor")
    for name, own in learnt.items():
        before = base.get_parameter(name)
        merged = before + sum(c * (m.get_parameter(name) - before) for c, m in zip(own.double(), models, strict=True))
        torch.testing.assert_close(
            merged, expected[name], rtol=0, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_a_step_takes_the_next_sequences() -> None:
    assert [of_step(step, 2, 5) for step in range(4)] == [[0, 1], [2, 3], [4, 0], [1, 2]]
    assert of_step(3, 9, 2) == [1, 0]


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def test_a_recipe_with_data_gives_the_merge_by_hand(
    llama: Family, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = {"steps": 2, "rate": 0.05}
    found = learn(llama, "dam", tmp_path / "hand", **given)
    by_hand = llama.recipe("dam", found, **given)
    del by_hand["base_model"]
    merge(by_hand, tmp_path / "one")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(written(llama, "dam", **given)))
    with pytest.raises(SystemExit, match="0"):
        main(["merge", str(tmp_path / "recipe.yaml"), str(tmp_path / "two")])
    learning = [own.about["learning"] for own in found]
    told = [f"model{k} {own['before']:.4g} to {own['after']:.4g}" for k, own in enumerate(learning)]
    assert (
        "learnt in 2 steps; loss of a token, on the first step's sequences: " + ", ".join(told)
        in capsys.readouterr().out
    )
    record = json.loads((tmp_path / "two/merge.json").read_text())
    assert weights(tmp_path / "one") == weights(tmp_path / "two")
    assert [own["learning"] for own in record["calibrations"]] == learning
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hand", "one", "recipe.yaml", "two"]
    merged, learnt = load_file(tmp_path / "one/model.safetensors"), coefficients(found)
    models = [load_file(model / "model.safetensors") for model in llama.models]
    for name, tensor in merged.items():
        expected = sum(c * model[name] for c, model in zip(learnt[name], models, strict=True))
        torch.testing.assert_close(tensor, expected, rtol=0, atol=1e-6, msg=name)


def test_the_loss_falls_and_is_measured_before_and_after(llama: Family, tmp_path: Path) -> None:
    found = learn(llama, "model_tinting", tmp_path / "run", steps=3, rate=0.1, batch=ALL, weight=[1.0, 0.0])
    first, other = (own.about["learning"] for own in found)
    assert first["before"] == first["losses"][0]
    assert len(first["losses"]) == first["steps"] == 3
    assert first["after"] < first["losses"][2] < first["before"]
    # the second model's data do not count, and are not read
    assert other == {"steps": 3, "losses": [None] * 3, "before": None, "after": None}


def test_an_interrupted_merge_continues_at_its_step(
    llama: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = written(llama, "dam", steps=2, rate=0.05)
    merge(recipe, tmp_path / "whole")
    step, taken = learner.Learner._step, []

    def stopped(self: Any, number: int) -> Any:
        if taken:
            raise KeyboardInterrupt
        taken.append(number)
        return step(self, number)

    monkeypatch.setattr(learner.Learner, "_step", stopped)
    with pytest.raises(Interrupted, match="run the same command again to continue"):
        merge(recipe, tmp_path / "out")
    assert (tmp_path / ".out.statistics").is_dir()
    taken.clear()
    # what the models predict is there already
    monkeypatch.setattr(learner.Teachers, "run", lambda self, note: None)
    merge(recipe, tmp_path / "out")
    assert taken == [1]
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def test_a_run_killed_at_its_very_end_learns_nothing_again(
    llama: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = learn(llama, "dam", tmp_path / "whole", steps=1)
    with killed_after_removing(3):
        learn(llama, "dam", tmp_path / "out", steps=1)
    # hidden states and one of both states are gone
    monkeypatch.setattr(learner.Learner, "_forward", None)
    found = learn(llama, "dam", tmp_path / "out", steps=1)
    assert losses(found) == losses(expected)
    for name, own in coefficients(expected).items():
        assert torch.equal(coefficients(found)[name], own)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["model-1", "model-2"]


def test_the_plan_says_the_steps_and_what_they_take(llama: Family) -> None:
    many, pairs = (plan(written(llama, method)) for method in ("adamerging", "dam"))
    assert [own.name for own in many.calibrations] == ["within-1/model0", "within-1/model1"]
    assert many.calibrations[0].steps == 500
    assert many.calibrations[0].statistics == ("count", "coefficients")
    twice = plan(written(llama, "adamerging", steps=1000)).calibrations[0]
    assert twice.forward_operations == pytest.approx(2 * many.calibrations[0].forward_operations, rel=0.01)
    assert twice.bytes_read > 1.9 * many.calibrations[0].bytes_read
    assert pairs.calibrations[0].peak_memory > many.calibrations[0].peak_memory
    # with the gradient of each loss by itself
    steps = plan(written(llama, "fw", steps=500)).calibrations[0]
    assert steps.bytes_read == many.calibrations[0].bytes_read
    assert steps.peak_memory > many.calibrations[0].peak_memory
    # each column has its own coefficient
    assert pairs.calibrations[0].statistics_bytes > 2 * many.calibrations[0].statistics_bytes


@pytest.mark.parametrize("name", ["mixtral", "t5"])
def test_mixtures_and_encoder_decoders_are_learnt(name: str, tmp_path: Path) -> None:
    family = small(tmp_path, name)
    found = coefficients(learn(family, "dam", tmp_path / "run", steps=1))
    matrix = {
        "mixtral": "model.layers.0.block_sparse_moe.experts.1.w2.weight",
        "t5": "encoder.block.1.layer.1.DenseReluDense.wo.weight",
    }[name]
    shape = load_file(family.base / "model.safetensors")[matrix].shape
    assert found[matrix].shape == (2, 1, shape[1])
    assert float((found[matrix] - 0.5).abs().max()) > 0


def test_what_cannot_be_learnt_is_refused(llama: Family, tmp_path: Path) -> None:
    uneven = [{"filter": "mlp", "value": 3}, {"value": 4}]
    with pytest.raises(RecipeError, match=r"learns the model as a whole, .* different steps"):
        learn(llama, "adamerging", tmp_path / "out", steps=uneven)
    with pytest.raises(RecipeError, match=r"weight is 0 for every model"):
        learn(llama, "adamerging", tmp_path / "out", weight=[0.0, 0.0])
    with pytest.raises(RecipeError, match=r"expert_merging learns no coefficients with the whole"):
        learn(llama, "expert_merging", tmp_path / "out")
    with pytest.raises(RecipeError, match="different steps"):
        plan(written(llama, "adamerging", steps=uneven))
    recipe = written(llama, "adamerging", steps=1)
    # the only token, which no other one predicts
    (tmp_path / "short.jsonl").write_text('{"text": "a"}\n')
    recipe["models"][1]["data"]["files"] = str(tmp_path / "short.jsonl")
    with pytest.raises(DataError, match="no token that counts follows another one, so there is no loss"):
        plan(recipe)
    encoder = make_family(tmp_path / "bert", "bert")
    with pytest.raises(UnsupportedError, match="does not predict the next token"):
        plan(written(encoder, "adamerging"))
    assert not (tmp_path / "out").exists()
