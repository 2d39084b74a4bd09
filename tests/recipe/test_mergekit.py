"""What mergekit reads in other ways, or ignores without a word: read the same, or answered by where it belongs."""

from __future__ import annotations

from pathlib import Path

import pytest

from merganser.errors import ParameterError, RecipeError, UnsupportedError
from merganser.recipe import ModelReference, check_recipe, load_recipe, load_recipes

LINEAR = "merge_method: linear\nmodels:\n  - model: a\n    parameters: {weight: 1}\n"
TIES = (
    "merge_method: ties\nbase_model: a\nmodels:\n  - model: b\n    parameters: {weight: 1}\n"
    "parameters: {density: 0.5}\n"
)


def first(text: str, name: str = "weight", tensor: str = "x") -> object:
    """Return a parameter of the first model."""
    value = check_recipe(load_recipe(text)).parameters(0, tensor, [tensor], 0.0)[name]
    return value[0] if isinstance(value, tuple) else value


@pytest.mark.parametrize(
    ("written", "read"),
    [('"0.5"', 0.5), ("'1e-4'", 1e-4), ('"3"', 3.0), ('["0.1", 1]', 0.1), ('{value: "0.25"}', 0.25)],
)
def test_quoted_numbers_are_numbers(written: str, read: float) -> None:
    assert first(f"merge_method: linear\nmodels: [{{model: a, parameters: {{weight: {written}}}}}]\n") == read


def test_quoted_flags_seeds_and_layers() -> None:
    assert first(LINEAR + 'parameters: {normalize: "false"}\n', "normalize") is False
    assert load_recipe(LINEAR + 'random_seed: "7"\n').random_seed == 7
    text = 'merge_method: passthrough\nslices: [{sources: [{model: a, layer_range: ["1", 3.0]}]}]\n'
    assert load_recipe(text).slices[0].sources[0].layer_range == (1, 3)


@pytest.mark.parametrize("written", ['"much"', '".inf"', f'"{"9" * 150}"', '"1 2"', '"0x10"', '""'])
def test_other_quoted_texts_are_no_numbers(written: str) -> None:
    with pytest.raises(ParameterError, match="weight must be any finite number"):
        first(f"merge_method: linear\nmodels: [{{model: a, parameters: {{weight: {written}}}}}]\n")


def test_a_choice_stays_a_text() -> None:
    with pytest.raises(ParameterError, match="trim_over must be one of"):
        check_recipe(load_recipe(TIES.replace("density: 0.5", 'trim_over: "1"')))


MODULE = """
merge_method: linear
modules:
  default:
    models:
      - model: a
    parameters:
      weight: [{filter: mlp, value: 2}]
parameters: {weight: 3, normalize: false}
"""


def test_the_only_module_of_a_model_is_the_model() -> None:
    recipe = load_recipe(MODULE)
    assert [source.model.path for source in recipe.models] == ["a"]
    assert str(recipe.place_of("models")) == "<recipe>:5 modules.default.models"
    assert (first(MODULE, tensor="mlp"), first(MODULE, tensor="attn")) == (2, 3)
    assert first(MODULE, "normalize") is False


def test_the_parameters_of_a_module_win() -> None:
    assert first(MODULE.replace("[{filter: mlp, value: 2}]", "2")) == 2


def test_a_module_may_have_slices() -> None:
    text = "merge_method: passthrough\nmodules: {default: {slices: [{sources: [{model: a, layer_range: [0, 1]}]}]}}\n"
    assert load_recipe(text).slices[0].sources[0].layer_range == (0, 1)


MODULES = """
merge_method: linear
modules:
  text_decoder:
    models: [{model: a}, {model: b}]
    parameters: {weight: 2}
  vision_tower:
    slices:
      - sources: [{model: a, layer_range: [0, 2]}]
        parameters: {weight: [{filter: mlp, value: 3}]}
      - sources: [{model: c, layer_range: [0, 1]}]
    parameters: {weight: 4}
parameters: {weight: 1, normalize: false}
"""


def test_modules_are_slices_of_their_own() -> None:
    recipe = load_recipe(MODULES)
    assert [(each.name, list(each.slices), each.whole) for each in recipe.modules] == [
        ("text_decoder", [0], True),
        ("vision_tower", [1, 2], False),
    ]
    assert [str(reference) for reference in recipe.references()] == ["a", "b", "c"]
    resolver = check_recipe(recipe)
    found = [
        resolver.parameters(index, name, [name] * count, 0.0)["weight"]
        for index, name, count in ((0, "mlp", 2), (1, "mlp", 1), (1, "attn", 1), (2, "mlp", 1))
    ]
    assert found == [(2, 2), (3,), (4,), (4,)]


