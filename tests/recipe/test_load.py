"""Structure of recipes: what loads, and what each mistake is told."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from merganser.errors import RecipeError
from merganser.recipe import ModelReference, Place, load_recipe, load_recipes

A, B = ModelReference("a"), ModelReference("b")
MODELS = "models: [{model: a}, {model: b}]\n"
LINEAR = "merge_method: linear\n" + MODELS


def test_models() -> None:
    text = """\
merge_method: ties
base_model: base@v1
models:
  - model: a
    parameters:  # an empty mapping, as people leave it
  - model: {model: {path: ./b+c, revision: main}, override_architecture: LlamaForCausalLM}
    parameters:
      weight: 0.5
parameters:
  density: [0.1, 1e-1]
dtype: bfloat16
out_dtype: float32
name: My merge
random_seed: 7
compat: mergekit
"""
    recipe = load_recipe(text)
    assert recipe.merge_method == "ties"
    assert recipe.base_model == ModelReference("base", "v1")
    assert [source.model for source in recipe.models] == [A, ModelReference("./b+c", "main")]
    assert recipe.models[0].parameters == {}
    assert recipe.models[1].parameters["weight"].at("any", 0.3) == 0.5
    assert recipe.models[1].layer_range is None
    assert recipe.parameters["density"].rules[0].values == (0.1, 0.1)
    assert (recipe.dtype, recipe.out_dtype, recipe.name, recipe.random_seed, recipe.compat) == (
        "bfloat16",
        "float32",
        "My merge",
        7,
        "mergekit",
    )
    assert recipe.slices == ()
    assert recipe.text == text
    assert recipe.place_of("dtype") == Place("<recipe>", 11, "dtype")
    assert recipe.place_of("chat_template") == recipe.place == Place("<recipe>", 1, "")
    assert recipe.warnings == (
        "<recipe>:6 models[1].model: override_architecture has no effect: tensors are matched by name",
    )


def test_slices() -> None:
    recipe = load_recipe(
        """\
merge_method: passthrough
slices:
  - sources:
      - model: b
        layer_range: [0, 2]
    residual_weight: 0.5
  - sources:
      - {model: a, layer_range: [1, 4], parameters: {scale: 0.5}}
    base_model: c
    parameters: {scale: 1}
