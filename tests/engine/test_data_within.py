"""Recipes whose method measures its models within the merge, on data that the recipe names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file, save_file

import merganser
from merganser.calibration.forward.stream import Stream
from merganser.calibration.within import walk
from merganser.checkpoint import Reader
from merganser.engine.merge import merge, plan
from merganser.engine.run import Interrupted
from merganser.errors import OutputError, RecipeError
from merganser.statistics import open_statistics
from tests.calibration.families import VOCAB
from tests.calibration.merging import LENGTH, Family, make_family
from tests.evaluation.tiny import add_tokenizer

TWO_DTYPES = ("float32", "bfloat16")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return make_family(tmp_path_factory.mktemp("llama"), "llama")


def written(family: Family, method: str = "regmean_plus", **keys: Any) -> dict[str, Any]:
    """A recipe in which each model has its data, and all of them the length."""
    recipe = family.recipe(method)
    for entry, data in zip(recipe["models"], family.data, strict=True):
        entry["data"] = {"files": str(data), "length": LENGTH}
    return {**recipe, **keys}


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize("method", ["regmean_plus", "featcal", "expert_merging"])
def test_a_recipe_with_data_gives_the_merge_by_hand(method: str, llama: Family, tmp_path: Path) -> None:
    parameters = {"steps": 2} if method == "expert_merging" else {}
    llama.merged(method, tmp_path / "hand", **parameters)
    merge(written(llama, method, parameters=parameters), tmp_path / "out")
    assert weights(tmp_path / "out") == weights(tmp_path / "hand/out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hand", "out"]


def test_convolutions_have_coefficients_like_matrices(tmp_path: Path) -> None:
    """LFM2 has convolutions along the tokens, whose weights have three axes."""
    keys = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    layers = ["conv", "full_attention"]
    config = transformers.Lfm2Config(**keys, vocab_size=VOCAB, num_hidden_layers=2, layer_types=layers, pad_token_id=0)
    torch.manual_seed(0)
    transformers.Lfm2ForCausalLM(config).save_pretrained(tmp_path / "base")
    add_tokenizer(tmp_path / "base")
    family = make_family(tmp_path, "lfm2", base=tmp_path / "base")
    kernel = "model.layers.0.conv.conv.weight"
    for method in ("expert_merging", "adamerging"):
        recipe = written(family, method, keep_statistics=str(tmp_path / method))
        recipe["parameters"] = {"steps": 2}
        merge(recipe, tmp_path / f"{method}-merged")
        merged = load_file(tmp_path / f"{method}-merged" / "model.safetensors")
        base, *models = (load_file(own / "model.safetensors")[kernel] for own in (family.base, *family.models))
        kept = [statistics(tmp_path / method / "within-1" / own.name, kernel) for own in family.models]
        by_hand = base + sum(own * (model - base) for own, model in zip(kept, models, strict=True))
        torch.testing.assert_close(merged[kernel], by_hand)


def statistics(folder: Path, tensor: str) -> torch.Tensor:
    """Read the coefficients of a tensor, here one number."""
    found = open_statistics(folder)
    with Reader() as reader:
        (value,) = reader.tensor(found.info("coefficients", tensor)).tolist()
    return torch.tensor(value)


@pytest.mark.parametrize("method", ["zipit", "dam"])
def test_a_base_that_is_not_used_is_a_model_where_it_is_listed(method: str, llama: Family, tmp_path: Path) -> None:
    """Such a base gives config and tokenizer alone: the merge is the same without the key."""
    recipe = {"merge_method": method, "dtype": "float32", "base_model": str(llama.base)}
    recipe |= {"models": [{"model": str(own)} for own in (llama.base, llama.models[0])]}
    recipe |= {"data": {"files": str(llama.data[0]), "length": LENGTH}}
    if method == "dam":
        recipe["parameters"] = {"steps": 2}
    merge(recipe, tmp_path / "with")
    del recipe["base_model"]
    merge(recipe, tmp_path / "without")
    assert weights(tmp_path / "with") == weights(tmp_path / "without")


@pytest.mark.parametrize("method", ["regmean_plus", "dam"])
def test_bytes_that_are_read_are_those_of_the_models(method: str, llama: Family) -> None:
    """The merge computes in the dtype of its output, but reads the files of its models."""
    read = [[own.bytes_read for own in plan(written(llama, method, dtype=dtype)).calibrations] for dtype in TWO_DTYPES]
    assert read[0] == read[1]


def test_the_plan_says_what_is_measured(llama: Family, tmp_path: Path) -> None:
    plus, alone, pairs = (plan(written(llama, method)) for method in ("regmean_plus", "regmean", "featcal"))
    assert [each.name for each in plus.calibrations] == ["within-1/model0", "within-1/model1"]
    one, two, three = (each.calibrations[0] for each in (alone, plus, pairs))
    assert two.statistics_bytes == one.statistics_bytes
    assert two.forward_operations == 2 * one.forward_operations
    assert three.forward_operations == 3 * one.forward_operations
    assert (two.statistics, three.statistics) == (("count", "gram"), ("count", "gram", "cross_gram"))
    assert plus.bytes_read == alone.bytes_read
    fitted = plan(written(llama, "expert_merging", parameters={"batch": 99})).calibrations[0]
    assert fitted.statistics == ("count", "coefficients")
    # three passes, and steps forward and backward on all sequences
    assert fitted.forward_operations == pytest.approx((3 + 5 * 30) * one.forward_operations)
    few = plan(written(llama, "expert_merging", parameters={"steps": 2})).calibrations[0]
    # on two of eight
    assert few.forward_operations == pytest.approx((3 + 5 * 2 / 4) * one.forward_operations)
    assert fitted.statistics_bytes < 0.1 * one.statistics_bytes
    found = merge(written(llama, "featcal", keep_statistics=str(tmp_path / "kept")), tmp_path / "out")
    stored = sum(file.stat().st_size for file in (tmp_path / "kept/within-1/model0").glob("*.safetensors"))
    assert three.statistics_bytes == pytest.approx(stored, rel=0.2)
    assert found.record["calibrations"][0]["statistics"] == ["count", "gram", "cross_gram"]


def test_kept_statistics_are_taken_for_the_same_merge_alone(
    llama: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = written(llama, keep_statistics=str(tmp_path / "kept"))
    merge(recipe, tmp_path / "one")
    with pytest.raises(
        OutputError, match=r"within-1/model0: the statistics there are of another merge than the recipe's"
    ):
        merge({**recipe, "parameters": {"alpha": 0.25}}, tmp_path / "two")
    other = written(llama, keep_statistics=str(tmp_path / "kept"))
    other["models"][0]["data"]["length"] = LENGTH // 2
    with pytest.raises(OutputError, match=r"within-1/model0: the statistics there are of other data"):
        merge(other, tmp_path / "two")

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(walk, "_Walk", never)
    merge(recipe, tmp_path / "two")
    assert weights(tmp_path / "one") == weights(tmp_path / "two")


def test_an_interrupted_merge_continues_at_its_block(
    llama: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = written(llama)
    merge(recipe, tmp_path / "whole")
    advance, passed = Stream.advance, []

    def stopped(self: Stream, begin: Any) -> None:
        if len(passed) == 4:
            raise KeyboardInterrupt
        passed.append(self.state.done)
        advance(self, begin)

    monkeypatch.setattr(Stream, "advance", stopped)
    with pytest.raises(Interrupted, match="run the same command again to continue"):
        merge(recipe, tmp_path / "out")
    assert (tmp_path / ".out.statistics").is_dir()
    passed.clear()
    merge(recipe, tmp_path / "out")
    assert passed == [2, 2]
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


def test_another_recipe_does_not_continue_what_is_left(
    llama: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from merganser.engine import run

    def stopped(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    # all is measured, and the merge stops before its end
    with monkeypatch.context() as patch:
        patch.setattr(run, "write_rest", stopped)
        with pytest.raises(Interrupted):
            merge(written(llama), tmp_path / "out")
    changed = written(llama, parameters={"alpha": 0.25})
    merge(changed, tmp_path / "out")
    merge(changed, tmp_path / "fresh")
    assert weights(tmp_path / "out") == weights(tmp_path / "fresh")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fresh", "out"]


def test_a_base_among_the_models_and_two_documents(llama: Family, tmp_path: Path) -> None:
    merge(written(llama), tmp_path / "hand")
    listed = written(llama, name="first")
    listed["models"].insert(1, {"model": str(llama.base)})
    second = {
        "merge_method": "aim",
        "base_model": str(llama.base),
        "models": [
            {"model": str(llama.base), "data": {"files": str(llama.data[0]), "length": LENGTH}},
            {"model": "first"},
        ],
        "parameters": {"omega": 0.5},
    }
    merge("---\n".join(yaml.safe_dump(each) for each in (listed, second)), tmp_path / "out", keep_stages=True)
    first = tmp_path / ".out.stages/first"
    assert weights(first) == weights(tmp_path / "hand")
    merganser.calibrate(llama.base, [llama.data[0]], tmp_path / "of-base", statistics=["magnitude"], length=LENGTH)
    by_hand = {
        **second,
        "models": [{"model": str(llama.base), "statistics": str(tmp_path / "of-base")}, {"model": str(first)}],
    }
    merge(by_hand, tmp_path / "last")
    assert weights(tmp_path / "out") == weights(tmp_path / "last")
    base, before, after = (load_file(folder / "model.safetensors") for folder in (llama.base, first, tmp_path / "out"))
    name = "model.layers.1.mlp.up_proj.weight"
    assert (after[name] - base[name]).norm() < 0.999 * (before[name] - base[name]).norm()


def test_what_does_not_fit_is_refused(llama: Family, tmp_path: Path) -> None:
    found = llama.calibrate("regmean_plus", tmp_path / "statistics")
    mixed = written(llama)
    del mixed["models"][1]["data"]
    mixed["models"][1]["statistics"] = str(found[1].path)
    lacking = llama.recipe("regmean_plus")
    rain = written(llama, "rain")
    cases = [
        (mixed, r"models\[1\]: regmean_plus measures all models together, within the merge; give data for each"),
        (lacking, r"models\[0\]: regmean_plus needs statistics of this model from data \(gram\), measured within"),
        (rain, r"models\[1\].*data: rain uses no statistics of this model; leave the key out"),
    ]
    for recipe, message in cases:
        with pytest.raises(RecipeError, match=message):
            merge(recipe, tmp_path / "out")
        assert sorted(path.name for path in tmp_path.iterdir()) == ["statistics"]


def test_kept_statistics_of_another_merge_are_refused_by_the_plan(llama: Family, tmp_path: Path) -> None:
    recipe = written(llama, keep_statistics=str(tmp_path / "kept"))
    merge(recipe, tmp_path / "one")
    assert [own.present for own in plan(recipe).calibrations] == [True, True]
    message = (
        r"^[^\n]*models\[0\]: data: [^:]*within-1/model0: the statistics there are of another merge than the recipe's"
    )
    with pytest.raises(OutputError, match=message):
        plan({**recipe, "parameters": {"alpha": 0.25}})


def test_kept_statistics_are_of_weights_that_the_plan_compares(tmp_path: Path) -> None:
    family = make_family(tmp_path, "llama")
    recipe = written(family, "regmean", keep_statistics=str(tmp_path / "kept"))
    merge(recipe, tmp_path / "out")
    file = family.models[1] / "model.safetensors"
    save_file({name: own + 0.1 for name, own in load_file(file).items()}, file, {"format": "pt"})
    for run in (plan, lambda given: merge(given, tmp_path / "other")):
        with pytest.raises(
            OutputError, match="model1: the statistics there are of other weights than the recipe's"
        ) as told:
            run(recipe)
        assert str(told.value).count("data:") == 1


def test_fitted_coefficients_are_of_batches_of_one_size(llama: Family, tmp_path: Path) -> None:
    recipe = written(
        llama, "expert_merging", keep_statistics=str(tmp_path / "kept"), parameters={"steps": 2, "batch": 4}
    )
    for own in recipe["models"]:
        own["data"]["batch_tokens"] = 16
    merge(recipe, tmp_path / "one")
    for own in recipe["models"]:
        own["data"]["batch_tokens"] = 2048
    message = r"model0: the statistics there are of batches of another size \(batch_tokens\) than the recipe's"
    with pytest.raises(OutputError, match=message) as told:
        merge(recipe, tmp_path / "two")
    assert str(told.value).count("data:") == 1
