"""Checks of a recipe against its method: errors, warnings, and where mergekit would give other numbers."""

from __future__ import annotations

import pytest

from merganser.errors import ParameterError, RecipeError
from merganser.recipe import ModelReference, check_layer_ranges, check_recipe, load_recipe
from tests.recipe.toys import along, no_base, refusal, resolve, values, with_base

A, B = ModelReference("a"), ModelReference("b")


class TestChecks:
    HEAD = "base_model: a\nmodels:\n  - model: b\n"

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            (
                "parameters:\n  weight: 1\n  denisty: 0.5\n",
                "<recipe>:7 parameters: unknown parameter 'denisty' of with_base. Did you mean 'density'? with_base takes "
                "density, lambda, normalize, rounds, rule, weight",
            ),
            (
                "    parameters:\n      weight: 1\n      density: 7.5\n",
                "<recipe>:7 models[0].parameters: density must be a number between 0 and 1, got 7.5",
            ),
            (
                "parameters:\n  weight: 1\n  density:\n    - filter: x\n      value: [0.5, -1]\n    - value: 1\n",
                "<recipe>:9 parameters: density must be a number between 0 and 1, got -1",
            ),
            (
                "parameters: {weight: [1, heavy]}\n",
                "<recipe>:5 parameters: weight must be any finite number, got 'heavy'",
            ),
            (
                "parameters: {weight: -1.0e+308}\n",
                "<recipe>:5 parameters: weight must be at most 3.4e+38 in size, got -1e+308",
            ),
            ("parameters: {weight: yes}\n", "<recipe>:5 parameters: weight must be any finite number, got True"),
            (
                "parameters: {weight: 1, normalize: maybe}\n",
                "<recipe>:5 parameters: normalize must be true or false, got 'maybe'",
            ),
            (
                "parameters: {weight: 1, rounds: 1.5}\n",
                "<recipe>:5 parameters: rounds must be a whole number of at least 1, got 1.5",
            ),
            (
                "parameters: {weight: 1, rule: lose}\n",
                "<recipe>:5 parameters: rule must be one of strict, loose, got 'lose'. Did you mean 'loose'?",
            ),
            (
                "parameters: {normalize: true}\n",
                "<recipe>:4 models[0]: with_base needs weight for each model, and b has none; write it here or in the "
                "recipe's 'parameters': any finite number",
            ),
            ("parameters: {weight: 1, density: 0}\n", "<recipe>:3 models: all densities are 0"),
        ],
    )
    def test_parameters(self, text: str, message: str) -> None:
        assert refusal(with_base, self.HEAD + text, ParameterError) == message

    def test_values_that_do_not_go_together_for_one_tensor(self) -> None:
        rules = "[{filter: norm, value: 0}, {value: 1}]"
        resolver = resolve(with_base, f"{self.HEAD}parameters: {{weight: 1, density: {rules}}}\n")
        for _ in range(2):
            with pytest.raises(ParameterError) as caught:
                values(resolver, "norm.1")
            assert str(caught.value) == "<recipe>:3 models (norm.1): all densities are 0"

    def test_parameters_of_the_base_are_checked_too(self) -> None:
        text = "base_model: a\nmodels:\n  - model: a\n    parameters: {wieght: 1}\n  - model: b\n"
        assert refusal(with_base, text, ParameterError) == (
            "<recipe>:5 models[0].parameters: unknown parameter 'wieght' of with_base. Did you mean 'weight'? with_base "
            "takes density, lambda, normalize, rounds, rule, weight"
        )

    def test_missing_shared_parameter(self) -> None:
        assert refusal(along, self.HEAD, ParameterError) == (
            "<recipe>:3 models: along needs t; write it in the recipe's 'parameters': a number between 0 and 1"
        )
        assert refusal(along, self.HEAD + "    parameters: {t: 0.5}\n", ParameterError) == (
            "<recipe>:5 models[0].parameters: t is one value for all models of along; write it in the recipe's "
            "'parameters'"
        )

    def test_missing_parameter_of_a_slice(self) -> None:
        text = """\
base_model: a
slices:
  - sources: [{model: b, layer_range: [0, 1]}]
    parameters: {t: 0.5}
  - sources: [{model: b, layer_range: [1, 2]}]
"""
        assert refusal(along, text, ParameterError) == (
            "<recipe>:6 slices[1]: along needs t; write it in the recipe's 'parameters': a number between 0 and 1"
        )

    def test_unknown_method(self) -> None:
        recipe = load_recipe("models: [{model: a}]\nmerge_method: liner\n")
        with pytest.raises(RecipeError) as caught:
            check_recipe(recipe)
        assert str(caught.value).startswith(
            "<recipe>:2 merge_method: unknown merge method 'liner'. Did you mean 'linear'?"
        )


