"""What a recipe means for a method: inputs, precedence, filters, schedules, and sharing."""

from __future__ import annotations

import pytest

from merganser.errors import ParameterError
from merganser.method import MergeMethod
from merganser.recipe import ModelReference, layer_depth
from tests.recipe.toys import along, inputs, maybe_base, no_base, refusal, resolve, values, with_base

A, B, C = (ModelReference(name) for name in "abc")


class TestInputs:
    MODELS = "models: [{model: b}, {model: a}, {model: c}]\n"

    @pytest.mark.parametrize(
        ("method", "base", "expected_base", "models"),
        [
            (no_base, "", None, (B, A, C)),
            (no_base, "base_model: a\n", None, (B, A, C)),
            (no_base, "base_model: d\n", None, (B, A, C)),
            (with_base, "base_model: a\n", A, (B, C)),
            (with_base, "base_model: d\n", ModelReference("d"), (B, A, C)),
            (maybe_base, "base_model: a\n", A, (B, C)),
        ],
    )
    def test_base_and_models(
        self, method: MergeMethod, base: str, expected_base: ModelReference | None, models: tuple[ModelReference, ...]
    ) -> None:
        resolver = resolve(method, f"{self.MODELS}{base}parameters: {{weight: 1}}\n")
        assert inputs(resolver) == (expected_base, *models)

    def test_optional_base_left_out(self) -> None:
        assert inputs(resolve(maybe_base, "models: [{model: b}, {model: a}]\n")) == (None, B, A)

    def test_mergekit_merges_a_lone_base_where_the_method_has_none(self) -> None:
        resolver = resolve(no_base, f"{self.MODELS}base_model: d\ncompat: mergekit\nparameters: {{weight: [1, 2]}}\n")
        assert inputs(resolver) == (None, B, A, C, ModelReference("d"))
        assert values(resolver, "x", t=1.0) == {"weight": (2.0, 2.0, 2.0, 2.0)}
        listed = resolve(no_base, f"{self.MODELS}base_model: a\ncompat: mergekit\n")
        assert inputs(listed) == (None, B, A, C)

    def test_slices(self) -> None:
        resolver = resolve(
            along,
            """\
slices:
  - sources: [{model: a, layer_range: [0, 2]}, {model: b, layer_range: [0, 2]}]
  - sources: [{model: b, layer_range: [2, 5]}, {model: c, layer_range: [1, 4]}]
    base_model: c
  - sources: [{model: b, layer_range: [5, 6]}]
base_model: a
parameters: {t: 0.5}
""",
        )
        assert [inputs(resolver, i) for i in range(3)] == [(A, B), (C, B), (A, B)]
        ranges = [resolver.sources(i).base.layer_range for i in range(3)]  # type: ignore[union-attr]
        assert ranges == [(0, 2), (1, 4), (5, 6)]

    @pytest.mark.parametrize(
        ("method", "text", "message"),
        [
            (with_base, MODELS, "<recipe>:1 merge_method: with_base needs a base; name it in 'base_model'"),
            (
                along,
                MODELS + "base_model: a\n",
                "<recipe>:2 models: along takes exactly 1 model and a base, got 2 models and the base a",
            ),
            (
                maybe_base,
                MODELS,
                "<recipe>:2 models: maybe_base takes exactly 2 models and optionally a base, got 3 models",
            ),
            (
                with_base,
                "models: [{model: a}]\nbase_model: a\n",
                "<recipe>:2 models: with_base takes 1 or more models and a base, got 0 models and the base a",
            ),
            (
                no_base,
                "models:\n  - model: a\n  - model: {path: a}\n",
                "<recipe>:4 models[1]: a is listed twice, first at <recipe>:3 models[0]",
            ),
            (
                along,
                "slices:\n  - sources:\n      - {model: a, layer_range: [0, 2]}\nbase_model: a\n",
                "<recipe>:3 slices[0]: along takes exactly 1 model and a base, got 0 models and the base a",
            ),
            (
                with_base,
                "base_model: c\nslices:\n  - sources: [{model: a, layer_range: [0, 2]}, "
                "{model: b, layer_range: [1, 3]}]\n",
                "<recipe>:4 slices[0]: list the base c among the sources: the models have different layers, so its "
                "layer_range is not clear",
            ),
        ],
    )
    def test_refused(self, method: MergeMethod, text: str, message: str) -> None:
        assert refusal(method, text) == message


