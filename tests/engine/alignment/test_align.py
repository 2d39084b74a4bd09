"""Which tensors the output has, when the inputs do not hold quite the same ones."""

from __future__ import annotations

import re

import pytest
import torch
from transformers import AutoModelForCausalLM

from merganser.engine.merge import merge, plan
from merganser.errors import CheckpointError
from tests.making import assert_equal, llama, llama_config, make_recipe, read_json, read_model, write_model

HEAD, EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def write(root, *models):
    """Write models of (tensors, tied)."""
    return [write_model(root / f"m{i}", own, llama_config(tied=tied)) for i, (own, tied) in enumerate(models)]


def tied(seed, *, copy=False):
    own = llama(seed, head=False)
    if copy:
        own[HEAD] = own[EMBEDDING].clone()
    return own, True


def untied(seed):
    return llama(seed), False


def load(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokens = torch.arange(6).unsqueeze(0)
    made = model.generate(tokens, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert made.shape == (1, 9)
    return model


def check_loads(out):
    """transformers finds every tensor it wants, and nothing else."""
    own = read_model(out)
    state = load(out).state_dict()
    if read_json(out, "config.json")["tie_word_embeddings"]:
        own[HEAD] = own[EMBEDDING]
    assert_equal(state, own)


def mean(tensors):
    """The unweighted mean in the engine's order of operations."""
    total = tensors[0] * torch.tensor(1.0)
    for tensor in tensors[1:]:
        total = total + tensor
    return total / len(tensors)


@pytest.mark.parametrize(
    ("models", "is_tied", "has_head"),
    [
        ([tied(0), tied(1)], True, False),
        ([untied(0), untied(1)], False, True),
        ([tied(0), untied(1)], False, True),
        ([untied(0), tied(1)], False, True),
        ([tied(0), tied(1, copy=True)], True, False),
        ([tied(0, copy=True), tied(1)], True, False),
        ([tied(0, copy=True), tied(1, copy=True)], True, True),
        ([tied(0, copy=True), untied(1)], False, True),
        ([tied(0), untied(1), tied(2, copy=True)], False, True),
    ],
)
def test_ties(tmp_path, models, is_tied, has_head):
    paths = write(tmp_path, *models)
    out = merge(make_recipe("linear", paths, parameters={"weight": 1.0}), tmp_path / "out").out
    found = read_model(out)
    assert read_json(out, "config.json")["tie_word_embeddings"] is is_tied
    assert (HEAD in found) is has_head
    assert torch.equal(found[EMBEDDING], mean([own[EMBEDDING] for own, _ in models]))
    if has_head:
        assert torch.equal(found[HEAD], mean([own.get(HEAD, own[EMBEDDING]) for own, _ in models]))
    check_loads(out)


@pytest.mark.parametrize(
    "parameters",
    [
        {"weight": [{"filter": "lm_head", "value": 0.9}, {"value": 0.2}], "normalize": False},
        {"weight": [{"filter": "embed", "value": 0.9}, {"value": 0.2}], "normalize": False},
        {"weight": [0.1, 0.9], "normalize": False},
    ],
)
@pytest.mark.parametrize("per_model", [False, True])
def test_a_tied_matrix_under_two_names_stays_one(tmp_path, parameters, per_model):
    paths = write(tmp_path, tied(0, copy=True), tied(1, copy=True))
    if per_model:
        weight = parameters.pop("weight")
        recipe = make_recipe("linear", [(path, {"weight": weight}) for path in paths], parameters=parameters)
    else:
        recipe = make_recipe("linear", paths, parameters=parameters)
    found = read_model(merge(recipe, tmp_path / "out").out)
    assert torch.equal(found[HEAD], found[EMBEDDING])


@pytest.mark.parametrize("per_model", [False, True])
def test_parameters_of_a_head_that_only_some_models_have_go_by_its_name(tmp_path, per_model):
    models = tied(0), untied(1)
    paths = write(tmp_path, *models)
    weight = [{"filter": "lm_head", "value": 0.5}, {"value": 1.0}]
    if per_model:
        recipe = make_recipe("linear", [(p, {"weight": weight}) for p in paths], parameters={"normalize": False})
    else:
        recipe = make_recipe("linear", paths, parameters={"weight": weight, "normalize": False})
    found = read_model(merge(recipe, tmp_path / "out").out)
    first, second = models[0][0], models[1][0]
    assert torch.equal(found[HEAD], first[EMBEDDING] * 0.5 + second[HEAD] * 0.5)
    assert torch.equal(found[EMBEDDING], first[EMBEDDING] + second[EMBEDDING])


def with_extra(seed, **extra):
    return {**llama(seed), **{name.replace("__", "."): tensor for name, tensor in extra.items()}}, False


def test_equal_buffers_are_copied_and_different_ones_refused(tmp_path):
    same = torch.arange(5)
    paths = write(tmp_path / "a", with_extra(0, m__ids=same), with_extra(1, m__ids=same.clone()))
    found = read_model(merge(make_recipe("linear", paths, parameters={"weight": 1}), tmp_path / "out").out)
    assert torch.equal(found["m.ids"], same)
    paths = write(tmp_path / "b", with_extra(0, m__ids=same), with_extra(1, m__ids=same.flip(0)))
    file = re.escape(str(paths[1] / "model.safetensors"))
    with pytest.raises(CheckpointError, match=rf"m\.ids: this int64 buffer differs between .* and {file}"):
        merge(make_recipe("linear", paths, parameters={"weight": 1}), tmp_path / "no")


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int16, torch.uint32, torch.uint64])
def test_buffers_of_every_kind(tmp_path, dtype):
    values = torch.tensor([0, 1, 1]).to(dtype)
    paths = write(tmp_path, with_extra(0, m__ids=values), with_extra(1, m__ids=values.clone()))
    found = read_model(merge(make_recipe("linear", paths, parameters={"weight": 1}), tmp_path / "out").out)
    assert found["m.ids"].dtype == dtype
    assert found["m.ids"].tolist() == values.tolist()


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (torch.arange(5), torch.arange(5.0), "holds int64, .* holds float32; numbers and integer buffers cannot"),
        (torch.arange(5), torch.arange(5).int(), "holds int64, .* holds int32; buffers of whole numbers are copied"),
        (torch.arange(5), torch.arange(6), r"shapes differ: \[5\] in .*, \[6\] in"),
    ],
)
def test_buffers_of_different_types(tmp_path, first, second, message):
    paths = write(tmp_path, with_extra(0, m__ids=first), with_extra(1, m__ids=second))
    with pytest.raises(CheckpointError, match=r"m\.ids: .*" + message):
        plan(make_recipe("linear", paths, parameters={"weight": 1}))