def test_a_lone_base_is_a_further_model_of_each_module_of_whole_models() -> None:
    resolver = check_recipe(load_recipe(MODULES + "base_model: d\ncompat: mergekit\n"))
    assert [len(resolver.sources(index).models) for index in range(3)] == [3, 1, 1]


@pytest.mark.parametrize(
    ("module", "kind", "message"),
    [
        ("{}", RecipeError, "<recipe>:2 modules: names no module"),
        ("{encoder: }", RecipeError, "<recipe>:2 modules: 'encoder' has no value; write its models, or leave it out"),
        ("{encoder: []}", RecipeError, "<recipe>:2 modules.encoder: expected a mapping"),
        ("{encoder: {modles: []}}", RecipeError, "<recipe>:2 modules.encoder: unknown key 'modles'"),
        ("{encoder: {parameters: {}}}", RecipeError, "modules.encoder: a module has exactly one of models and slices"),
        ("{default: {models: [{model: a}]}, x: {}}", RecipeError, "'default' is the name of the only module"),
        ("{default: {}}", RecipeError, "<recipe>:2 modules.default: a module has exactly one of models and slices"),
        ("{default: {models: [{model: a}], slices: []}}", RecipeError, "exactly one of models and slices"),
        (
            "{default: {models: []}}",
            RecipeError,
            "<recipe>:2 modules.default.models: the list is empty; write at least one entry, or leave the key out",
        ),
        ("[a]", RecipeError, "<recipe>:2 modules: expected a mapping"),
    ],
)
def test_other_modules(module: str, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind) as caught:
        load_recipe(f"merge_method: linear\nmodules: {module}\n")
    assert type(caught.value) is kind
    assert message in str(caught.value)


MISPLACED = [
    (LINEAR.replace("    parameters:", "    revision: main\n    parameters:"), "revision", "in the model: {path: ..., "),
    (LINEAR + "base_model: {model: a, revision: b}\n", "revision", "in the model: {path: ..., revision: ...}"),
    (LINEAR.replace("{weight: 1}", "{weight: 1}\n    weight: 1"), "weight", "a parameter of linear: write it below"),
    (LINEAR.replace("{weight: 1}", "{weight: 1}\n    dtype: float16"), "dtype", "at the top of the recipe"),
    (LINEAR.replace("{weight: 1}", "{weight: 1}\n    layer_range: [0, 1]"), "layer_range", "next to 'model' in the 'sources'"),
    (LINEAR + "normalize: true\n", "normalize", "It is a parameter of linear: write it below 'parameters'"),
    (TIES + "rescale: true\n", "rescale", "It is a parameter of ties: write it below 'parameters'"),
    (LINEAR + "filter: mlp\n", "filter", "in the value of a parameter"),
    (LINEAR + "description: mine\n", "description", ""),
    (LINEAR + "Dtype: bfloat16\n", "Dtype", "Did you mean 'dtype'?"),
    (LINEAR + "tokenizer: {source: a, tokenizer_source: a}\n", "tokenizer_source", "at the top of the recipe"),
    (LINEAR + "parameters: {normalize: {value: true, comment: x}}\n", "comment", ""),
]  # fmt: skip


@pytest.mark.parametrize(("text", "key", "hint"), MISPLACED)
def test_misplaced_keys_are_told_where_they_belong(text: str, key: str, hint: str) -> None:
    with pytest.raises(RecipeError) as caught:
        check_recipe(load_recipe(text))
    assert f": unknown key '{key}'." in str(caught.value)
    assert hint in str(caught.value)


@pytest.mark.parametrize(("text", "key", "hint"), MISPLACED)
def test_what_mergekit_ignores_is_a_warning_for_it(text: str, key: str, hint: str) -> None:
    plain = check_recipe(load_recipe(text + "compat: mergekit\n"))
    (warning,) = plain.warnings
    assert warning.startswith("<recipe>:")
    assert f": '{key}' is ignored, as by mergekit" in warning
    assert hint in warning


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        (
            "dtype: bfloat16",
            "'dtype' is not a parameter of ties but a key of the recipe; write it at the top, not indented",
        ),
        ("base_model: c", "'base_model' is not a parameter of ties but a key of the recipe"),
        ("lamda: 0.2", "unknown parameter 'lamda' of ties. Did you mean 'lambda'?"),
        ("select_topk: 0.5", "unknown parameter 'select_topk' of ties. ties takes density"),
    ],
)
def test_unknown_parameters(parameters: str, message: str) -> None:
    text = TIES.replace("density: 0.5", parameters)
    with pytest.raises(ParameterError) as caught:
        check_recipe(load_recipe(text))
    assert message in str(caught.value)
    (warning,) = check_recipe(load_recipe(text + "compat: mergekit\n")).warnings
    assert message in warning
    assert warning.endswith("; it is ignored, as by mergekit")


