"""What the run record tells of each tensor: against a plain calculation on the first elements."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest
import torch

from merganser.engine.merge import merge, plan
from merganser.engine.stream import sample
from tests.making import llama, llama_config, make_recipe, read_model, write_llamas, write_model


def close(scale, layers=2):
    """Models that moved from a base by noise; some elements stayed."""
    base = llama(0, layers)
    models = []
    for seed in (1, 2, 3):
        generator = torch.Generator().manual_seed(seed)
        noise = {name: torch.randn(t.shape, generator=generator) * scale for name, t in base.items()}
        models.append({name: t + noise[name] * (noise[name].abs() > 0.3 * scale) for name, t in base.items()})
    return base, models


def merged_record(tmp_path, tensors, method="task_arithmetic", **options):
    paths = [write_model(tmp_path / f"m{i}", own, llama_config()) for i, own in enumerate(tensors)]
    parameters = {"weight": 0.5} if method != "linear" else {"weight": 1.0}
    base, models = (None, paths) if method == "linear" else (paths[0], paths[1:])
    return merge(make_recipe(method, models, base, parameters), tmp_path / "out", **options).record


def numbers(tensors, names, model=None):
    return np.concatenate([tensors[name].double().numpy().ravel() for name in names])


def check(found, base, models, merged, *, each_pair):
    deltas = [model - base for model in models]
    norm = np.linalg.norm(base)
    assert found["models"] == pytest.approx([np.linalg.norm(delta) / norm for delta in deltas], rel=1e-6)
    assert found["merged"] == pytest.approx(np.linalg.norm(merged - base) / norm, rel=1e-6)
    pairs = list(combinations(deltas, 2))
    cosines = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in pairs]
    both = [np.sum((a != 0) & (b != 0)) for a, b in pairs]
    opposite = [np.sum(a * b < 0) for a, b in pairs]
    assert found["cosine"] == pytest.approx(np.mean(cosines), abs=1e-9)
    assert found["sign_conflict"] == pytest.approx(sum(opposite) / sum(both))
    assert ("cosines" in found) == each_pair
    if each_pair:
        assert found["cosines"] == pytest.approx(cosines, abs=1e-9)
        assert found["sign_conflicts"] == pytest.approx([a / b for a, b in zip(opposite, both, strict=True)])


def test_against_a_plain_calculation(tmp_path):
    base, models = close(0.01)
    record = merged_record(tmp_path, [base, *models])
    merged = read_model(tmp_path / "out")
    found = record["movement"]
    assert found["inputs"] == record["models"]
    assert found["from_base"] is True
    assert (found["sample"], found["pair_sample"]) == (sample.SAMPLE, sample.PAIR_SAMPLE)
    assert [entry["name"] for entry in found["tensors"]] == list(merged)
    for entry in found["tensors"]:
        vectors = [numbers(each, [entry["name"]]) for each in (base, *models, merged)]
        check(entry, vectors[0], vectors[1:-1], vectors[-1], each_pair=False)
    for entry in record["layers"]:
        names = [t["name"] for t in found["tensors"] if (t["layer"], t["role"]) == (entry["layer"], entry["role"])]
        vectors = [numbers(each, names) for each in (base, *models, merged)]
        check(entry, vectors[0], vectors[1:-1], vectors[-1], each_pair=True)
    vectors = [numbers(each, merged) for each in (base, *models, merged)]
    check(found["total"], vectors[0], vectors[1:-1], vectors[-1], each_pair=True)


def test_large_tensors_and_bundles_are_measured_alike(tmp_path, small_blocks, monkeypatch):
    """Only the first elements of large tensors count, and those for all of it."""
    base, models = close(0.01)
    whole = merged_record(tmp_path / "a", [base, *models])
    monkeypatch.setattr(sample, "PAIR_SAMPLE", 15)  # every tensor by itself
    one_by_one = merged_record(tmp_path / "b", [base, *models])
    assert whole["movement"]["total"]["models"] == pytest.approx(one_by_one["movement"]["total"]["models"])
    monkeypatch.setattr(sample, "PAIR_SAMPLE", 10)
    monkeypatch.setattr(sample, "SAMPLE", 20)
    found = merged_record(tmp_path / "c", [base, *models])["movement"]
    name = "model.layers.0.mlp.up_proj.weight"
    (entry,) = [entry for entry in found["tensors"] if entry["name"] == name]
    first = [numbers(each, [name]) for each in (base, *models)]
    assert entry["models"] == pytest.approx(
        [np.linalg.norm((m - first[0])[:20]) / np.linalg.norm(first[0][:20]) for m in first[1:]]
    )
    deltas = [(m - first[0])[:10] for m in first[1:]]
    cosines = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in combinations(deltas, 2)]
    assert entry["cosine"] == pytest.approx(np.mean(cosines))


def test_samples_count_as_much_as_their_tensors(tmp_path, monkeypatch):
    monkeypatch.setattr(sample, "SAMPLE", 4)
    monkeypatch.setattr(sample, "PAIR_SAMPLE", 4)
    base = {"large": torch.ones(100), "small": torch.ones(4)}
    one = {"large": torch.full((100,), 2.0), "small": torch.ones(4)}
    two = {"large": torch.full((100,), 2.0), "small": torch.full((4,), 0.0)}
    three = {"large": torch.full((100,), 0.5), "small": torch.full((4,), 3.0)}
    total = merged_record(tmp_path, [base, one, two, three])["movement"]["total"]
    assert total["models"][:2] == pytest.approx([(100 / 104) ** 0.5, 1.0])
    # one and two: only the large one moved in both, in the same direction
    assert total["cosines"][0] == pytest.approx(100 / (10 * 104**0.5))
    assert total["sign_conflicts"] == [0.0, 1.0, 1.0]
    assert total["sign_conflict"] == pytest.approx((100 + 104) / (100 + 100 + 104))


def test_without_a_base_there_are_no_task_vectors(tmp_path):
    record = merged_record(tmp_path, [llama(0), llama(1), llama(2)], "linear")
    found = record["movement"]
    assert found["from_base"] is False
    assert set(found["total"]) == {"models", "merged"}
    assert all(set(entry) <= {"name", "layer", "role", "models", "merged"} for entry in found["tensors"])
    assert not any("cosine" in entry for entry in record["layers"])


def test_one_model_and_equal_models(tmp_path):
    base, models = close(0.01)
    single = merged_record(tmp_path / "one", [base, models[0]])["movement"]["total"]
    assert set(single) == {"models", "merged", "rounding", "length"}
    same = merged_record(tmp_path / "same", [base, base, models[0]])["movement"]["total"]
    # a task vector of zeros has no direction
    assert (same["cosine"], same["sign_conflict"]) == (None, None)
    assert (same["cosines"], same["sign_conflicts"]) == ([None], [None])


@pytest.mark.parametrize("bundle", [True, False])
def test_what_is_not_finite_has_no_numbers(tmp_path, bundle, monkeypatch):
    if not bundle:
        monkeypatch.setattr(sample, "PAIR_SAMPLE", 15)
    base, models = close(0.01)
    models[1]["model.norm.weight"][:4] = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e38])
    base["model.norm.weight"][1] = torch.inf
    record = merged_record(tmp_path, [base, *models], allow_nonfinite=True)
    entries = {entry["name"]: entry for entry in record["movement"]["tensors"]}
    assert "models" not in entries["model.norm.weight"]
    assert len(entries["lm_head.weight"]["models"]) == 3
    assert record["movement"]["total"] == {}


def test_slices_name_the_inputs_of_every_tensor(tmp_path):
    paths = write_llamas(tmp_path, 3)
    pieces = [{"sources": [{"model": str(paths[i]), "layer_range": [0, 1]}]} for i in (1, 2)]
    found = merge({"merge_method": "passthrough", "slices": pieces}, tmp_path / "out").record["movement"]
    assert found["inputs"] is None
    assert found["total"] == {}
    inputs = {(entry["layer"], *entry["inputs"]) for entry in found["tensors"] if entry["layer"] is not None}
    assert inputs == {(0, str(paths[1])), (1, str(paths[2]))}
    assert all(entry["from_base"] is False for entry in found["tensors"])


def test_the_order_of_pairs(tmp_path):
    """Of four models, the second and the fourth moved the same way."""
    base = {"w": torch.zeros(8) + 1}
    moves = [torch.eye(8)[i] for i in (0, 1, 2, 1)]
    record = merged_record(tmp_path, [base, *({"w": base["w"] + move} for move in moves)])
    pairs = list(combinations(range(4), 2))
    assert record["movement"]["total"]["cosines"] == [1.0 if pair == (1, 3) else 0.0 for pair in pairs]
    assert plan(record["recipe"]).tensors[0].name == "w"


def test_rounding_and_length_against_a_plain_calculation(tmp_path):
    base, models = close(0.01)
    record = merged_record(tmp_path, [base, *models])
    merged, found = read_model(tmp_path / "out"), record["movement"]["total"]
    deltas = [np.sqrt(sum(float((m[name] - base[name]).square().sum()) for name in base)) for m in (*models, merged)]
    assert found["length"] == pytest.approx(deltas[-1] / np.sqrt(np.mean(np.square(deltas[:-1]))), rel=1e-3)
    for share, model, delta in zip(found["rounding"], models, deltas, strict=False):
        ulp = np.concatenate([np.spacing(np.abs(tensor.numpy().ravel())) for tensor in model.values()])
        assert share == pytest.approx(np.sqrt(np.sum(np.square(ulp, dtype=np.float64)) / 12) / delta, rel=1e-3)


@pytest.mark.parametrize(("lambda_", "much"), [(0.05, "short"), (0.5, None), (1.0, None), (5.0, "long")])
def test_what_is_much_longer_or_shorter_than_sums_and_averages_is_warned_of(tmp_path, lambda_, much):
    base, models = close(0.01)
    paths = [write_model(tmp_path / f"m{i}", own, llama_config()) for i, own in enumerate([base, *models])]
    recipe = make_recipe("task_arithmetic", paths[1:], paths[0], {"weight": 1.0, "lambda": lambda_})
    warnings = [text for text in merge(recipe, tmp_path / "out").record["warnings"] if "task vector" in text]
    assert [f"which is {much}" in text for text in warnings] == ([] if much is None else [True])


def test_what_is_copied_from_the_base_does_not_hide_the_total(tmp_path):
    """The default of wudi leaves all that is not a matrix as it is in the base."""
    base, models = close(0.01)
    paths = [write_model(tmp_path / f"m{i}", own, llama_config()) for i, own in enumerate([base, *models[:2]])]
    found = merge(make_recipe("wudi", paths[1:], paths[0]), tmp_path / "out").record["movement"]
    assert found["inputs"] == [*map(str, paths)]
    assert found["from_base"] is True
    assert len(found["total"]["models"]) == 2


def test_what_was_not_trained_adds_no_rounding(tmp_path):
    base, models = close(0.01)
    only = {name: models[0][name] if "mlp" in name else t for name, t in base.items()}
    found = merged_record(tmp_path, [base, only, models[1]])["movement"]
    parts = [entry for entry in found["tensors"] if "mlp" in entry["name"]]
    others = [entry["rounding"][0] for entry in found["tensors"] if "mlp" not in entry["name"]]
    assert set(others) == {None}
    assert min(entry["rounding"][0] for entry in parts) < found["total"]["rounding"][0]
    assert found["total"]["rounding"][0] < max(entry["rounding"][0] for entry in parts) * 1.001


@pytest.mark.parametrize("method", ["task_arithmetic", "linear"])
def test_a_loop_measures_the_same(tmp_path, method, monkeypatch):
    base, models = close(0.01)
    tensors = [{name: t.to(torch.bfloat16) for name, t in own.items()} for own in (base, *models)]
    tensors[1]["model.norm.weight"] = tensors[0]["model.norm.weight"]
    one_by_one = merged_record(tmp_path / "a", tensors, method)
    ran = []
    loop = sample._measure_in_a_loop
    monkeypatch.setattr(sample, "_WORTH_A_PROGRAM", 1)
    monkeypatch.setattr(sample, "_measure_in_a_loop", lambda *given: ran.append(loop(*given)) or ran[-1])
    in_loops = merged_record(tmp_path / "b", tensors, method)
    assert any(found is not None for found in ran)
    one, other = (numbers_in([record["movement"], record["layers"]]) for record in (one_by_one, in_loops))
    assert other == pytest.approx(one, rel=1e-12)


def numbers_in(value):
    """Every number of a record, in order; infinity in place of None."""
    if isinstance(value, dict | list):
        return [one for each in (value.values() if isinstance(value, dict) else value) for one in numbers_in(each)]
    return [] if isinstance(value, str) else [math.inf if value is None else value]
