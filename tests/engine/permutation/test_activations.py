"""Recipes that align models by what they compute on text."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import merganser
from merganser.anatomy import infer_anatomy
from merganser.anatomy.symmetry import UNITS, find_units
from merganser.calibration.matching import run as matching
from merganser.calibration.matching import sums
from merganser.calibration.matching.sums import Correlation, Feature
from merganser.engine.merge import merge
from merganser.engine.planner.planner import build_plan
from merganser.engine.run import Interrupted
from merganser.errors import MergeError, OutputError, RecipeError
from merganser.recipe import load_recipe
from merganser.statistics.correlations import open_correlations
from tests.anatomy.permuting import permute, random_orders
from tests.calibration.families import save
from tests.evaluation.tiny import add_tokenizer, make_model, text
from tests.making import assert_equal, read_json, read_model

LENGTH = 24


@pytest.fixture(autouse=True)
def _one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with two groups of two queries, another one near it, a copy of that with permuted units, and texts."""
    folder = tmp_path_factory.mktemp("zoo")
    make_model(folder / "a", 0)
    make_model(folder / "b", 1, like=folder / "a")
    permuted_copy(folder / "b", folder / "moved", UNITS)
    for name in ("texts", "others"):
        lines = [json.dumps({"text": text(i + len(name), 30)}) for i in range(5)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return folder


def permuted_copy(source: Path, target: Path, kinds: Sequence[str]) -> Path:
    shutil.copytree(source, target)
    tensors, config = load_file(source / "model.safetensors"), read_json(source, "config.json")
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    units = [each for each in find_units(shapes, config, infer_anatomy(shapes, config)) if each.kind in kinds]
    save_file(permute(tensors, units, random_orders(units, 3)), target / "model.safetensors", {"format": "pt"})
    return target


def recipe(zoo: Path, first: str, second: str, units: Sequence[str] = UNITS, **keys: Any) -> dict[str, Any]:
    data = {"files": str(zoo / "texts.jsonl"), "length": LENGTH}
    align = {"by": "activations", "units": list(units), "data": data}
    models = [{"model": str(zoo / name)} for name in (first, second)]
    return {"merge_method": "linear", "parameters": {"weight": 0.5}, "models": models, "align": align, **keys}


def plain(zoo: Path, first: str, second: str, **keys: Any) -> dict[str, Any]:
    written = recipe(zoo, first, second, **keys)
    del written["align"]
    return written


def logits(folder: Path) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        found: torch.Tensor = model(torch.arange(20)[None]).logits
    return found


@pytest.mark.parametrize("units", [["mlp"], ["heads"], list(UNITS)], ids="-".join)
def test_the_permutation_of_a_fine_tune_is_found(zoo: Path, tmp_path: Path, units: list[str]) -> None:
    moved = permuted_copy(zoo / "b", tmp_path / "moved", units)
    torch.testing.assert_close(logits(moved), logits(zoo / "b"), rtol=1e-4, atol=1e-4)
    written = recipe(zoo, "a", "b", units)
    written["models"][1]["model"] = str(moved)
    record = merge(written, tmp_path / "out").record
    merge(plain(zoo, "a", "b"), tmp_path / "plain")
    assert_equal(read_model(tmp_path / "out"), read_model(tmp_path / "plain"))
    (found,) = record["permutation"]["models"]
    assert record["permutation"]["by"] == "activations"
    assert {kind for kind, each in found["moved"].items() if each["units"]} == set(units)
    assert found["measured"]["parts"][0]["data"][0]["file"] == "texts.jsonl"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["moved", "out", "plain"]


@pytest.mark.parametrize("family", ["gpt2", "phi3"])
def test_other_families(tmp_path: Path, family: str) -> None:
    """Weights that are stored [in, out], and stacked matrices."""
    add_tokenizer(save(tmp_path / "a", family))
    permuted_copy(tmp_path / "a", tmp_path / "b", UNITS)
    (tmp_path / "texts.jsonl").write_text(json.dumps({"text": text(1, 60)}))
    merge(recipe(tmp_path, "a", "b"), tmp_path / "out")
    assert_equal(read_model(tmp_path / "out"), read_model(tmp_path / "a"))


def test_fine_tunes_of_one_base_stay_as_they_are(zoo: Path, tmp_path: Path) -> None:
    written = recipe(zoo, "a", "b", merge_method="task_arithmetic", base_model=str(zoo / "a"))
    record = merge(written, tmp_path / "out").record
    assert all(each["units"] == 0 for each in record["permutation"]["models"][0]["moved"].values())


def test_correlations_are_those_of_the_activations(zoo: Path, tmp_path: Path) -> None:
    """Compared with whole models in memory, in float64."""
    merge(recipe(zoo, "a", "moved", keep_statistics=str(tmp_path / "kept")), tmp_path / "out")
    found = open_correlations(tmp_path / "kept" / "matching-moved")
    seen: dict[str, list[np.ndarray]] = {}
    encode = transformers.AutoTokenizer.from_pretrained(zoo / "a")
    lines = [json.loads(line)["text"] for line in (zoo / "texts.jsonl").read_text().splitlines()]
    pieces = [
        ids[i : i + LENGTH] for ids in (encode(line)["input_ids"] for line in lines) for i in range(0, len(ids), LENGTH)
    ]
    for name in ("a", "moved"):
        model = transformers.AutoModelForCausalLM.from_pretrained(zoo / name, dtype=torch.float64).eval()
        rows: dict[str, list[torch.Tensor]] = {}

        def keep(_: Any, given: Any, *, key: str, rows: dict[str, list[torch.Tensor]] = rows) -> None:
            rows.setdefault(key, []).append(given[0][0])

        for module in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"):
            own = model.get_submodule(f"model.layers.1.{module}")
            own.register_forward_pre_hook(partial(keep, key=module))
        with torch.no_grad():
            for ids in pieces:
                model(torch.tensor([ids]))
        for key, each in rows.items():
            seen.setdefault(key, []).append(torch.cat(each).numpy())
    files = load_file(found.path / "correlations-00002-of-00002.safetensors")

    def correlation(module: str) -> np.ndarray:
        first, second = seen[module]
        return np.corrcoef(first.T, second.T)[: first.shape[1], first.shape[1] :]

    heads = correlation("self_attn.o_proj").reshape(4, 8, 4, 8)
    expected = {
        "model.layers.1 mlp": correlation("mlp.down_proj"),
        "model.layers.1 heads queries": np.einsum("acbc->ab", heads),
        "residual": correlation("self_attn.q_proj") + correlation("mlp.gate_proj"),
    }
    assert files.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(files[name].numpy(), values, rtol=0, atol=2e-5)


def test_a_constant_feature_and_a_large_mean() -> None:
    draw = torch.Generator().manual_seed(0)
    first = torch.randn(400, 3, generator=draw)
    second = first[:, [2, 0, 1]] + 0.5 * torch.randn(400, 3, generator=draw)
    first, second = first * 0.01 + 1000.0, second.contiguous()
    second[:, 1] = 7.3
    own = Correlation(Feature("units", "down", 3, 0, 1))
    for at in range(0, 400, 100):
        own.add(first[at : at + 100], second[at : at + 100])
    expected = np.corrcoef(first.double().T, second[:, [0, 2]].double().T)[:3, 3:]
    found = own.result()
    np.testing.assert_allclose(found[:, [0, 2]], expected, rtol=0, atol=1e-4)
    assert torch.equal(found[:, 1], torch.zeros(3))
    assert torch.equal(Correlation(Feature("units", "down", 2, 0, 1)).result(), torch.zeros(2, 2))


@pytest.mark.parametrize("panel", [2, 512])
def test_units_compared_with_themselves_have_the_correlations_of_two_equal_models(
    panel: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sums, "_PANEL", panel)
    feature = Feature("units", "down", 5, 1, 2)
    both, own = Correlation(feature), Correlation(feature)
    for seed in range(2):
        rows = torch.randn(40, 11, generator=torch.Generator().manual_seed(seed))
        both.add(rows, rows)
        own.add_own(rows)
    torch.testing.assert_close(own.result(), both.result(), rtol=0, atol=1e-6)


def test_the_plan_says_what_comparing_takes(zoo: Path, tmp_path: Path) -> None:
    written = recipe(zoo, "a", "moved", keep_statistics=str(tmp_path / "kept"))
    planned = merganser.plan(written)
    (own,) = planned.calibrations
    assert planned.permutation is not None
    assert planned.permutation.models[0].moved == {}
    assert (own.name, own.statistics, own.present) == ("matching-moved", (f"correlation with {zoo / 'a'}",), False)
    merge(written, tmp_path / "out")
    folder = tmp_path / "kept" / "matching-moved"
    assert set(own.files) == {path.name for path in folder.iterdir()}
    made = open_correlations(folder)
    assert own.statistics_bytes == sum(info.nbytes for infos in made.units.values() for info in infos)
    assert own.tokens == made.about["parts"][0]["tokens"]
    # made before, it is taken as it is, unless the data are others
    assert merganser.plan(written).calibrations[0].present
    stamps = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    merge(written, tmp_path / "again")
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == stamps
    written["align"]["data"]["files"] = str(zoo / "others.jsonl")
    for act in (merganser.plan, lambda each: merge(each, tmp_path / "other")):
        with pytest.raises(OutputError, match=r"the correlations there are of other data, or other sequences"):
            act(written)


def test_a_killed_comparison_continues_at_its_block(zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compare, done = matching._compare, []

    def stop_at_the_second(*given: Any) -> Any:
        if done:
            raise KeyboardInterrupt
        done.append(given[2])
        return compare(*given)

    monkeypatch.setattr(matching, "_compare", stop_at_the_second)
    with pytest.raises(Interrupted, match="stopped while matching-moved was calibrated"):
        merge(recipe(zoo, "a", "moved"), tmp_path / "out")
    monkeypatch.setattr(matching, "_compare", lambda *given: (done.append(given[2]), compare(*given))[1])
    merge(recipe(zoo, "a", "moved"), tmp_path / "out")
    assert done == [0, 1]
    merge(plain(zoo, "a", "b"), tmp_path / "plain")
    assert_equal(read_model(tmp_path / "out"), read_model(tmp_path / "plain"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "plain"]


def test_what_is_measured_within_a_merge_is_of_aligned_models(zoo: Path, tmp_path: Path) -> None:
    """RegMean++ runs the models as they are aligned; the data at the top serve both."""
    data = {"files": str(zoo / "texts.jsonl"), "length": LENGTH}
    given = {"merge_method": "regmean_plus", "base_model": str(zoo / "a"), "parameters": {}, "data": data}
    written = {name: recipe(zoo, "b", name, **given) for name in ("moved", "b")}
    del written["b"]["align"]
    del written["moved"]["align"]["data"]
    written["moved"]["models"] = written["moved"]["models"][1:]
    written["b"]["models"] = written["b"]["models"][1:]
    merge(written["moved"], tmp_path / "out")
    merge(written["b"], tmp_path / "plain")
    assert_equal(read_model(tmp_path / "out"), read_model(tmp_path / "plain"))


def test_what_cannot_be_compared(zoo: Path, tmp_path: Path) -> None:
    other = shutil.copytree(zoo / "b", tmp_path / "bos")
    add_tokenizer(other, bos=True)
    written = recipe(zoo, "a", "b")
    written["models"][1]["model"] = str(other)
    with pytest.raises(MergeError, match=r"align: the tokenizers of .*a and .*bos give different tokens"):
        merge(written, tmp_path / "out")
    with pytest.raises(RecipeError, match="by: activations runs the models, which only a merge into a checkpoint does"):
        build_plan(load_recipe(recipe(zoo, "a", "b")))
    mixture = add_to(save(tmp_path / "mixture", "mixtral"))
    written["models"][1]["model"] = str(mixture)
    with pytest.raises(MergeError, match=r"model_type 'mixtral': it is not known which permutations"):
        merge(written, tmp_path / "out")
    wide = make_model(tmp_path / "wide", 0, intermediate_size=50)
    written["models"][1]["model"] = str(wide)
    with pytest.raises(MergeError, match=r"layers.0 mlp: .*a and .*wide have different units here"):
        merge(written, tmp_path / "out")
    damaged = tmp_path / "kept" / "matching-b"
    damaged.mkdir(parents=True)
    (damaged / "correlations.json").write_text('{"kind": "statistics"}')
    with pytest.raises(MergeError, match=r"correlations.json"):
        merge(recipe(zoo, "a", "b", keep_statistics=str(tmp_path / "kept")), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def add_to(folder: Path) -> Path:
    add_tokenizer(folder)
    return folder
