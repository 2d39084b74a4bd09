"""Models that agree in what matters: heads with other labels, prediction layers, what training left behind."""

from __future__ import annotations

import pytest
import torch
import transformers
from safetensors.torch import load_file

from merganser import merge, plan
from merganser.errors import CheckpointError, RecipeError
from merganser.recipe import load_recipe
from tests.engine.alignment.small_models import change, classifier, linear, loads_fully, save
from tests.making import assert_equal, make_recipe, read_model

WEIGHT = {"weight": 1.0}


def arithmetic(base, *models, **keys):
    return make_recipe("task_arithmetic", models, base, {"weight": 0.5}, **keys)


@pytest.fixture
def classifiers(tmp_path):
    return [classifier(tmp_path / f"m{labels}", labels, labels) for labels in (3, 4)]


def test_heads_with_other_labels_are_called_that(classifiers):
    message = (
        r"classifier\.\w+: heads differ: \[3.*\] in .*m3, \[4.*\] in .*m4\. They have other labels.*unmatched: skip"
    )
    with pytest.raises(CheckpointError, match=message):
        plan(linear(*classifiers))


def test_what_is_common_is_merged_and_the_base_keeps_its_head(tmp_path, classifiers):
    base, other = classifiers
    found = plan(arithmetic(base, other, unmatched="base"))
    assert any(w.endswith("taken from " + f"{base}: classifier.bias, classifier.weight") for w in found.warnings)
    out = merge(arithmetic(base, other, unmatched="base"), tmp_path / "out").out
    made, own, theirs = read_model(out), read_model(base), read_model(other)
    for name, tensor in made.items():
        expected = own[name] if "classifier" in name else own[name] + 0.5 * (theirs[name] - own[name])
        torch.testing.assert_close(tensor, expected, rtol=1e-6, atol=1e-7)
    loads_fully(out, transformers.AutoModelForSequenceClassification)


def test_what_is_common_is_merged_and_the_rest_is_left_out(tmp_path, classifiers):
    result = merge(linear(*classifiers, unmatched="skip"), tmp_path / "out")
    made, first, second = (read_model(folder) for folder in (result.out, *classifiers))
    assert set(made) == {name for name in first if not name.startswith("classifier.")}
    expected = {name: (first[name] + second[name]) / 2 for name in made}
    for name, tensor in made.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-7)
    transformers.AutoModel.from_pretrained(result.out)
    with pytest.raises(AssertionError, match=r"classifier\.weight"):
        loads_fully(result.out, transformers.AutoModelForSequenceClassification)


def test_parts_that_one_model_lacks(tmp_path):
    """A model for masked words has no pooler, one for classes no head over the vocabulary."""
    masked, classes = classifier(tmp_path / "masked", 2, 0, "MaskedLM"), classifier(tmp_path / "classes", 2, 1)
    with pytest.raises(CheckpointError, match=r"missing in .*these follow the layers: 'unmatched: skip' or"):
        plan(linear(masked, classes))
    common = {name for name in read_model(masked) if name in read_model(classes)}
    assert {tensor.name for tensor in plan(linear(masked, classes, unmatched="skip")).tensors} == common
    kept = plan(arithmetic(masked, classes, unmatched="base"))
    assert {tensor.name for tensor in kept.tensors} == set(read_model(masked))
    assert {tensor.method.name for tensor in kept.tensors if tensor.name not in common} == {"passthrough"}


def test_prediction_layers_that_a_fine_tune_lost(tmp_path):
    base, tuned = save(tmp_path / "base", "qwen2"), save(tmp_path / "tunes", "qwen2")
    extra = {"mtp.fc.weight": torch.ones(32, 64), "mtp.layers.0.input_layernorm.weight": torch.ones(32)}
    change(base, load_file(base / "model.safetensors") | extra)
    with pytest.raises(CheckpointError, match=r"2 missing in .*tunes: mtp\.fc\.weight.*unmatched"):
        plan(arithmetic(base, tuned))
    made = read_model(merge(arithmetic(base, tuned, unmatched="base"), tmp_path / "out").out)
    assert_equal({name: made[name] for name in extra}, extra)
    assert not any(t.name.startswith("mtp.") for t in plan(arithmetic(base, tuned, unmatched="skip")).tensors)


@pytest.mark.parametrize("choice", ["base", "skip"])
@pytest.mark.parametrize(
    ("settings", "name"),
    [({"intermediate_size": 96}, r"mlp\.\w+\.weight"), ({"vocab_size": 100}, "model.embed_tokens.weight")],
)
def test_layers_and_embeddings_are_never_left_out(tmp_path, settings, name, choice):
    base, other = save(tmp_path / "base", "llama"), save(tmp_path / "other", "llama", **settings)
    with pytest.raises(CheckpointError, match=rf"{name}: .*'unmatched: {choice}' is only for tensors after the layers"):
        plan(arithmetic(base, other, unmatched=choice))