@pytest.mark.parametrize("holder", [0, 1])
@pytest.mark.parametrize(
    "name",
    [
        "model.rotary_emb.inv_freq",
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "transformer.h.1.attn.bias",
        "transformer.h.1.attn.masked_bias",
        "embeddings.position_ids",
    ],
)
def test_buffers_that_model_code_computes_are_left_out_where_one_model_lacks_them(tmp_path, holder, name):
    models = [untied(0), untied(1)]
    models[holder][0][name] = torch.arange(8)
    paths = write(tmp_path, *models)
    found = plan(make_recipe("linear", paths, parameters={"weight": 1}))
    assert name not in {tensor.name for tensor in found.tensors}
    assert any(warning.startswith(f"{name}: not the same in every model") for warning in found.warnings)


@pytest.mark.parametrize("other", [torch.ones(4, 4, dtype=torch.uint8), torch.ones(8, 8, dtype=torch.bool)])
def test_causal_masks_of_different_types_and_lengths_are_left_out(tmp_path, other):
    name = "transformer.h.0.attn.bias"
    models = [untied(0), untied(1)]
    models[0][0][name], models[1][0][name] = torch.ones(4, 4, dtype=torch.bool), other
    found = plan(make_recipe("linear", write(tmp_path, *models), parameters={"weight": 1}))
    assert name not in {tensor.name for tensor in found.tensors}


def test_equal_recomputed_buffers_are_kept(tmp_path):
    extra = {"model__rotary_emb__inv_freq": torch.arange(4.0)}
    paths = write(tmp_path, with_extra(0, **extra), with_extra(1, **extra))
    found = read_model(merge(make_recipe("linear", paths, parameters={"weight": 1}), tmp_path / "out").out)
    assert found["model.rotary_emb.inv_freq"].tolist() == [0, 1, 2, 3]


def test_missing_and_extra_tensors_are_counted_and_named(tmp_path):
    own, _ = untied(1)
    for i in range(2):
        del own[f"model.layers.{i}.mlp.up_proj.weight"]
        own[f"model.layers.{i}.mlp.up_proj.bias"] = torch.zeros(24)
    paths = write(tmp_path, untied(0), (own, False))
    expected = (
        f"{paths[1]} and {paths[0]} do not hold the same tensors; "
        f"2 missing in {paths[1]}: model.layers.0.mlp.up_proj.weight, model.layers.1.mlp.up_proj.weight; "
        f"2 only in {paths[1]}: model.layers.0.mlp.up_proj.bias, model.layers.1.mlp.up_proj.bias; "
        "only models of one architecture can be merged"
    )
    with pytest.raises(CheckpointError, match=re.escape(expected)):
        plan(make_recipe("linear", paths, parameters={"weight": 1}))


