"""Models of several modules: towers beside a language model, encoders and decoders."""

from __future__ import annotations

import re

import pytest
import torch
import transformers

from merganser.engine.merge import merge, plan
from merganser.errors import CheckpointError, MergeError, RecipeError, UnsupportedError
from tests.engine.alignment.small_models import change, loads_fully, save
from tests.making import make_recipe, read_json, read_model

TOWER = "vision_tower."
"""The prefix in Gemma 3 of what its class writes for the tower; the language model is "language_model."."""


@pytest.fixture(scope="module")
def gemmas(tmp_path_factory):
    """Two vision-language models, and a language model of the same architecture."""
    root = tmp_path_factory.mktemp("gemmas")
    return save(root / "vlm", "gemma3"), save(root / "other", "gemma3"), save(root / "text", "gemma3_text")


@pytest.fixture(scope="module")
def t5s(tmp_path_factory):
    root = tmp_path_factory.mktemp("t5s")
    return save(root / "a", "t5"), save(root / "bb", "t5")


def entry(model, **parameters):
    return {"model": str(model), **({"parameters": parameters} if parameters else {})}


def piece(*sources, **parameters):
    listed = [{"model": str(model), "layer_range": list(layers)} for model, layers in sources]
    return {"sources": listed, **({"parameters": parameters} if parameters else {})}


def modular(modules, base=None, method="linear", **keys):
    return {"merge_method": method, "modules": modules, **({"base_model": str(base)} if base else {}), **keys}


def mean(first, second, weight=0.5):
    return (first * (1 - weight) + second * weight).to(first.dtype)


def text_name(name):
    """The name in a model of text of a tensor of the language model."""
    return name.replace("language_model.model.", "model.").replace("model.language_model.", "model.")


def test_a_language_model_is_merged_into_a_larger_model(gemmas, tmp_path):
    vlm, _, text = gemmas
    merge(make_recipe("linear", [vlm, text], parameters={"weight": 0.5}), tmp_path / "out")
    ours, theirs, found = read_model(vlm), read_model(text), read_model(tmp_path / "out")
    assert found.keys() == ours.keys()
    for name, tensor in found.items():
        other = theirs.get(text_name(name))
        if name.startswith("language_model."):
            torch.testing.assert_close(tensor, mean(ours[name], other), rtol=1e-6, atol=1e-7)
        else:
            assert torch.equal(tensor, ours[name]), name
    loads_fully(tmp_path / "out", transformers.AutoModelForImageTextToText)
    said = "\n".join(read_json(tmp_path / "out", "merge.json")["warnings"])
    assert f"vision_tower (48 tensors): copied from {vlm}" in said
    assert f"{text}: its language model is matched with that of {vlm}: model. is language_model.model. there" in said
    assert "differs" not in said
    census = read_json(tmp_path / "out", "merge.json")["census"]
    assert [(each["merged"], each["copied"]) for each in census] == [(93, 50), (93, 0)]


def test_a_larger_model_is_merged_into_a_language_model(gemmas, tmp_path):
    vlm, _, text = gemmas
    made = plan(make_recipe("linear", [text, vlm], parameters={"weight": 0.5}))
    assert {tensor.name for tensor in made.tensors} == set(read_model(text))
    left = [reasons.left_out for reasons in made.census.values()]
    assert [len(each) for each in left] == [0, 50]
    assert set(left[1].values()) == {"in a module that the output does not have"}
    assert any("left out, since" in each and "vision_tower (48 tensors)" in each for each in made.warnings)


def test_each_module_is_merged_in_its_own_way(gemmas, tmp_path):
    vlm, other, text = gemmas
    modules = {
        "text_decoder": {"models": [entry(vlm), entry(text)], "parameters": {"weight": 0.5}},
        "vision_tower": {"models": [entry(vlm, weight=0.25), entry(other, weight=0.75)]},
    }
    merge(modular(modules, vlm), tmp_path / "out")
    ours, theirs, words, found = (read_model(each) for each in (vlm, other, text, tmp_path / "out"))
    for name, tensor in found.items():
        if name.startswith(TOWER):
            expected = mean(ours[name], theirs[name], 0.75)
        elif name.startswith("language_model."):
            expected = mean(ours[name], words[text_name(name)])
        else:
            expected = ours[name]
        torch.testing.assert_close(tensor, expected, rtol=1e-6, atol=1e-7)


def test_layers_of_a_tower_are_stacked(gemmas, tmp_path):
    vlm, other, _ = gemmas
    slices = [piece((vlm, [0, 2])), piece((other, [1, 2]))]
    merge(modular({"visual": {"slices": slices}}, vlm, "passthrough"), tmp_path / "out")
    found, theirs = read_model(tmp_path / "out"), read_model(other)
    new = [name for name in found if name.startswith(TOWER) and "layers.2." in name]
    assert new
    assert all(torch.equal(found[name], theirs[name.replace("layers.2.", "layers.1.")]) for name in new)
    config = read_json(tmp_path / "out", "config.json")
    assert (config["vision_config"]["num_hidden_layers"], config["text_config"]["num_hidden_layers"]) == (3, 7)
    loads_fully(tmp_path / "out", transformers.AutoModelForImageTextToText)