def test_other_mistakes_stay_errors_with_compat() -> None:
    for text in (LINEAR + "dtype: bf16\n", LINEAR + "parameters: {normalize: 3}\n", TIES.replace("0.5", "5")):
        with pytest.raises(RecipeError):
            check_recipe(load_recipe(text + "compat: mergekit\n"))


@pytest.mark.parametrize("name", ["my+model", "v1@final", "a+b@c"])
def test_a_path_that_exists_is_not_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    for written in (name, f"./{name}", str(tmp_path / name), f"{{model: {name}}}"):
        (source,) = load_recipe(f"merge_method: linear\nmodels: [{{model: {written}}}]\n").models
        assert source.model.revision is None
        assert source.model.lora is None
        assert source.model.path.endswith(name)


def test_what_does_not_exist_is_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (source,) = load_recipe("merge_method: linear\nmodels: [{model: a@b}]\n").models
    assert source.model == ModelReference("a", "b")
    assert load_recipe(f"merge_method: linear\nmodels: [{{model: {'x' * 500}@b}}]\n").models[0].model.revision == "b"


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("model: a+b", ModelReference("a", None, "b")),
        ("model: a@r+b@s", ModelReference("a", "r", "b", "s")),
        ("model: {model: a, lora: b}", ModelReference("a", None, "b")),
        ("model: {model: {path: a}, lora: {path: b, revision: s}}", ModelReference("a", None, "b", "s")),
        ("model: a@r, adapter: b@s", ModelReference("a", "r", "b", "s")),
        ("model: a, adapter: {path: b+c}", ModelReference("a", None, "b+c")),
    ],
)
def test_adapters(written: str, expected: ModelReference) -> None:
    (source,) = load_recipe(f"merge_method: linear\nmodels: [{{{written}}}]\n").models
    assert source.model == expected
    piece = f"merge_method: linear\nslices: [{{sources: [{{{written}, layer_range: [0, 1]}}]}}]\n"
    assert load_recipe(piece).slices[0].sources[0].model == expected


def test_a_stage_may_be_an_adapter() -> None:
    text = f"name: last\nmerge_method: linear\nmodels: [{{model: a+first}}]\n---\nname: first\n{LINEAR}"
    assert [recipe.name for recipe in load_recipes(text)] == ["first", "last"]


def test_the_name_of_a_stage_is_not_split() -> None:
    first, second = load_recipes(f"name: v1+v2@x\n{LINEAR}---\nmerge_method: linear\nmodels: [{{model: v1+v2@x}}]\n")
    assert second.references() == (ModelReference("v1+v2@x"),)
    assert first.name == "v1+v2@x"


@pytest.mark.parametrize(
    ("written", "message"),
    [
        (r'"C:\models\base"', "found unknown escape character: in double quotes a backslash starts an escape; use single "),
        (r'"C:\base"', r"'C:\x08ase' holds the character '\x08', which is not part of a path; in double quotes a backslash"),
        (r'{path: "C:\base"}', "in double quotes a backslash starts an escape"),
        (r'"C:\0"', "this text holds a NUL character"),
    ],
)  # fmt: skip
def test_backslashes_in_double_quotes(written: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_recipe(f"merge_method: linear\nmodels:\n  - model: {written}\n")
    assert message in str(caught.value)
    assert str(caught.value).startswith("<recipe>:3")


@pytest.mark.parametrize("written", [r"C:\models\base", r"'C:\models\base'", r'"C:\\models\\base"'])
def test_paths_of_windows(written: str) -> None:
    (source,) = load_recipe(f"merge_method: linear\nmodels:\n  - model: {written}\n").models
    assert source.model.path == r"C:\models\base"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base_model: a\ngate_mode: hidden\nexperts:\n  - source_model: b\n    positive_prompts: [x]\n",
         "<recipe>:2 gate_mode: this is a recipe of mergekit-moe, which builds a mixture of experts"),
        ("experts: []\n", "<recipe>:1 experts: this is a recipe of mergekit-moe"),
        ("genome: {models: [a]}\n", "<recipe>:1 genome: this is a recipe of mergekit-evolve"),
        ("layer_slices: []\n", "<recipe>:1 layer_slices: this is a recipe of bakllama"),
    ],
)  # fmt: skip
def test_recipes_of_other_commands_are_named(text: str, message: str) -> None:
    with pytest.raises(UnsupportedError) as caught:
        load_recipe(text)
    assert str(caught.value).startswith(message)