class TestPrecedence:
    RECIPE = """\
base_model: a
slices:
  - sources:
      - {model: a, layer_range: [0, 2]}
      - model: b
        layer_range: [0, 2]
        parameters:
          weight: 0.1
          density: {filter: mlp, value: 0.2}
      - {model: c, layer_range: [0, 2]}
    parameters:
      weight: 0.3
      density: [{filter: up, value: 0.4}]
      lambda: 0.5
  - sources:
      - {model: a, layer_range: [0, 2]}
      - {model: b, layer_range: [2, 4]}
parameters:
  weight: 0.6
  density: 0.7
  lambda: 0.8
"""

    @pytest.mark.parametrize(
        ("piece", "name", "weight", "density", "lambda_"),
        [
            (0, "attn", (0.1, 0.3), (0.7, 0.7), 0.5),
            (0, "mlp.down", (0.1, 0.3), (0.2, 0.7), 0.5),
            (0, "mlp.up", (0.1, 0.3), (0.2, 0.4), 0.5),
            (0, "up", (0.1, 0.3), (0.4, 0.4), 0.5),
            (1, "mlp.up", (0.6,), (0.7,), 0.8),
        ],
    )
    def test_source_then_slice_then_recipe_then_default(
        self, piece: int, name: str, weight: tuple[float, ...], density: tuple[float, ...], lambda_: float
    ) -> None:
        found = values(resolve(with_base, self.RECIPE), name, piece=piece)
        assert found == {
            "weight": weight,
            "density": density,
            "lambda": lambda_,
            "normalize": True,
            "rounds": 3,
            "rule": "strict",
        }

    def test_per_model_filters_see_input_names_and_shared_ones_the_output_name(self) -> None:
        text = """\
base_model: a
models: [{model: b}, {model: c}]
parameters:
  weight: [{filter: layers.4., value: 0.4}, {value: 0.1}]
  lambda: [{filter: layers.4., value: 40}, {filter: layers.5., value: 50}, {value: 10}]
"""
        found = resolve(with_base, text).parameters(0, "layers.5.x", ["layers.4.x", "layers.40.x"], 0.0)
        assert (found["weight"], found["lambda"]) == ((0.4, 0.1), 50.0)

    @pytest.mark.parametrize(("filter_", "hit"), [("Mlp", False), ("mlp", True), ("'*'", True), ("m*p", False)])
    def test_filters_are_parts_of_names(self, filter_: str, hit: bool) -> None:
        rules = f"[{{filter: {filter_}, value: 1}}, {{value: 2}}]"
        resolver = resolve(no_base, f"models: [{{model: a}}]\nparameters: {{weight: {rules}}}\n")
        assert values(resolver, "x.mlp.y") == {"weight": (1.0 if hit else 2.0,)}

    def test_first_match_wins(self) -> None:
        rules = "[{filter: a, value: 1}, {filter: ab, value: 2}, {value: 3}, {filter: c, value: 4}]"
        resolver = resolve(no_base, f"models: [{{model: a}}]\nparameters: {{weight: {rules}}}\n")
        assert [values(resolver, name)["weight"] for name in ("ab", "c", "x")] == [(1.0,), (3.0,), (3.0,)]

    def test_required_parameter_that_no_filter_gives(self) -> None:
        text = "models: [{model: b}]\nbase_model: a\nparameters:\n  weight:\n    - {filter: mlp, value: 1}\n"
        resolver = resolve(with_base, text)
        assert values(resolver, "mlp")["weight"] == (1.0,)
        with pytest.raises(ParameterError) as caught:
            values(resolver, "attn")
        assert str(caught.value) == (
            "<recipe>:6 parameters.weight[0].value: weight has no value for 'attn': no filter matches; add an entry "
            "without a filter"
        )

    def test_idle_filters_are_told(self) -> None:
        text = """\
models: [{model: a}]
parameters:
  weight:
    - {filter: mlp, value: 1}
    - {filter: mpl, value: 2}
    - value: 3
"""
        resolver = resolve(no_base, text)
        values(resolver, "mlp.up")
        assert resolver.idle_filters() == [
            "<recipe>:6 parameters.weight[1].value: no tensor takes this value: its name must contain 'mpl', and no "
            "earlier filter"
        ]
        values(resolver, "mpl.up")
        assert resolver.idle_filters() == []