@pytest.mark.parametrize(
    ("encoder", "decoder", "counts"),
    [([(0, 3), (1, 3)], None, (5, 3)), (None, [(0, 2), (2, 3), (2, 3)], (3, 4)), ([(0, 2)], [(0, 1)], (2, 1))],
)
def test_layers_of_an_encoder_and_a_decoder_are_stacked(encoder, decoder, counts, t5s, tmp_path):
    first, second = t5s
    modules = {
        half: {"slices": [piece(((first, second)[i % 2], layers)) for i, layers in enumerate(ranges)]}
        for half, ranges in (("encoder", encoder), ("decoder", decoder))
        if ranges
    }
    merge(modular(modules, first, "passthrough"), tmp_path / "out")
    config = read_json(tmp_path / "out", "config.json")
    assert (config["num_layers"], config["num_decoder_layers"]) == counts
    loads_fully(tmp_path / "out", transformers.AutoModelForSeq2SeqLM)


def test_what_is_left_out_has_a_reason(gemmas, t5s):
    vlm, other, text = gemmas
    made = plan(
        modular(
            {"text_decoder": {"models": [entry(vlm), entry(text)]}, "vision_tower": {"models": [entry(other)]}},
            vlm,
            parameters={"weight": 1},
        )
    )
    reasons = {str(reference): set(each.left_out.values()) for reference, each in made.census.items()}
    assert reasons[str(other)] == {
        "nothing of this model is merged into its text_decoder",
        "nothing of this model is merged into its multi_modal_projector",
    }
    assert reasons[str(vlm)] == {"nothing of this model is merged into its vision_tower"}
    first, second = t5s
    made = plan(
        modular({"encoder": {"slices": [piece((first, [0, 2])), piece((second, [1, 2]))]}}, first, "passthrough")
    )
    reasons = {str(reference): set(each.left_out.values()) for reference, each in made.census.items()}
    assert reasons[str(first)] == {
        "its layer is in no slice",
        "what lies outside the layers comes from the models of the first or last slice",
    }


def test_parameters_of_modules_and_filters(gemmas):
    vlm, _, text = gemmas
    modules = {
        "text_decoder": {"models": [entry(vlm), entry(text)], "parameters": {"weight": [{"filter": "mlp", "value": 3}]}}
    }
    made = plan(modular(modules, vlm, parameters={"weight": 0.5}))
    weights = {tensor.name: tensor.parameters["weight"] for tensor in made.tensors if len(tensor.models) == 2}
    assert all(value == ((3, 3) if "mlp" in name else (0.5, 0.5)) for name, value in weights.items())
    assert weights


REFUSED = [
    ({"text": {}}, RecipeError, r"modules\.text: a module has exactly one of models and slices"),
    ({"vision_towr": {"models": ["vlm"]}}, RecipeError, r"has no module 'vision_towr'\. Did you mean 'vision_tower'\? Its modules: "),
    ({"encoder": {"models": ["vlm"]}}, RecipeError, r"has no module 'encoder'\..* Its modules: text_decoder, multi_modal_projector, vision_tower"),
    ({"audio_tower": {"models": ["vlm"]}}, RecipeError, "has no module 'audio_tower'"),
    ({"visual": {"models": ["vlm"]}, "vision_tower": {"models": ["vlm"]}}, RecipeError, "this is the module vision_tower, which is already given at "),
    ({"vision_tower": {"models": ["vlm", "text"]}}, CheckpointError, "has no module vision_tower; it has text_decoder"),
    ({"multi_modal_projector": {"slices": [0, 1]}}, RecipeError, "has no numbered layers"),
    ({"vision_tower": {"slices": [0, 9]}}, RecipeError, "has 2 layers, so the end may be 2 at most"),
]  # fmt: skip


@pytest.mark.parametrize(("modules", "kind", "message"), REFUSED)
def test_bad_modules(modules, kind, message, gemmas):
    paths = dict(zip(("vlm", "other", "text"), gemmas, strict=True))

    def body(given):
        if "slices" in given:
            return {"slices": [piece((paths["vlm"], given["slices"]))]}
        return {"models": [entry(paths[name]) for name in given["models"]]} if given else {}

    with pytest.raises(kind, match=message):
        plan(modular({name: body(each) for name, each in modules.items()}, paths["vlm"], parameters={"weight": 1}))


def test_methods_for_whole_models_refuse_modules(gemmas):
    vlm, other, _ = gemmas
    modules = {"text_decoder": {"models": [entry(vlm), entry(other)]}}
    with pytest.raises(RecipeError, match="emr stores what restores each model, so it takes whole models"):
        plan(modular(modules, vlm, "emr"))
    with pytest.raises(RecipeError, match="regmean takes statistics from data, which are of whole models"):
        plan(modular(modules, vlm, "regmean"))


def test_a_language_model_of_another_shape_is_refused(gemmas, tmp_path):
    small = save(tmp_path / "small", "gemma3_text", num_hidden_layers=6)
    with pytest.raises(CheckpointError, match="do not hold the same tensors"):
        plan(make_recipe("linear", [gemmas[0], small], parameters={"weight": 1}))


def test_models_without_a_common_module_are_refused(gemmas, t5s):
    with pytest.raises(CheckpointError, match="the models have no module in common: "):
        plan(make_recipe("linear", [gemmas[0], t5s[0]], parameters={"weight": 1}))


def test_a_config_that_does_not_say_which_layers_are_the_towers(gemmas, tmp_path):
    vlm = save(tmp_path / "vlm", "gemma3")
    vision = read_json(vlm, "config.json")["vision_config"]
    change(vlm, vision_config={**vision, "num_hidden_layers": 5})
    modules = {"vision_tower": {"slices": [piece((vlm, [0, 1]))]}}
    with pytest.raises(UnsupportedError, match=re.escape("config.json: no sub-config is clearly that of vision_tower")):
        plan(modular(modules, vlm, "passthrough"))
    assert issubclass(UnsupportedError, MergeError)