@pytest.mark.parametrize("holder", [1, 2])
def test_a_head_that_the_donor_lacks_is_missing_there(tmp_path, holder):
    config = llama_config()
    paths = [write_model(tmp_path / f"m{i}", llama(i, head=i == holder), config) for i in range(3)]
    expected = f"{paths[0]} and {paths[holder]} do not hold the same tensors; 1 missing in {paths[0]}: lm_head.weight; "
    with pytest.raises(CheckpointError, match=re.escape(expected)):
        plan(make_recipe("linear", paths, parameters={"weight": 1}))


def test_a_long_list_of_missing_tensors_is_cut(tmp_path):
    paths = [write_model(tmp_path / f"m{n}", llama(n, n), llama_config(n)) for n in (2, 4)]
    with pytest.raises(CheckpointError, match=r"18 only in .*: (\S+, ){3}\S+ and 14 more; only models"):
        plan(make_recipe("linear", paths, parameters={"weight": 1}))


def test_an_untied_model_without_its_head(tmp_path):
    paths = write(tmp_path, untied(0), (llama(1, head=False), False))
    with pytest.raises(CheckpointError, match=rf"1 missing in {re.escape(str(paths[1]))}: lm_head\.weight"):
        plan(make_recipe("linear", paths, parameters={"weight": 1}))


def test_vocabularies_of_different_sizes(tmp_path):
    paths = [write_model(tmp_path / f"m{n}", llama(n, vocab=n), llama_config(vocab=n)) for n in (32, 34)]
    expected = (
        f"model.embed_tokens.weight: vocabularies differ: [32, 16] in {paths[0]}, [34, 16] in {paths[1]}. "
        "Models are merged row by row, so both must have the same tokenizer"
    )
    with pytest.raises(CheckpointError, match=re.escape(expected) + "|lm_head.weight: vocabularies differ"):
        plan(make_recipe("linear", paths, parameters={"weight": 1}))


def test_widths_that_differ(tmp_path):
    paths = [write_model(tmp_path / f"m{n}", llama(n, hidden=n), llama_config(hidden=n)) for n in (16, 32)]
    with pytest.raises(CheckpointError, match=r"shapes differ: .* in .*m16, .* in .*m32\. Only models of one"):
        plan(make_recipe("linear", paths, parameters={"weight": 1}))


@pytest.mark.parametrize("how", ["config", "dtype"])
def test_quantised_models_are_refused_by_name(tmp_path, how):
    config = llama_config()
    own = llama(1)
    if how == "config":
        config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    else:
        own["model.layers.0.mlp.up_proj.weight"] = own["model.layers.0.mlp.up_proj.weight"].to(torch.float8_e4m3fn)
    paths = [write_model(tmp_path / "good", llama(0), llama_config()), write_model(tmp_path / "bad", own, config)]
    with pytest.raises(CheckpointError, match=rf"{re.escape(str(paths[1]))}: its weights are quantised \("):
        plan(make_recipe("linear", paths, parameters={"weight": 1}))


def test_a_base_that_only_lends_its_files(tmp_path):
    """A method without a base does not read it, and its tensors need not fit."""
    paths = write(tmp_path, untied(0), untied(1), untied(2))
    (paths[0] / "tokenizer.json").write_text("{}")
    recipe = make_recipe("linear", paths[1:], paths[0], {"weight": 1.0})
    result = merge(recipe, tmp_path / "out")
    assert (result.out / "tokenizer.json").exists()
    assert result.record["donor"] == str(paths[0])
    expected = {name: mean([llama(1)[name], llama(2)[name]]) for name in llama(0)}
    assert_equal(read_model(result.out), expected)


def test_the_tokenizer_of_another_model(tmp_path):
    paths = write(tmp_path, untied(0), untied(1))
    (paths[0] / "tokenizer.json").write_text('{"version": "first"}')
    (paths[0] / "vocab.json").write_text("first")
    (paths[0] / "generation_config.json").write_text("{}")
    (paths[1] / "tokenizer.json").write_text('{"version": "second"}')
    recipe = make_recipe(
        "linear",
        paths,
        parameters={"weight": 1},
        tokenizer_source=str(paths[1]),
        chat_template="{% for m in messages %}{{ m.content }}{% endfor %}",
    )
    out = merge(recipe, tmp_path / "out").out
    assert (out / "tokenizer.json").read_text() == '{"version": "second"}'
    assert not (out / "vocab.json").exists()
    assert (out / "generation_config.json").read_text() == "{}"
    assert (out / "chat_template.jinja").read_text() == "{% for m in messages %}{{ m.content }}{% endfor %}"


def test_models_without_a_config(tmp_path):
    paths = [write_model(tmp_path / f"m{i}", {"w": torch.full((3,), float(i))}) for i in range(2)]
    result = merge(make_recipe("linear", paths, parameters={"weight": 1}), tmp_path / "out")
    assert not (result.out / "config.json").exists()
    assert any("no config.json" in warning for warning in result.record["warnings"])
    assert read_model(result.out)["w"].tolist() == [0.5, 0.5, 0.5]