def test_warnings() -> None:
    text = """\
base_model: a
models:
  - model: a
    parameters: {weight: 1, int8_mask: true}
  - model: b
    parameters: {weight: 1, lambda: 2, rescale: 1}
parameters: {int8_mask: true, lambda: 1}
"""
    resolver = resolve(with_base, text)
    int8 = "int8_mask has no effect on with_base: it changes how mergekit stores masks, not the result"
    assert resolver.warnings == [
        "<recipe>:4 models[0]: parameters of the base have no effect; with_base takes it as it is",
        f"<recipe>:8 parameters: {int8}",
        f"<recipe>:5 models[0].parameters: {int8}",
        "<recipe>:7 models[1].parameters: lambda has no effect here: lambda is one value for all models of with_base",
        "<recipe>:7 models[1].parameters: rescale has no effect on with_base: nothing is dropped",
    ]
    assert values(resolver, "x")["lambda"] == 1.0


def test_warning_about_the_base_of_a_slice() -> None:
    text = "slices:\n  - sources: [{model: a, layer_range: [0, 1]}]\n    base_model: b\n"
    assert resolve(no_base, text).warnings == ["<recipe>:3 slices[0]: base_model has no effect on no_base"]


class TestDifferences:
    HEAD = "models: [{model: b}]\nbase_model: a\n"
    RULE = (
        "with_base: rule is 'strict' by default; mergekit computes with 'loose', and so does `compat: mergekit` "
        "(see `merganser methods with_base`)"
    )
    AFTER = (
        "tensors after the layers (final norm, head) take the last value of a layer schedule; mergekit gives them the "
        "first, and so does `compat: mergekit`"
    )

    @pytest.mark.parametrize(
        ("parameters", "lines"),
        [
            ("weight: 1", [RULE]),
            ("weight: 1, rule: strict", []),
            ("weight: 1, rule: loose", []),
            ("weight: [1, 2], rule: strict", [f"weight: {AFTER}"]),
            ("weight: [1, 2], lambda: [0, 1], rule: strict", [f"weight, lambda: {AFTER}"]),
            ("weight: [1, 2, 1], rule: strict", []),
            ("weight: [{filter: mlp, value: [1, 2]}, {value: 1}], rule: strict", []),
            ("weight: [{filter: lm_head, value: [1, 2]}, {value: 1}], rule: strict", [f"weight: {AFTER}"]),
            ("weight: [{filter: norm, value: 1}, {value: [1, 2]}], rule: strict", [f"weight: {AFTER}"]),
        ],
    )
    def test_lines(self, parameters: str, lines: list[str]) -> None:
        text = f"{self.HEAD}parameters: {{{parameters}}}\n"
        assert resolve(with_base, text).differences() == lines
        assert resolve(with_base, text + "compat: mergekit\n").differences() == []

    @pytest.mark.parametrize(
        ("parameters", "matters"),
        [
            ("rounds: 1", False),
            ("rounds: 1, density: 0.9", True),
            ("density: 1.0", True),
            ("density: [{filter: mlp, value: 0.5}, {value: 1}], rounds: 1", True),
            ("density: [{filter: other, value: 0.5}, {value: 1}], rounds: 1", False),
            ("density: [1, 0.5, 1], rounds: 1", True),
        ],
    )
    def test_a_parameter_that_cannot_matter_makes_no_difference(self, parameters: str, matters: bool) -> None:
        resolver = resolve(with_base, f"{self.HEAD}parameters: {{weight: 1, {parameters}}}\n")
        for t in (0.0, 0.5, 1.0):
            resolver.parameters(0, "layers.1.mlp", ["layers.1.mlp"], t)
        assert resolver.differences() == [self.RULE] * matters

    def test_schedule_that_a_model_overrides(self) -> None:
        text = (
            "models: [{model: b, parameters: {weight: 1}}]\nbase_model: a\nparameters: {weight: [1, 2], rule: loose}\n"
        )
        assert resolve(with_base, text).differences() == []

    def test_lone_base(self) -> None:
        assert resolve(no_base, self.HEAD).differences() == [
            "no_base: a is not among the models and only lends its config and tokenizer; mergekit merges it as a further "
            "model, and so does `compat: mergekit`"
        ]

    @pytest.mark.parametrize(("line", "rule"), [("", "strict"), ("compat: mergekit\n", "loose")])
    def test_defaults(self, line: str, rule: str) -> None:
        resolver = resolve(with_base, f"{self.HEAD}parameters: {{weight: 1}}\n{line}")
        assert values(resolver, "x")["rule"] == rule

    def test_what_is_written_wins_over_compat(self) -> None:
        resolver = resolve(with_base, f"{self.HEAD}parameters: {{weight: 1, rule: strict}}\ncompat: mergekit\n")
        assert values(resolver, "x")["rule"] == "strict"


def test_layer_ranges_must_exist() -> None:
    recipe = load_recipe(
        """\
merge_method: passthrough
slices:
  - sources: [{model: a, layer_range: [0, 4]}]
  - sources:
      - {model: b, layer_range: [2, 6]}
"""
    )
    check_layer_ranges(recipe, {A: 4, B: 6})
    with pytest.raises(RecipeError) as caught:
        check_layer_ranges(recipe, {A: 4, B: 5})
    assert str(caught.value) == (
        "<recipe>:5 slices[1].sources[0]: layer_range [2, 6] is too long: b has 5 layers, so the end may be 5 at most"
    )
