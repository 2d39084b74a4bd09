"""Old and new names of one architecture are matched as transformers loads them."""

from __future__ import annotations

import re

import pytest
import torch
import transformers
from safetensors.torch import load_file

from merganser import merge, plan
from merganser.errors import CheckpointError
from tests.engine.alignment.small_models import change, classifier, linear, loads_fully, save
from tests.making import assert_equal, read_model


def rename(folder, pattern, new, *, suffix="safetensors"):
    own = {re.sub(pattern, new, name): tensor for name, tensor in load_file(folder / "model.safetensors").items()}
    if suffix == "safetensors":
        return change(folder, own)
    (folder / "model.safetensors").unlink()
    torch.save(own, folder / "pytorch_model.bin")
    return folder


def llava(folder):
    torch.manual_seed(len(folder.name))
    text = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": 64,
    }
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.LlavaConfig(
        text_config={"model_type": "llama", **text},
        vision_config={"model_type": "clip_vision_model", **vision, "image_size": 8, "patch_size": 4},
        image_token_index=63,
    )
    transformers.LlavaForConditionalGeneration(config).save_pretrained(folder)
    return folder


OLD_NAMES = {
    "gamma and beta": (r"LayerNorm\.weight", "LayerNorm.gamma"),
    "without a prefix": (r"^bert\.", ""),
}


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize("how", OLD_NAMES)
def test_old_names_of_bert_are_matched(tmp_path, how, suffix):
    models = [classifier(tmp_path / f"m{seed}", 2, seed, "MaskedLM") for seed in range(2)]
    plain = read_model(merge(linear(*models), tmp_path / "plain").out)
    rename(models[1], *OLD_NAMES[how], suffix=suffix)
    found = plan(linear(*models))
    assert any(
        "have the names of another version of bert; matched as transformers loads th" in w for w in found.warnings
    )
    out = merge(linear(*models), tmp_path / "out").out
    assert_equal(read_model(out), plain)
    loads_fully(out, transformers.AutoModelForMaskedLM)


def test_old_names_of_the_donor_stay_its_names(tmp_path):
    models = [classifier(tmp_path / f"m{seed}", 2, seed, "MaskedLM") for seed in range(2)]
    plain = read_model(merge(linear(*models), tmp_path / "plain").out)
    rename(models[0], *OLD_NAMES["gamma and beta"])
    out = read_model(merge(linear(*models), tmp_path / "out").out)
    assert_equal({name.replace("gamma", "weight"): tensor for name, tensor in out.items()}, plain)
    assert any(name.endswith("LayerNorm.gamma") for name in out)


def test_names_of_llava_before_and_after_its_models_were_nested(tmp_path):
    models = [llava(tmp_path / name) for name in ("m", "mm")]
    names = set(read_model(models[0]))
    nested = any(name.startswith("model.language_model.") for name in names)
    plain = read_model(merge(linear(*models), tmp_path / "plain").out)
    if nested:
        rename(models[1], r"^model\.language_model\.", "language_model.model.")
    else:
        rename(models[1], r"^language_model\.model\.", "model.language_model.")
    out = merge(linear(*models), tmp_path / "out").out
    assert_equal(read_model(out), plain)
    loads_fully(out, transformers.LlavaForConditionalGeneration)


def test_other_code_of_an_architecture_is_called_that(tmp_path):
    models = [save(tmp_path / name, "phi") for name in ("m", "mm")]
    rename(models[1], r"^model\.layers\.(\d+)\.(self_attn|mlp)", r"transformer.h.\1.mixer.\2")
    with pytest.raises(
        CheckpointError, match="both are phi, so one was saved by other code: save it again with the code"
    ):
        plan(linear(*models))


def test_models_of_the_same_names_do_not_ask_transformers(tmp_path, monkeypatch):
    models = [save(tmp_path / name, "llama") for name in ("m", "mm")]
    monkeypatch.setattr("merganser.engine.alignment.renaming.build_model", None)
    assert plan(linear(*models)).tensors


def test_without_transformers_names_stay_what_they_are(tmp_path, monkeypatch):
    models = [classifier(tmp_path / f"m{seed}", 2, seed, "MaskedLM") for seed in range(2)]
    rename(models[1], *OLD_NAMES["gamma and beta"])
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(CheckpointError, match=r"LayerNorm\.weight"):
        plan(linear(*models))
