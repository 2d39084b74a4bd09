"""Statistics that are measured within a merge, block by block."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import merganser
from merganser.calibration.forward.stream import Stream
from merganser.calibration.within import calibrate_within, walk
from merganser.engine.merge import merge
from merganser.engine.planner.planner import build_plan
from merganser.errors import RecipeError
from merganser.recipe import load_recipe
from merganser.statistics import Statistics, open_statistics
from tests.calibration.families import FAMILIES
from tests.calibration.merging import BLOCKS, LENGTH, Family, make_family
from tests.evaluation.tiny import add_tokenizer
from tests.reference.featcal import featcal_walk
from tests.reference.pleas import pleas_walk
from tests.reference.regmean_plus import regmean_plus as literal
from tests.reference.zipit import zipit_walk


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return make_family(tmp_path_factory.mktemp("llama"), "llama")


def _one_block(root: Path) -> Family:
    """Models of one block, which differ inside it alone."""
    torch.manual_seed(0)
    config = FAMILIES["llama"][0]()
    config.num_hidden_layers = 1
    import transformers

    transformers.LlamaForCausalLM(config).save_pretrained(root / "base")
    add_tokenizer(root / "base")
    family = make_family(root, "llama", base=root / "base")
    base = load_file(family.base / "model.safetensors")
    for model in family.models:
        own = load_file(model / "model.safetensors")
        mixed = {name: own[name] if ".layers." in name else base[name] for name in own}
        save_file(mixed, model / "model.safetensors", {"format": "pt"})
    return family


@pytest.mark.parametrize("name", BLOCKS)
def test_agrees_with_whole_models_in_memory(name: str, tmp_path: Path) -> None:
    family = make_family(tmp_path, name)
    found = family.merged("regmean_plus", tmp_path / "run", alpha=0.8, ridge=0.01)
    expected = literal(
        family.open(family.base),
        [family.open(model) for model in family.models],
        [family.sequences(k) for k in range(2)],
        BLOCKS[name],
        alpha=0.8,
        ridge=0.01,
    ).state_dict()
    base = load_file(family.base / "model.safetensors")
    for key, tensor in found.items():
        step = (expected[key] - base[key]).norm()
        assert (tensor - expected[key]).norm() <= 1e-4 * step, key


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_inputs_of_the_merged_model_are_compared_with_those_of_models(name: str, tmp_path: Path) -> None:
    family = make_family(tmp_path, name)
    found = family.merged("featcal", tmp_path / "run", alpha=0.5, rho=1.3)
    expected = featcal_walk(
        family.open(family.base),
        [family.open(model) for model in family.models],
        [family.sequences(k) for k in range(2)],
        BLOCKS[name],
        alpha=0.5,
        rho=1.3,
    ).state_dict()
    base = load_file(family.base / "model.safetensors")
    for key, tensor in found.items():
        step = (expected[key] - base[key]).norm()
        assert (tensor - expected[key]).norm() <= 1e-4 * step, key


def test_the_merge_writes_the_blocks_that_the_data_passed_through(
    llama: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passed: dict[str, torch.Tensor] = {}
    make = walk.MergedTensors.make

    def recorded(self: Any, names: Any, data: Any = None) -> None:
        make(self, names, data)
        passed.update(self._made)

    monkeypatch.setattr(walk.MergedTensors, "make", recorded)
    written = llama.merged("regmean_plus", tmp_path)
    assert {name for name in written if ".layers.3." not in name and "lm_head" not in name} == passed.keys()
    for name, tensor in passed.items():
        assert torch.equal(tensor, written[name]), name


def test_inputs_are_of_the_merged_blocks_before(llama: Family, tmp_path: Path) -> None:
    found = llama.calibrate("regmean_plus", tmp_path / "within")
    alone = merganser.calibrate(llama.models[0], [llama.data[0]], tmp_path / "alone", length=LENGTH)
    assert (found[0].inputs, alone.inputs) == ("prefix", "own")
    assert found[0].about["without"] == []
    assert found[0].tensors == alone.tensors
    assert found[0].about["parts"] == alone.about["parts"]
    own, other = (load_file(f.path / "statistics-00003-of-00004.safetensors") for f in (alone, found[0]))
    assert all(torch.equal(own[name], other[name]) for name in own if name.startswith("count/"))
    assert all(not torch.allclose(own[name], other[name], rtol=0.1) for name in own if name.startswith("gram/"))


def test_one_block_has_the_statistics_of_regmean(tmp_path: Path) -> None:
    family = _one_block(tmp_path)
    found = family.calibrate("regmean_plus", tmp_path / "within")
    for k, model in enumerate(family.models):
        alone = merganser.calibrate(model, [family.data[k]], tmp_path / f"alone{k}", length=LENGTH)
        file = "statistics-00001-of-00001.safetensors"
        assert (alone.path / file).read_bytes() == (found[k].path / file).read_bytes()


def test_one_model_and_equal_models_stay_as_they_are(llama: Family, tmp_path: Path) -> None:
    one, two = llama.models
    alone = Family("llama", llama.base, [one], llama.data[:1])
    shutil.copytree(two, tmp_path / "copy")
    twins = Family("llama", llama.base, [two, tmp_path / "copy"], llama.data)
    for family, kept, folder in ((alone, one, tmp_path / "alone"), (twins, two, tmp_path / "twins")):
        merged = family.merged("regmean_plus", folder)
        for name, tensor in load_file(kept / "model.safetensors").items():
            torch.testing.assert_close(merged[name], tensor, rtol=0, atol=2e-7)


def test_the_order_of_models_changes_only_rounding(llama: Family, tmp_path: Path) -> None:
    turned = Family("llama", llama.base, llama.models[::-1], llama.data[::-1])
    one, two = llama.merged("regmean_plus", tmp_path / "one"), turned.merged("regmean_plus", tmp_path / "two")
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=0, atol=1e-5)


def test_the_size_of_batches_changes_only_rounding(llama: Family, tmp_path: Path) -> None:
    whole = llama.calibrate("regmean_plus", tmp_path / "whole")
    single = llama.calibrate("regmean_plus", tmp_path / "single", batch_tokens=1)
    for one, two in zip(whole, single, strict=True):
        for file in one.about["files"]:
            found, other = load_file(one.path / file), load_file(two.path / file)
            for name, tensor in found.items():
                torch.testing.assert_close(other[name], tensor, rtol=1e-4, atol=1e-4 * float(tensor.abs().max()))


@pytest.mark.parametrize("method", ["regmean_plus", "featcal"])
@pytest.mark.parametrize("calls", [1, 5])
def test_a_killed_calibration_continues_with_the_same_bytes(
    method: str, calls: int, llama: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = llama.calibrate(method, tmp_path / "whole")
    advance, done = Stream.advance, []

    def killed(self: Stream, begin: Any) -> None:
        done.append(self.state.done)
        if len(done) == calls + 1:
            raise KeyboardInterrupt
        advance(self, begin)

    monkeypatch.setattr(Stream, "advance", killed)
    with pytest.raises(KeyboardInterrupt):
        llama.calibrate(method, tmp_path / "killed")
    assert not (tmp_path / "killed").exists()
    monkeypatch.setattr(Stream, "advance", lambda self, begin: (done.append(self.state.done), advance(self, begin)))
    done.clear()
    again = llama.calibrate(method, tmp_path / "killed")
    # two models, three blocks that are passed: finished blocks do not run again
    assert len(done) == 6 - calls // 2 * 2
    for one, two in zip(whole, again, strict=True):
        assert sorted(file.name for file in two.path.iterdir()) == sorted(file.name for file in one.path.iterdir())
        for file in one.path.iterdir():
            assert file.read_bytes() == (two.path / file.name).read_bytes()
    assert sorted(path.name for path in (tmp_path / "killed").iterdir()) == ["model-1", "model-2"]


def test_equal_models_compute_what_the_merge_of_them_does(llama: Family, tmp_path: Path) -> None:
    shutil.copytree(llama.models[0], tmp_path / "copy")
    twins = Family("llama", llama.base, [llama.models[0], tmp_path / "copy"], llama.data)
    merged = twins.merged("featcal", tmp_path / "run", rho=1.0)
    for name, tensor in load_file(llama.models[0] / "model.safetensors").items():
        torch.testing.assert_close(merged[name], tensor, rtol=0, atol=2e-6)


def test_experts_of_a_mixture_have_no_pairs(tmp_path: Path) -> None:
    family = make_family(tmp_path, "mixtral")
    found = family.calibrate("featcal", tmp_path / "pairs")
    assert not any(".experts." in name for name in found[0].tensors)
    assert any(".experts." in name for name in found[0].about["without"])
    assert found[0].statistics == ("count", "gram", "cross_gram")
    plain = family.calibrate("regmean_plus", tmp_path / "plain")
    assert any(".experts." in name for name in plain[0].tensors)
    merge(family.recipe("featcal", found), tmp_path / "out")


def test_statistics_of_another_kind_are_refused(llama: Family, tmp_path: Path) -> None:
    own = [
        merganser.calibrate(model, [data], tmp_path / f"own{k}", length=LENGTH)
        for k, (model, data) in enumerate(zip(llama.models, llama.data, strict=True))
    ]
    with pytest.raises(
        RecipeError, match=r"are of what the model itself computes; regmean_plus needs those of what the "
    ):
        merge(llama.recipe("regmean_plus", own), tmp_path / "out")
    within_merge = llama.calibrate("regmean_plus", tmp_path / "within")
    with pytest.raises(
        RecipeError, match=r"blocks compute behind the merged blocks of a merge; regmean needs those of what"
    ):
        merge(llama.recipe("regmean", within_merge), tmp_path / "out")
    with pytest.raises(RecipeError, match="measured within another merge"):
        merge(llama.recipe("regmean_plus", within_merge, alpha=0.25), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_merged_block_by_block_is_refused(llama: Family, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="regmean takes no statistics of inputs of merged blocks"):
        llama.calibrate("regmean", tmp_path / "out")
    few = Family("llama", llama.base, llama.models, llama.data)
    plan = build_plan(load_recipe(few.recipe("regmean_plus")), measured=False)
    with pytest.raises(RecipeError, match="2 models are merged, 0 have data"):
        calibrate_within(plan, [], tmp_path / "out")
    sources = [{"model": str(model), "layer_range": [0, 4]} for model in llama.models]
    sliced = {"merge_method": "regmean_plus", "base_model": str(llama.base), "slices": [{"sources": sources}]}
    with pytest.raises(RecipeError, match="measures and merges whole models block by block"):
        build_plan(load_recipe(sliced))
    assert not (tmp_path / "out").exists()


def test_a_model_that_gives_nan_is_named_with_its_text(llama: Family, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(llama.models[1], broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"].mul_(1e30)
    tensors["model.layers.2.mlp.gate_proj.weight"].mul_(1e30)
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    family = Family("llama", llama.base, [llama.models[0], broken], llama.data)
    with pytest.raises(merganser.errors.NonFiniteError, match=r"data1\.jsonl:\d+: the model produces NaN .*layers\.2"):
        family.calibrate("regmean_plus", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken"]


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_inputs_are_compared_with_the_mean_over_all_models(name: str, tmp_path: Path) -> None:
    """PLeaS needs no base, and the same data for all models."""
    family = make_family(tmp_path, name)
    written = family.recipe("pleas", ridge=1e-3, limit=1e6) | {"data": {"files": str(family.data[0]), "length": LENGTH}}
    del written["base_model"]
    merge(written, tmp_path / "out")
    found = load_file(tmp_path / "out/model.safetensors")
    models = [family.open(model) for model in family.models]
    expected = pleas_walk(models, family.sequences(0), BLOCKS[name], ridge=1e-3).state_dict()
    start = pleas_walk(models, family.sequences(0), []).state_dict()
    for key, tensor in found.items():
        step = (expected[key] - start[key]).norm()
        assert (tensor - expected[key]).norm() <= 2e-3 * step + 1e-6 * start[key].norm(), key


def test_models_on_other_tokens_are_not_compared(llama: Family, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"pleas compares the models token by token, and .*model1 reads other tokens"):
        llama.calibrate("pleas", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_hidden_units_are_zipped_by_what_they_compute(name: str, tmp_path: Path) -> None:
    """Compared with whole models in memory; what is not a hidden unit is averaged."""
    family = make_family(tmp_path, name)
    written = family.recipe("zipit", beta=0.5) | {"data": {"files": str(family.data[0]), "length": LENGTH}}
    del written["base_model"]
    merge(written, tmp_path / "out")
    found = load_file(tmp_path / "out/model.safetensors")
    models = [family.open(model) for model in family.models]
    expected = zipit_walk(models, family.sequences(0), BLOCKS[name], alpha=0.3, beta=0.5)
    moved = 0.0
    for key, tensor in found.items():
        torch.testing.assert_close(tensor.double(), expected[key], rtol=0, atol=1e-6, msg=key)
        average = sum(model.state_dict()[key].double() for model in models) / 2
        moved = max(moved, float((expected[key] - average).abs().max()))
    assert moved > 0.01


@pytest.mark.parametrize("method", ["featcal", "pleas"])
def test_a_matrix_that_is_used_twice_in_a_block_is_compared_use_by_use(
    method: str, llama: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The inputs of equal models are the same in all uses, so that their cross moments are their moments."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        up = self.up_proj(x)
        used: torch.Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) * up) + self.down_proj(up)
        return used

    monkeypatch.setattr("transformers.models.llama.modeling_llama.LlamaMLP.forward", forward)
    shutil.copytree(llama.models[0], tmp_path / "copy")
    twins = Family("llama", llama.base, [llama.models[0], tmp_path / "copy"], [llama.data[0]] * 2)
    found = twins.calibrate(method, tmp_path / "statistics")[0]
    alone = merganser.calibrate(twins.models[0], [twins.data[0]], tmp_path / "alone", length=LENGTH)
    name = "model.layers.0.mlp.down_proj.weight"
    pairs, own = _sums(found), _sums(alone)
    assert pairs[f"count/{name}"] == 2 * found.about["parts"][0]["counted"]
    torch.testing.assert_close(pairs[f"cross_gram/{name}"], own[f"gram/{name}"], rtol=1e-5, atol=1e-5)


def _sums(found: Statistics) -> dict[str, torch.Tensor]:
    return {name: own for file in found.about["files"] for name, own in load_file(found.path / file).items()}


def test_hidden_units_of_a_matrix_that_is_used_twice_are_zipped(
    llama: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        hidden = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
        used: torch.Tensor = self.down_proj(hidden) + self.down_proj(2 * hidden)
        return used

    monkeypatch.setattr("transformers.models.llama.modeling_llama.LlamaMLP.forward", forward)
    recipe = llama.recipe("zipit") | {"data": {"files": str(llama.data[0]), "length": LENGTH}}
    del recipe["base_model"]
    recipe["keep_statistics"] = str(tmp_path / "kept")
    merge(recipe, tmp_path / "out")
    found = open_statistics(tmp_path / "kept/within-1/model0")
    assert _sums(found)["count/model.layers.0.mlp.down_proj.weight"] == 2 * found.about["parts"][0]["counted"]