def test_the_norm_behind_the_layers_is_no_head(tmp_path):
    base, other = save(tmp_path / "base", "llama"), save(tmp_path / "other", "llama")
    own = load_file(other / "model.safetensors")
    change(other, {name: tensor for name, tensor in own.items() if name != "model.norm.weight"})
    with pytest.raises(CheckpointError, match=r"1 missing in .*other: model\.norm\.weight") as raised:
        plan(arithmetic(base, other))
    assert "unmatched" not in str(raised.value)
    with pytest.raises(
        CheckpointError, match=r"model\.norm\.weight: \[32\] in .*base, missing in .*other; 'unmatched: skip'"
    ):
        plan(arithmetic(base, other, unmatched="skip"))


def test_vocabularies_that_differ_are_still_called_that(tmp_path):
    models = [save(tmp_path / f"m{size}", "llama", vocab_size=size) for size in (96, 100)]
    with pytest.raises(CheckpointError, match="vocabularies differ"):
        plan(linear(*models))


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (
            "models: [{model: a}]\nunmatched: base",
            r"unmatched: 'base' takes parts from the base, and the recipe has no base_",
        ),
        (
            "slices: [{sources: [{model: a, layer_range: [0, 1]}]}]\nunmatched: skip",
            "unmatched: 'skip' is for recipes of mod",
        ),
        ("models: [{model: a}]\nunmatched: drop", r"unmatched: expected one of refuse, base, skip|unmatched: .*'drop'"),
    ],
)
def test_what_the_recipe_may_say(recipe, message):
    with pytest.raises(RecipeError, match=message):
        load_recipe(f"merge_method: linear\n{recipe}\n")


def test_methods_that_give_models_back_need_all_of_them(classifiers):
    base, other = classifiers
    with pytest.raises(
        RecipeError, match="emr stores what restores each model, so all models must hold the same tensors"
    ):
        plan(make_recipe("emr", [other], base, unmatched="skip"))


LEFTOVERS = {
    "LoRA factors": {"model.layers.0.self_attn.q_proj.lora_A.default.weight": torch.ones(4, 32)},
    "base weights wrapped by an adapter": {"model.layers.0.self_attn.q_proj.base_layer.weight": torch.ones(32, 32)},
    "copies trained by an adapter": {"lm_head.modules_to_save.default.weight": torch.ones(96, 32)},
    "a value head": {"v_head.summary.weight": torch.ones(1, 32), "v_head.summary.bias": torch.ones(1)},
    "a head that LlamaForCausalLM does not have": {"score.weight": torch.ones(1, 32)},
    "factors of an adapter": {"model.layers.0.mlp.up_proj.ia3_l.default": torch.ones(1, 32)},
    "weights and masks of pruning": {"model.layers.0.mlp.up_proj.weight_mask": torch.ones(64, 32)},
    "flattened parameters of FSDP": {"model._flat_param": torch.ones(64)},
    "moving averages": {"model_ema.layers.0.weight": torch.ones(2)},
    "the state of an optimizer": {"optimizer.state.0.exp_avg": torch.ones(2)},
}


@pytest.mark.parametrize("what", LEFTOVERS)
def test_leftovers_that_every_input_has_are_refused_by_name(tmp_path, what):
    models = [save(tmp_path / name, "llama") for name in ("m", "mm")]
    for model in models:
        change(model, load_file(model / "model.safetensors") | LEFTOVERS[what])
    name = next(iter(LEFTOVERS[what]))
    with pytest.raises(CheckpointError, match=rf"holds tensors that no model class loads: {what}.*: .*{name}"):
        plan(linear(*models))
    found = plan(linear(*models, unmatched="skip"))
    assert [tensor.name for tensor in found.tensors if tensor.name in LEFTOVERS[what]] == []
    assert sum("left out, since no model class loads them" in warning for warning in found.warnings) == 2
    loads_fully(merge(linear(*models, unmatched="skip"), tmp_path / "out").out)


def test_wrappers_of_training_frameworks_are_stripped_and_said(tmp_path):
    models = [save(tmp_path / name, "llama") for name in ("m", "mm")]
    plain = read_model(merge(linear(*models), tmp_path / "plain").out)
    own = load_file(models[1] / "model.safetensors")
    change(models[1], {f"module._orig_mod.{name}": tensor for name, tensor in own.items()})
    found = plan(linear(*models))
    assert (
        f"{models[1]}: _orig_mod., module.: prefixes of a training framework, removed from the names of tensors"
        in found.warnings
    )
    out = merge(linear(*models), tmp_path / "out").out
    assert_equal(read_model(out), plain)
    loads_fully(out)


def test_copies_of_a_shared_table_are_accepted_from_any_model(tmp_path):
    """Older files of T5 repeat the table for each of its two stacks."""
    models = [save(tmp_path / name, "t5") for name in ("m", "mm")]
    plain = read_model(merge(linear(*models), tmp_path / "plain").out)
    own = load_file(models[1] / "model.safetensors")
    copies = {f"{side}.embed_tokens.weight": own["shared.weight"].clone() for side in ("encoder", "decoder")}
    change(models[1], own | copies)
    found = plan(linear(*models))
    assert any("copies of shared.weight, which some models hold and the output needs once" in w for w in found.warnings)
    assert_equal(read_model(merge(linear(*models), tmp_path / "out").out), plain)
    turned = merge(linear(*reversed(models)), tmp_path / "turned").out
    assert torch.equal(read_model(turned)["shared.weight"], plain["shared.weight"])
    transformers.AutoModelForSeq2SeqLM.from_pretrained(turned)
