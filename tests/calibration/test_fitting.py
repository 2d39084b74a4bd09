"""Coefficients that are fitted within a merge, block by block."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from merganser.calibration.forward.stream import Stream
from merganser.engine.merge import merge
from merganser.errors import RecipeError
from merganser.statistics import Statistics, open_statistics
from tests.calibration.merging import BLOCKS, LENGTH, Family, make_family
from tests.reference.expert_merging import expert_merging_walk

STEPS = 2


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Family:
    return make_family(tmp_path_factory.mktemp("llama"), "llama")


def coefficients(found: list[Statistics]) -> dict[str, torch.Tensor]:
    """By tensor, shape [models, chunks]."""
    parts = [
        {name: t for file in own.about["files"] for name, t in load_file(own.path / file).items()} for own in found
    ]
    names = [name for name in parts[0] if name.startswith("coefficients/")]
    return {name.removeprefix("coefficients/"): torch.stack([own[name] for own in parts]) for name in names}


@pytest.mark.parametrize(("name", "chunks"), [("llama", 2), ("gpt2", 1)])
def test_agrees_with_whole_models_in_memory(name: str, chunks: int, tmp_path: Path) -> None:
    family = make_family(tmp_path, name)
    given = {"steps": STEPS, "chunks": chunks, "start": 0.3, "regulariser": 0.05}
    found = coefficients(family.calibrate("expert_merging", tmp_path / "run", batch=99, **given))
    _, expected = expert_merging_walk(
        family.open(family.base).double(),
        [family.open(model).double() for model in family.models],
        [family.sequences(k) for k in range(2)],
        # blocks are fitted from the first one on, and those behind do not matter
        BLOCKS[name][:2],
        **given,
    )
    assert {key for key in found if key.startswith(tuple(f"{block}." for block in BLOCKS[name][:2]))} == expected.keys()
    moved = max(float((own - 0.3).abs().max()) for own in expected.values())
    assert moved > 0.05
    for key, own in expected.items():
        torch.testing.assert_close(found[key].double(), own, rtol=0, atol=1e-3, msg=key)


def test_the_merge_has_the_coefficients_and_the_start_outside(llama: Family, tmp_path: Path) -> None:
    merged = llama.merged("expert_merging", tmp_path, steps=STEPS)
    base = load_file(llama.base / "model.safetensors")
    models = [load_file(model / "model.safetensors") for model in llama.models]
    found = coefficients([open_statistics(tmp_path / f"statistics/model-{k + 1}") for k in range(2)])
    assert "model.layers.1.input_layernorm.weight" in found
    for name, tensor in merged.items():
        own = found.get(name, torch.full((2, 1), 0.1))
        expected = base[name] + sum(c * (model[name] - base[name]) for c, model in zip(own, models, strict=True))
        torch.testing.assert_close(tensor, expected, rtol=0, atol=1e-6, msg=name)


def test_a_merge_computes_more_like_the_models(llama: Family, tmp_path: Path) -> None:
    alone = Family("llama", llama.base, llama.models[:1], llama.data[:1])
    found = coefficients(
        alone.calibrate("expert_merging", tmp_path / "run", steps=10, rate=1.0, regulariser=0.0, batch=99)
    )
    matrices = torch.cat([own.flatten() for name, own in found.items() if "proj" in name])
    # one model alone is computed exactly with coefficients of 1
    assert matrices.mean() > 0.7


def test_a_killed_fit_continues_with_the_same_bytes(
    llama: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = llama.calibrate("expert_merging", tmp_path / "whole", steps=2)
    advance, done = Stream.advance, []

    def killed(self, begin):
        done.append(self.state.done)
        if len(done) == 6:
            raise KeyboardInterrupt
        advance(self, begin)

    with monkeypatch.context() as patch:
        patch.setattr(Stream, "advance", killed)
        with pytest.raises(KeyboardInterrupt):
            llama.calibrate("expert_merging", tmp_path / "killed", steps=2)
    assert not (tmp_path / "killed").exists()
    again = llama.calibrate("expert_merging", tmp_path / "killed", steps=2)
    for one, two in zip(whole, again, strict=True):
        for file in one.path.iterdir():
            assert file.read_bytes() == (two.path / file.name).read_bytes()
    assert sorted(path.name for path in (tmp_path / "killed").iterdir()) == ["model-1", "model-2"]


def test_models_without_influence_and_equal_models(llama: Family, tmp_path: Path) -> None:
    shutil.copytree(llama.base, tmp_path / "same")
    still = Family("llama", llama.base, [tmp_path / "same"], llama.data[:1])
    found = coefficients(still.calibrate("expert_merging", tmp_path / "run", steps=2))
    assert all(bool(own.isfinite().all()) for own in found.values())


def test_steps_that_differ_within_a_block_are_refused(llama: Family, tmp_path: Path) -> None:
    uneven = [{"filter": "mlp", "value": 3}, {"value": 4}]
    with pytest.raises(RecipeError, match=r"learns model\.layers\.0 as a whole, .* different steps"):
        llama.calibrate("expert_merging", tmp_path / "out", steps=uneven)
    assert not (tmp_path / "out").exists()


def test_a_step_uses_as_many_sequences_as_asked_whatever_a_batch_may_hold(llama: Family, tmp_path: Path) -> None:
    found = [
        coefficients(llama.calibrate("expert_merging", tmp_path / f"{tokens}", steps=3, batch=1, batch_tokens=tokens))
        for tokens in (LENGTH, 2048)
    ]
    for name, own in found[0].items():
        assert torch.equal(own, found[1][name])
    both = coefficients(llama.calibrate("expert_merging", tmp_path / "both", steps=3, batch=2))
    assert any(not torch.equal(own, both[name]) for name, own in found[0].items())
    uneven = [{"filter": "mlp", "value": 3}, {"value": 4}]
    with pytest.raises(RecipeError, match=r"divides all data in batches once, and its tensors have a different batch"):
        llama.calibrate("expert_merging", tmp_path / "out", batch=uneven)
    assert not (tmp_path / "out").exists()


def test_damaged_coefficients_are_refused(llama: Family, tmp_path: Path) -> None:
    found = llama.calibrate("expert_merging", tmp_path / "run", steps=1)
    file = found[1].path / "statistics-00001-of-00004.safetensors"
    tensors = load_file(file)
    name = "coefficients/model.layers.0.mlp.up_proj.weight"
    save_file({**tensors, name: torch.ones(2, 2)}, file)
    with pytest.raises(RecipeError, match=r"models\[1\]: its statistics are damaged: coefficients of .*up_proj"):
        merge(llama.recipe("expert_merging", found, steps=1), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_experts_of_a_mixture_and_an_encoder_are_fitted(tmp_path: Path) -> None:
    mixture = make_family(tmp_path / "mixture", "mixtral")
    found = coefficients(mixture.calibrate("expert_merging", tmp_path / "run", steps=1))
    assert any(".experts." in name for name in found)
    pair = make_family(tmp_path / "pair", "t5")
    found = coefficients(pair.calibrate("expert_merging", tmp_path / "other", steps=1))
    assert any(name.startswith("encoder.block.1.") for name in found)
    assert any(name.startswith("decoder.block.1.") for name in found)
    assert all(float((own - 0.1).abs().max()) > 0 for name, own in found.items() if name.endswith("wo.weight"))


def test_small_tensors_have_as_many_chunks_as_elements(llama: Family, tmp_path: Path) -> None:
    found = coefficients(llama.calibrate("expert_merging", tmp_path / "run", steps=1, chunks=100))
    norm = found["model.layers.0.input_layernorm.weight"]
    assert norm.shape[1] < 100
    assert found["model.layers.0.mlp.up_proj.weight"].shape == (2, 100)