class TestSchedules:
    """Against values worked out by hand: position s = t (len - 1), linear between neighbours."""

    @pytest.mark.parametrize(
        ("schedule", "t", "value"),
        [
            ("[0.2, 0.5, 0.8]", 0.0, 0.2),
            ("[0.2, 0.5, 0.8]", 1 / 3, 0.4),
            ("[0.2, 0.5, 0.8]", 0.5, 0.5),
            ("[0.2, 0.5, 0.8]", 0.75, 0.65),
            ("[0.2, 0.5, 0.8]", 1.0, 0.8),
            ("[0, 1]", 0.25, 0.25),
            ("[1, 0, 0, 0]", 1 / 6, 0.5),
            ("[0.3]", 0.4, 0.3),
            ("{value: [1, 3]}", 0.5, 2.0),
        ],
    )
    def test_numbers_are_interpolated(self, schedule: str, t: float, value: float) -> None:
        resolver = resolve(no_base, f"models: [{{model: a}}]\nparameters: {{weight: {schedule}}}\n")
        (found,) = values(resolver, "x", t=t)["weight"]
        assert found == pytest.approx(value, rel=1e-15)
        assert isinstance(found, float)

    @pytest.mark.parametrize(
        ("t", "normalize", "rounds", "rule"),
        [(0.0, True, 1, "strict"), (0.49, True, 1, "strict"), (0.5, False, 5, "loose"), (0.99, False, 5, "loose"),
         (1.0, True, 9, "strict")],
    )  # fmt: skip
    def test_others_are_picked(self, t: float, normalize: bool, rounds: int, rule: str) -> None:
        text = "[strict, loose, strict], rounds: [1, 5, 9], normalize: [true, 0, yes]"
        resolver = resolve(
            with_base, f"models: [{{model: a}}]\nbase_model: b\nparameters: {{weight: 1, rule: {text}}}\n"
        )
        found = values(resolver, "x", t=t)
        assert (found["normalize"], found["rounds"], found["rule"]) == (normalize, rounds, rule)
        assert isinstance(found["normalize"], bool)

    @pytest.mark.parametrize("count", [2, 3, 24, 28, 50, 99])
    def test_one_entry_per_layer_is_that_layers_entry(self, count: int) -> None:
        listed = ", ".join(str(1 + i) for i in range(count))
        text = f"models: [{{model: a}}]\nbase_model: b\nparameters: {{weight: [{listed}], rounds: [{listed}]}}\n"
        resolver = resolve(with_base, text)
        for layer in range(count):
            found = values(resolver, "x", t=layer_depth(layer, count))
            assert found["rounds"] == layer + 1
            assert found["weight"][0] == pytest.approx(layer + 1, rel=1e-12)

    def test_depth(self) -> None:
        assert [layer_depth(i, 3) for i in range(3)] == [0.0, 0.5, 1.0]
        assert layer_depth(0, 1) == 1.0


class TestSharing:
    def test_equal_parameters_are_one_object(self) -> None:
        text = "models: [{model: a}, {model: b}]\nparameters: {weight: [{filter: x, value: 1}, {value: 2}]}\n"
        resolver = resolve(no_base, text)
        first = resolver.parameters(0, "x.1", ["x.1", "x.1"], 0.0)
        assert first is resolver.parameters(0, "x.2", ["x.2", "x.2"], 0.5)
        assert first is not resolver.parameters(0, "y", ["y", "y"], 0.0)

    def test_constant_parameters_do_not_look_at_names(self) -> None:
        resolver = resolve(no_base, "models: [{model: a}]\n")
        assert resolver.parameters(0, "x", ["x"], 0.0) is resolver.parameters(0, "y", ["y"], 1.0)