"""
    )
    assert recipe.models == ()
    assert [piece.sources[0].layer_range for piece in recipe.slices] == [(0, 2), (1, 4)]
    assert str(recipe.slices[1].sources[0].place) == "<recipe>:8 slices[1].sources[0]"
    assert recipe.slices[1].base_model == ModelReference("c")
    assert recipe.warnings == ("<recipe>:6 slices[0].residual_weight: residual_weight has no effect, as in mergekit",)
    assert recipe.references() == (B, A, ModelReference("c"))
    assert recipe.donor == B


def test_the_base_is_the_donor_and_comes_first() -> None:
    recipe = load_recipe(LINEAR + "base_model: b\n")
    assert recipe.references() == (B, A)
    assert recipe.donor == B
    assert load_recipe(LINEAR).donor == A


def test_same_from_file_text_and_mapping(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(LINEAR)
    mapping = {"merge_method": "linear", "models": [{"model": "a"}, {"model": Path("b")}]}
    for source in (file, str(file), LINEAR, mapping):
        recipe = load_recipe(source)  # type: ignore[arg-type]
        assert recipe.merge_method == "linear"
        assert recipe.references() == (A, B)
        assert load_recipe(recipe.text).references() == (A, B)
    assert str(load_recipe(file).models[0].place) == f"{file}:2 models[0]"
    assert str(load_recipe(mapping).models[0].place) == "<recipe> models[0]"


def test_loading_does_not_import_torch() -> None:
    code = (
        f"import sys; from merganser.recipe import load_recipe; load_recipe({LINEAR!r}); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


@pytest.mark.parametrize(
    ("written", "reference", "canonical"),
    [
        ("org/name", ModelReference("org/name"), "org/name"),
        ("org/name@v1", ModelReference("org/name", "v1"), "org/name@v1"),
        ("{path: org/name}", ModelReference("org/name"), "org/name"),
        ("{path: a@b}", ModelReference("a@b"), "a@b"),
        ("{model: org/name@v1}", ModelReference("org/name", "v1"), "org/name@v1"),
        ("{model: {path: org/name, revision: v1}, lora: }", ModelReference("org/name", "v1"), "org/name@v1"),
        (r"C:\models\a", ModelReference(r"C:\models\a"), r"C:\models\a"),
    ],
)
def test_references(written: str, reference: ModelReference, canonical: str) -> None:
    recipe = load_recipe(f"merge_method: linear\nmodels:\n  - model: {written}\n")
    assert recipe.models[0].model == reference
    assert str(recipe.models[0].model) == canonical


def test_canonical_text_of_adapters() -> None:
    assert str(ModelReference("a", "r", "b", "s")) == "a@r+b@s"
    assert str(ModelReference("a", lora="b")) == "a+b"


@pytest.mark.parametrize(
    ("line", "donor"),
    [
        ("tokenizer_source: base", A),
        ("tokenizer_source: b", B),
        ("tokenizer: {source: b}", B),
        ("tokenizer: {source: {model: {path: b}}, tokens: {}}", B),
        ("tokenizer_source: union", A),
        ("tokenizer: {source: union}", A),
        ("tokenizer: {}", A),
        ("name: x", None),
    ],
)
def test_tokenizer_donor(line: str, donor: ModelReference | None) -> None:
    assert load_recipe(f"{LINEAR}{line}\n").tokenizer_donor == donor


@pytest.mark.parametrize(
    ("line", "place"),
    [
        ("tokenizer_source: union", "tokenizer_source"),
        ("tokenizer: {source: union, tokens: {}}", "tokenizer.source"),
        ("tokenizer: {}", "tokenizer"),
        ("tokenizer_source: base", None),
        ("name: x", None),
    ],
)
def test_the_union_of_tokenizers(line: str, place: str | None) -> None:
    found = load_recipe(f"{LINEAR}{line}\n").tokenizer_union
    assert (found.key if found else None) == place


def test_chat_templates() -> None:
    jinja = "{{ messages[0]['content'] }}"
    assert load_recipe({"merge_method": "x", "models": [{"model": "a"}], "chat_template": jinja}).chat_template == jinja
    assert load_recipe(LINEAR + "chat_template: auto\n").chat_template == "auto"


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("chatml", "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"),
        (
            "llama3",
            "<s><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        ("mistral", "<s>[INST] Hi [/INST]"),
        ("exaone", "[|system|][|endofturn|]\n[|user|]Hi\n[|assistant|]"),
        (
            "alpaca",
            "Below is an instruction that describes a task. Write a response that appropriately completes the request."
            "\n\n### Instruction:\nHi\n\n### Response:\n",
        ),
    ],
)
def test_named_chat_templates(name: str, text: str) -> None:
    template = load_recipe(LINEAR + f"chat_template: {name}\n").chat_template
    rendered = pytest.importorskip("jinja2").Template(template)
    values = {"add_generation_prompt": True, "bos_token": "<s>", "eos_token": "</s>"}
    assert rendered.render(messages=[{"role": "user", "content": "Hi"}], **values) == text
    talk = [
        {"role": "system", "content": "Be"},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yo"},
    ]
    said = rendered.render(messages=talk, **values)
    assert 0 <= said.index("Be") < said.index("Hi") < said.index("Yo")


def _stage(name: str | None, *models: str) -> str:
    listed = ", ".join(f"{{model: {model}}}" for model in models)
    title = f"name: {name}\n" if name else ""
    return f"---\n{title}merge_method: linear\nmodels: [{listed}]\n"


def test_stages_come_after_what_they_use() -> None:
    text = _stage(None, "last", "first") + _stage("last", "first", "x") + _stage("other", "y") + _stage("first", "x")
    recipes = load_recipes(text)
    assert [recipe.name for recipe in recipes] == ["other", "first", "last", None]
    assert recipes[1].place.line == 13
    assert recipes[1].text == _stage("first", "x")


def test_one_document_is_one_stage() -> None:
    assert [recipe.merge_method for recipe in load_recipes(LINEAR)] == ["linear"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            _stage(None, "x") + _stage(None, "y"),
            "<recipe>:5: only one recipe of several may go without 'name'; name this one",
        ),
        (_stage("a", "x") + _stage("a", "y"), "<recipe>:6: the name 'a' is taken by the recipe at <recipe>:2"),
        (_stage("../a", "x") + _stage("b", "y"), "<recipe>:2 name: '../a' must be usable as the name of a folder"),
        (_stage("/a", "x") + _stage("b", "y"), "<recipe>:2 name: '/a' must be usable as the name of a folder"),
        (
            _stage("a", "b") + _stage("b", "a") + _stage("c", "x"),
            "<recipe>:2: these recipes need each other's results in a circle: 'a', 'b'",
        ),
        (
            _stage("a", "a") + _stage("c", "x"),
            "<recipe>:2: these recipes need each other's results in a circle: 'a'",
        ),
    ],
)
def test_malformed_stages(text: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipes(text)
    assert str(caught.value) == message
