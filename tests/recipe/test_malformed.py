"""What each mistake in a recipe is told."""

from __future__ import annotations

import pytest

from merganser.errors import MergeError, NotFoundError, RecipeError
from merganser.recipe import load_recipe

MODELS = "models: [{model: a}, {model: b}]\n"
LINEAR = "merge_method: linear\n" + MODELS
KEYS = (
    "name, merge_method, models, slices, modules, base_model, parameters, dtype, out_dtype, tokenizer_source, "
    "tokenizer, chat_template, compat, unmatched, quantised, quantize, gguf, rank, space, random_seed, data, keep_statistics, check_statistics, align"
)


def _source(layer_range: str) -> str:
    return f"merge_method: passthrough\nslices:\n  - sources:\n      - model: a\n        layer_range: {layer_range}\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("\n", "<recipe>: the recipe is empty; it needs at least merge_method and models"),
        ("# nothing\n---\n", "<recipe>: the recipe is empty; it needs at least merge_method and models"),
        ("- a\n- b\n", "<recipe>:1: a recipe is a mapping with lines such as 'merge_method: linear', got a list"),
        (
            "word\nword\n",
            "<recipe>:1: a recipe is a mapping with lines such as 'merge_method: linear', got 'word word'",
        ),
        (MODELS, "<recipe>:1: 'merge_method' is missing; add it"),
        ("merge_method:\n" + MODELS, "<recipe>:1: 'merge_method' is missing; add it"),
        ("merge_method: [ties]\n" + MODELS, "<recipe>:1 merge_method: expected a text, got a list"),
        ("merge_method: 7\n" + MODELS, "<recipe>:1 merge_method: expected a text, got 7; put it in quotes"),
        (
            "merge_method: ' '\n" + MODELS,
            "<recipe>:1 merge_method: the text is empty; write a value, or leave the key out",
        ),
        (
            f"merge_method: {'x' * 5000}\n" + MODELS,
            "<recipe>:1 merge_method: a text of 5,000 characters; 1,000 are allowed",
        ),
        (
            LINEAR + "base_mode: a\n",
            f"<recipe>:3: unknown key 'base_mode'. Did you mean 'base_model'? Allowed: {KEYS}",
        ),
        (LINEAR + "lorem: a\n", f"<recipe>:3: unknown key 'lorem'. Allowed: {KEYS}"),
        (
            "merge_method: linear\n",
            "<recipe>:1: a recipe has exactly one of models, slices and modules, got none of them",
        ),
        (
            LINEAR + "slices: []\n",
            "<recipe>:1: a recipe has exactly one of models, slices and modules, got models and slices",
        ),
        (
            "merge_method: linear\nmodels: []\n",
            "<recipe>:2 models: the list is empty; write at least one entry, or leave the key out",
        ),
        (
            "merge_method: linear\nmodels: {model: a}\n",
            "<recipe>:2 models: expected a list (lines that start with '- '), got a mapping",
        ),
        (
            "merge_method: linear\nmodels:\n  - a\n",
            "<recipe>:3 models[0]: expected a mapping with the keys model, adapter, parameters, name, statistics, data, base_statistics, got 'a'",
        ),
        (
            "merge_method: linear\nmodels:\n  - model: a\n    parametres: {}\n",
            "<recipe>:4 models[0]: unknown key 'parametres'. Did you mean 'parameters'? Allowed: model, adapter, parameters, name, statistics, data, base_statistics",
        ),
        ("merge_method: linear\nmodels: [{parameters: {}}]\n", "<recipe>:2 models[0]: 'model' is missing; add it"),
        (
            "merge_method: linear\nmodels: [{model: a@b@c}]\n",
            "<recipe>:2 models[0].model: a model is written path[@revision][+lora[@revision]], got 'a@b@c'; where a path "
            "itself has '@' or '+', write {path: ..., revision: ...}",
        ),
        (
            "merge_method: linear\nmodels: [{model: {path: a, rev: b}}]\n",
            "<recipe>:2 models[0].model: unknown key 'rev'. Allowed: path, revision",
        ),
        (
            "merge_method: linear\nmodels: [{model: {model: a+b, lora: c}}]\n",
            "<recipe>:2 models[0].model: two adapters on one model, b and c; name one",
        ),
        (
            "merge_method: linear\nmodels: [{model: a+b, adapter: c}]\n",
            "<recipe>:2 models[0].adapter: two adapters on one model, b and c; name one",
        ),
        (
            "merge_method: linear\nmodels: [{model: a, adapter: b+c}]\n",
            "<recipe>:2 models[0].adapter: a model is written path[@revision][+lora[@revision]], got 'b+c'; where a path "
            "itself has '@' or '+', write {path: ..., revision: ...}",
        ),
        (
            LINEAR + "dtype: BF16\n",
            "<recipe>:3 dtype: 'BF16' is not known. Did you mean 'bfloat16'? Allowed: float32, float16, bfloat16, float64",
        ),
        (
            LINEAR + "out_dtype: int64\n",
            "<recipe>:3 out_dtype: 'int64' is not known. Allowed: float32, float16, bfloat16, float64",
        ),
        (
            LINEAR + "compat: mergkit\n",
            "<recipe>:3 compat: 'mergkit' is not known. Did you mean 'mergekit'? Allowed: mergekit",
        ),
        (
            LINEAR + "random_seed: true\n",
            "<recipe>:3 random_seed: expected a whole number of at least 0, got true",
        ),
        (
            LINEAR + "chat_template: chatmll\n",
            "<recipe>:3 chat_template: expected one of auto, alpaca, chatml, exaone, llama3, mistral or a Jinja template, "
            "got 'chatmll'. Did you mean 'chatml'?",
        ),
        (
            LINEAR + "tokenizer_source: a\ntokenizer: {source: a}\n",
            "<recipe>:4 tokenizer: give 'tokenizer' or 'tokenizer_source', not both",
        ),
        (
            _source("[4, 2]"),
            "<recipe>:5 slices[0].sources[0].layer_range: [4, 2] runs backwards. Did you mean [2, 4]?",
        ),
        (
            _source("[2, 2]"),
            "<recipe>:5 slices[0].sources[0].layer_range: [2, 2] holds no layer: the end is not included",
        ),
        (_source("[-1, 2]"), "<recipe>:5 slices[0].sources[0].layer_range: layers count from 0, got [-1, 2]"),
        *(
            (
                _source(bad),
                "<recipe>:5 slices[0].sources[0].layer_range: expected [first layer, layer after the last], two whole "
                "numbers",
            )
            for bad in ("[2]", "2", "[0, 1.5]", "[true, 2]", "[0, 2, 4]")
        ),
        (_source(""), "<recipe>:4 slices[0].sources[0]: 'layer_range' is missing; add it"),
        (
            _source("[0, 2]") + "      - {model: b, layer_range: [2, 5]}\n",
            "<recipe>:3 slices[0].sources: all sources of a slice must have as many layers, got [0, 2], [2, 5]",
        ),
        (
            _source("[0, 2]") + "    layer_range: [0, 2]\n",
            "<recipe>:6 slices[0]: unknown key 'layer_range'. Write it next to 'model' in the 'sources' of a slice. Allowed: sources, parameters, base_model, residual_weight",
        ),
        (LINEAR + "parameters: 3\n", "<recipe>:3 parameters: expected a mapping, got 3"),
        (
            LINEAR + "parameters:\n  weight:\n",
            "<recipe>:4 parameters: 'weight' has no value; write one, or leave it out",
        ),
        (
            LINEAR + "parameters: {weight: []}\n",
            "<recipe>:3 parameters.weight: the list is empty; write at least one entry, or leave the key out",
        ),
        (
            LINEAR + "parameters: {weight: [[1]]}\n",
            "<recipe>:3 parameters.weight[0]: expected a number, flag or text, got a list",
        ),
        (
            LINEAR + "parameters: {weight: [1, ~]}\n",
            "<recipe>:3 parameters.weight[1]: expected a number, flag or text, got nothing",
        ),
        (LINEAR + "parameters: {weight: {filter: x}}\n", "<recipe>:3 parameters.weight: 'value' is missing; add it"),
        (
            LINEAR + "parameters:\n  weight:\n    - filter: x\n      vaule: 1\n",
            "<recipe>:6 parameters.weight[0]: unknown key 'vaule'. Did you mean 'value'? Allowed: filter, value",
        ),
        (
            LINEAR + "parameters:\n  weight:\n    - {filter: x, value: 1}\n    - 2\n",
            "<recipe>:6 parameters.weight[1]: a list of {filter, value} holds nothing else, got 2",
        ),
        (
            LINEAR + "parameters: {weight: {value: {value: 1}}}\n",
            "<recipe>:3 parameters.weight.value: expected a number, flag or text, got a mapping",
        ),
        (
            LINEAR + f"parameters: {{weight: {'x' * 201}}}\n",
            "<recipe>:3 parameters.weight: a value of 201 characters; 200 are allowed",
        ),
        (
            f"{LINEAR}---\n{LINEAR}",
            "<recipe>: expected one recipe, got 2 documents; load_recipes reads them all",
        ),
    ],
)
def test_malformed(text: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(text)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ("{x: {source: aa}}", "tokenizer.tokens.x.source: 'aa' is not a model of this recipe. Did you mean 'a'? It has a, b"),
        ("{x: }", "tokenizer.tokens: 'x' has no rule, such as 'source: MODEL'"),
        ("{x: {force: true}}", "tokenizer.tokens.x: 'source' is missing; add it"),
        ("{x: {sorce: a}}", "tokenizer.tokens.x: unknown key 'sorce'. Did you mean 'source'? Allowed: source, force"),
        (
            "{x: {source: {kind: zeros}}}",
            "tokenizer.tokens.x.source.kind: 'zeros' is not known. Did you mean 'zero'? Allowed: zero, mean, model_token",
        ),
        ("{x: {source: {kind: zero, token: y}}}", "tokenizer.tokens.x.source.token: kind 'zero' takes no 'token'; 'model_token' does"),
        ("{x: {source: {kind: model_token, token: y}}}", "tokenizer.tokens.x.source: 'model' is missing: whose token is it?"),
        (
            "{x: {source: {kind: model_token, model: a}}}",
            "tokenizer.tokens.x.source: kind 'model_token' takes exactly one of 'token' and 'token_id'",
        ),
        ("{x: {source: {kind: model_token, model: a, token_id: -1}}}",
         "tokenizer.tokens.x.source.token_id: expected a whole number of at least 0, got -1"),
        ("{x: {source: a, force: 3}}", "tokenizer.tokens.x.force: expected true or false, got 3"),
        ("[x]", "tokenizer.tokens: expected a mapping, got a list"),
    ],
)  # fmt: skip
def test_rules_for_tokens(rules: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(f"{LINEAR}tokenizer: {{source: a, tokens: {rules}}}\n")
    assert str(caught.value) == f"<recipe>:3 {message}"


@pytest.mark.parametrize("multiple", ["0", "1.5", "many", "65537"])
def test_multiples_of_rows(multiple: str) -> None:
    with pytest.raises(RecipeError, match=r"^<recipe>:3 tokenizer.pad_to_multiple_of: "):
        load_recipe(f"{LINEAR}tokenizer: {{source: a, pad_to_multiple_of: {multiple}}}\n")


@pytest.mark.parametrize(
    ("source", "kind", "message"),
    [
        ("no.yaml", NotFoundError, "no.yaml: there is no such recipe file"),
        (
            "merge_method: linear",
            NotFoundError,
            "'merge_method: linear': there is no such recipe file; a YAML text needs a line break to be taken for one",
        ),
        ("a\0b", RecipeError, r"'a\x00b': the recipe cannot be read: embedded null byte"),
        ("a: \ud800\n", RecipeError, "<recipe>:1: not valid YAML: half a surrogate pair"),
        ({"merge_method": "linear", "models": [{"modl": "a"}]}, RecipeError, "<recipe> models[0]: unknown key 'modl'. "
         "Did you mean 'model'? Allowed: model, adapter, parameters, name, statistics, data, base_statistics"),
    ],
)  # fmt: skip
def test_bad_sources(source: str, kind: type[MergeError], message: str) -> None:
    with pytest.raises(kind) as caught:
        load_recipe(source)
    assert type(caught.value) is kind
    assert str(caught.value) == message
