"""Merges that are handed statistics from data: by a recipe, from folders that `calibrate` wrote."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import merganser
from merganser.errors import DataError, RecipeError, UnsupportedError
from merganser.method import Embeddings, FromData, Others, merge_method
from merganser.statistics import open_statistics
from tests.calibration.families import save
from tests.evaluation.tiny import add_tokenizer, text
from tests.reference.regmean import regmean as reference
from tests.shared import copied


def _experts(folder: Path, family: str, *, statistics: bool = True) -> list[Path]:
    """A base and two experts, with statistics of the experts beside them."""

    def write(made: Path) -> None:
        _make_experts(made, family, statistics)

    copied(folder, f"experts {family} {statistics}", write)
    return [folder / name for name in ("base", "expert1", "expert2")]


def _make_experts(folder: Path, family: str, statistics: bool) -> None:
    base = save(folder / "base", family)
    add_tokenizer(base)
    for number in (1, 2):
        expert = folder / f"expert{number}"
        shutil.copytree(base, expert)
        tensors = load_file(base / "model.safetensors")
        torch.manual_seed(number)
        moved = {name: tensor + 0.02 * torch.randn_like(tensor) for name, tensor in tensors.items()}
        save_file(moved, expert / "model.safetensors", {"format": "pt"})
        data = folder / f"data{number}.jsonl"
        data.write_text("\n".join(json.dumps({"text": text(number * 10 + i, 20)}) for i in range(5)))
        if statistics:
            merganser.calibrate(expert, [data], folder / f"statistics{number}", length=40)


def _recipe(folder: Path, **keys: Any) -> dict[str, Any]:
    models = [{"model": str(folder / f"expert{i}"), "statistics": str(folder / f"statistics{i}")} for i in (1, 2)]
    return {"merge_method": "regmean", "base_model": str(folder / "base"), "models": models, **keys}


def _grams(folder: Path, name: str) -> list[torch.Tensor]:
    found = []
    for number in (1, 2):
        statistics = open_statistics(folder / f"statistics{number}")
        with merganser.open_checkpoint(str(folder / "base")).reader() as reader:
            count = statistics.read(reader, "count", name).double()
            gram = statistics.read(reader, "gram", name).double()
            found.append(gram / count.clamp(min=1)[(...,) + (None,) * (gram.dim() - count.dim())])
    return found


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "gpt-oss"])
def test_a_recipe_hands_statistics_in(family: str, tmp_path: Path) -> None:
    _experts(tmp_path, family)
    merganser.merge(_recipe(tmp_path, parameters={"alpha": 0.8}), tmp_path / "out")
    base, *models = (load_file(tmp_path / name / "model.safetensors") for name in ("base", "expert1", "expert2"))
    merged = load_file(tmp_path / "out" / "model.safetensors")
    statistics = open_statistics(tmp_path / "statistics1")
    seen = 0
    for name, own in base.items():
        experts = [model[name] for model in models]
        if name not in statistics.tensors:
            torch.testing.assert_close(merged[name], (experts[0] + experts[1]) / 2, rtol=1e-6, atol=1e-7)
            continue
        grams = _grams(tmp_path, name)
        turned = statistics.tensors[name].axis == own.dim() - 2

        def expected(base: Any, experts: Any, grams: Any, turned: bool = turned) -> torch.Tensor:
            if not turned:
                return reference(base, experts, grams, alpha=0.8)
            return reference(base.T, [expert.T for expert in experts], grams, alpha=0.8).T

        if own.dim() == 3:
            pieces = [
                expected(own[e], [expert[e] for expert in experts], [gram[e] for gram in grams])
                if sum(float(gram[e].trace()) for gram in grams) > 0
                else (experts[0][e] + experts[1][e]).double() / 2
                for e in range(len(own))
            ]
            wanted = torch.stack(pieces)
        elif sum(float(gram.trace()) for gram in grams) == 0:
            wanted = (experts[0] + experts[1]).double() / 2
        else:
            wanted = expected(own, experts, grams)
        torch.testing.assert_close(merged[name].double(), wanted, rtol=1e-4, atol=1e-5)
        seen += not torch.allclose(merged[name], (experts[0] + experts[1]) / 2, rtol=0, atol=1e-4)
    assert seen > len(statistics.tensors) // 2


def test_threads_and_memory_change_no_byte(tmp_path: Path) -> None:
    _experts(tmp_path, "llama")
    for name, threads in (("one", 1), ("four", 4)):
        merganser.merge(_recipe(tmp_path), tmp_path / name, threads=threads)
    assert (tmp_path / "one" / "model.safetensors").read_bytes() == (
        tmp_path / "four" / "model.safetensors"
    ).read_bytes()
    record = json.loads((tmp_path / "one" / "merge.json").read_text())
    folders = {Path(entry["path"]).parent.name for entry in record["statistics_from_data"]}
    assert folders == {"statistics1", "statistics2"}


def test_the_plan_counts_what_is_read_of_statistics(tmp_path: Path) -> None:
    _experts(tmp_path, "llama")
    plan = merganser.plan(_recipe(tmp_path))
    plain = merganser.plan(
        {
            **_recipe(tmp_path),
            "merge_method": "linear",
            "models": [{"model": str(tmp_path / f"expert{i}"), "parameters": {"weight": 1}} for i in (1, 2)],
        }
    )
    # per block: three Gram matrices of width 32 and one of 48, in float32, for each of seven matrices and two models
    grams = 4 * 2 * 4 * (6 * 32**2 + 48**2)
    base = sum(tensor.nbytes for tensor in merganser.open_checkpoint(str(tmp_path / "base")).tensors.values())
    assert plan.bytes_read == plain.bytes_read + base + grams


def test_recipes_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    _experts(tmp_path, "llama")
    merganser.calibrate(
        tmp_path / "expert1", [tmp_path / "data1.jsonl"], tmp_path / "magnitudes", statistics=["magnitude"]
    )
    other = save(tmp_path / "other", "gpt2")
    add_tokenizer(other)
    merganser.calibrate(other, [tmp_path / "data1.jsonl"], tmp_path / "of-gpt2")

    def with_first(**first: Any) -> dict[str, Any]:
        recipe = _recipe(tmp_path)
        recipe["models"][0] = {"model": str(tmp_path / "expert1"), **first}
        return recipe

    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        (
            with_first(),
            RecipeError,
            r"models\[0\]: regmean needs statistics of this model from data \(gram\); name a text file as 'data', or write them ",
        ),
        (with_first(statistics="nowhere"), DataError, "nowhere: there is no such folder"),
        (with_first(statistics=str(tmp_path / "base")), DataError, "is not a folder of statistics"),
        (with_first(statistics=str(tmp_path / "magnitudes")), DataError, "Calibrate again with --statistics gram"),
        (with_first(statistic="x"), RecipeError, "unknown key 'statistic'. Did you mean 'statistics'?"),
        (with_first(statistics=["x"]), RecipeError, "statistics"),
        (
            with_first(statistics=str(tmp_path / "of-gpt2")),
            RecipeError,
            r"models\[0\]: its statistics have no entry for",
        ),
    ]
    both = _recipe(tmp_path)
    for model in both["models"]:
        model["statistics"] = str(tmp_path / "of-gpt2")
    cases.append((both, RecipeError, "cover none of the tensors that regmean merges"))
    based = _recipe(tmp_path)
    based["models"].append({"model": str(tmp_path / "base"), "statistics": str(tmp_path / "statistics1")})
    cases.append((based, RecipeError, r"models\[2\] statistics: regmean uses no statistics of the base"))
    linear = {**_recipe(tmp_path), "merge_method": "linear", "parameters": {"weight": 1}}
    cases.append((linear, RecipeError, r"models\[0\] statistics: linear uses no statistics from data"))
    for recipe, kind, message in cases:
        with pytest.raises(kind, match=message):
            merganser.merge(recipe, tmp_path / "out")
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"a": FromData("gram", inputs="prefix"), "b": FromData("magnitude")}, "of different inputs or models"),
        ({"a": FromData("magnitude", of="base"), "b": FromData("magnitude")}, "of different inputs or models"),
        ({"a": FromData("gram", inputs="merged", of="first")}, "first model alone are of its own inputs"),
        ({"a": FromData("cross_gram", inputs="prefix")}, "a compares inputs of the merged model with others"),
        ({"a": FromData("gram", inputs="merged")}, "so one of the statistics must be cross_gram"),
        (
            {"a": FromData("gram", inputs="mean")},
            "a: inputs='mean' are compared with those of the models, as cross_gram",
        ),
        ({"a": FromData("coefficients")}, "a: coefficients need inputs='fitted' or 'end_to_end'"),
        ({"a": FromData("gram", inputs="fitted")}, "a: with inputs='fitted' there are no sums, and gram is one"),
    ],
)
def test_declarations_that_contradict_themselves_are_refused(wanted: dict[str, FromData], message: str) -> None:
    def method(base: Any, models: Any, *, others: Others = "average", embeddings: Embeddings = "others") -> Any:
        """Nothing.

            merged = base

        Use when:
            Never.

        Args:

        Differs from the paper:
            None.
        """

    with pytest.raises(TypeError, match=message):
        merge_method(family="data", cite="-", scope="matrix", statistics=wanted)(method)


@pytest.mark.parametrize(
    ("scope", "message"),
    [
        ("element", "a are of a whole tensor"),
        ("tensor", "parameters chunks, rate, regulariser, start, steps, weight"),
    ],
)
def test_coefficients_need_whole_tensors_and_the_parameters_of_the_fit(scope: Any, message: str) -> None:
    def method(base: Any, models: Any) -> Any:
        """Nothing.

            merged = base

        Use when:
            Never.

        Differs from the paper:
            None.
        """

    wanted = {"a": FromData("coefficients", inputs="fitted")}
    with pytest.raises(TypeError, match=message):
        merge_method(family="data", cite="-", scope=scope, statistics=wanted)(method)


def test_statistics_of_a_model_of_another_width_are_refused(tmp_path: Path) -> None:
    _experts(tmp_path, "llama")
    import transformers

    wide = transformers.LlamaConfig.from_pretrained(tmp_path / "base", hidden_size=64)
    transformers.LlamaForCausalLM(wide).save_pretrained(tmp_path / "wide")
    add_tokenizer(tmp_path / "wide")
    merganser.calibrate(tmp_path / "wide", [tmp_path / "data1.jsonl"], tmp_path / "of-wide")
    recipe = _recipe(tmp_path)
    recipe["models"][1]["statistics"] = str(tmp_path / "of-wide")
    with pytest.raises(
        RecipeError, match=r"models\[1\]: its statistics are of another model: gram of .* has shape \[64, 64\]"
    ):
        merganser.plan(recipe)


def test_state_dicts_have_no_statistics() -> None:
    state = {"weight": torch.ones(2, 2)}
    with pytest.raises(UnsupportedError, match="regmean: needs statistics from data"):
        merganser.merge_state_dicts("regmean", [state], base=state)


def test_a_merge_is_not_continued_with_other_statistics(tmp_path: Path) -> None:
    from merganser.engine.record import fingerprint

    _experts(tmp_path, "llama")
    plan = merganser.plan(_recipe(tmp_path))
    before = fingerprint(plan, {})
    assert fingerprint(merganser.plan(_recipe(tmp_path)), {}) == before
    shutil.rmtree(tmp_path / "statistics2")
    merganser.calibrate(tmp_path / "expert2", [tmp_path / "data1.jsonl"], tmp_path / "statistics2", length=40)
    assert fingerprint(merganser.plan(_recipe(tmp_path)), {}) != before


def test_an_evaluation_tells_merges_by_other_statistics_apart(tmp_path: Path) -> None:
    from contextlib import ExitStack

    from merganser.inference.sources import open_source

    _experts(tmp_path, "llama")
    recipe = merganser.load_recipe(_recipe(tmp_path))
    hashes = []
    for _ in range(2):
        with ExitStack() as stack:
            hashes.append(open_source(recipe, stack).hash)
        shutil.rmtree(tmp_path / "statistics2")
        merganser.calibrate(tmp_path / "expert2", [tmp_path / "data1.jsonl"], tmp_path / "statistics2", length=40)
    assert hashes[0] != hashes[1]
