"""The contract suite fails methods that break it: one toy for every law."""

import re
from typing import Literal

import pytest
import torch
from torch import Tensor

from merganser.method import Fraction, Location, PerModel, Weight, default, merge_method, statistic
from merganser.testing import breakable, check_citation, contract, probe
from merganser.testing import laws as testing

DOC = """Do something.

        merged = something

    Use when:
        Never.

    Args:
        weight: Factor of each model.
        t: Position.
        keep: Keep it.
        rule: The rule.

    Differs from the paper:
        There is none.
    """


def toy(function, doc=DOC, **options):
    """Make a method of a function; what its docstring says of other parameters is left out."""
    names = set(function.__kwdefaults or {}) if hasattr(function, "__kwdefaults") else set()
    names |= set(function.__code__.co_varnames[: function.__code__.co_argcount + function.__code__.co_kwonlyargcount])
    lines = [
        line
        for line in doc.splitlines()
        if not re.match(r" {8}(weight|t|keep|rule):", line) or line.split(":")[0].strip() in names
    ]
    text = "\n".join(lines)
    function.__doc__ = text if re.search(r"^ {8}(weight|t|keep|rule):", text, re.M) else text.replace("    Args:\n", "")
    return merge_method(family="toys", cite="-", **options)(function)


def average(models: list[Tensor]) -> Tensor:
    return sum(models) / len(models)


def shared(base: Tensor, models: list[Tensor], *, t: Fraction) -> Tensor:
    return base + t * (models[0] - base)


def test_sound_toys_pass():
    for method in (toy(average), toy(shared, models=(1, 1))):
        for law in contract(method):
            law(method)


def fails(law, method, message="."):
    assert law in contract(method)
    with pytest.raises(AssertionError, match=message):
        law(method)


@pytest.mark.parametrize(
    ("doc", "message"),
    [
        (DOC.replace("Do something.", "Do something"), "begin with a sentence"),
        (DOC.replace("        merged = something", ""), "formula"),
        (DOC.replace("Use when:\n        Never.", ""), "'Use when'"),
        (DOC.replace("        There is none.", ""), "'Differs from the paper'"),
    ],
)
def test_docstrings(doc, message):
    fails(testing.describes_itself, toy(average, doc), message)


def test_reasons_and_compatible_values():
    fails(testing.describes_itself, toy(average, breaks={"order": " "}), "reason")
    method = toy(shared, models=(1, 1), mergekit={"t": 2.0})
    assert testing.describes_itself in contract(method)
    with pytest.raises(ValueError, match="t must be a number between 0 and 1, got 2"):
        testing.describes_itself(method)


def test_defaults_out_of_range():
    def method(models: list[Tensor], *, t: Fraction = default(2.0)) -> Tensor:
        return models[0] * t

    method = toy(method)
    assert testing.suggests_values in contract(method)
    with pytest.raises(ValueError, match="default: t must be a number between 0 and 1, got 2"):
        testing.suggests_values(method)


def test_parameters_that_are_not_checked():
    class Lax(type(toy(shared).parameters["t"])):
        def check(self, value, where):
            return value

    method = toy(shared)
    spec = method.parameters["t"]
    method.parameters["t"] = Lax(**{name: getattr(spec, name) for name in spec.__slots__})
    fails(testing.names_bad_parameters, method, "accepts {'t': None}")


def test_a_parameter_that_matters_after_all():
    def method(models: list[Tensor], *, keep: bool = False, t: Fraction = default(0.5)) -> Tensor:
        return models[0] * t

    def keeps(keep: bool) -> bool:
        return keep

    fails(testing.ignores_what_does_not_matter, toy(method, when={"t": keeps}), "said to make no difference")
    method = toy(method, when={"u": keeps})
    with pytest.raises(ValueError, match="unknown parameter 'u'"):
        testing.describes_itself(method)


def test_division_by_a_norm_of_zero():
    def measure(base: Tensor, models: list[Tensor]) -> Tensor:
        return torch.stack([(model - base).double().square().sum() for model in models])

    def solve(measured: Tensor) -> Tensor:
        return measured / measured.sum()

    def method(base: Tensor, models: list[Tensor], share: Tensor) -> Tensor:
        return base + sum((model - base) * share[i] for i, model in enumerate(models))

    fails(testing.stays_finite, toy(method, statistics={"share": statistic(measure, solve)}), "not finite on zeros")


def test_writing_to_inputs():
    def method(base: Tensor, models: list[Tensor]) -> Tensor:
        return models[0].add_(base)

    fails(testing.leaves_inputs_alone, toy(method), "writes to its inputs")


def test_rounding_on_the_way():
    def method(models: list[Tensor]) -> Tensor:
        narrow = models[0].dtype if models[0].dtype == torch.float64 else torch.bfloat16
        return sum(model.to(narrow) for model in models) / len(models)

    fails(testing.keeps_precision, toy(method), "float32 is off by")


def test_position_in_the_block():
    def method(models: list[Tensor]) -> Tensor:
        return models[0] + torch.arange(models[0].shape[-1]) * 0.01

    fails(testing.ignores_blocks, toy(method), "blocks of 64")


def test_hidden_state():
    calls = []

    def method(models: list[Tensor]) -> Tensor:
        calls.append(None)
        return models[0] + len(calls)

    fails(testing.ignores_seed, toy(method), "depends on the seed")


def test_draws_that_are_not_used():
    def method(models: list[Tensor], rng) -> Tensor:
        return average(models)

    fails(testing.follows_seed, toy(method), "neither seed nor tensor name")


def test_draws_of_another_source():
    def method(models: list[Tensor], rng) -> Tensor:
        return models[0] * torch.rand(models[0].shape)

    fails(testing.follows_seed, toy(method), "one seed, two results")


def test_a_location_that_is_not_used():
    def method(models: list[Tensor], depth: Tensor) -> Tensor:
        return sum(models) / len(models)

    def depth(location: Location) -> float:
        return float(location.layer or 0)

    fails(testing.goes_by_location, toy(method, located={"depth": depth}), "they change nothing")


def test_a_location_that_gives_no_number():
    def method(models: list[Tensor], depth: Tensor) -> Tensor:
        return sum(models) / depth

    def depth(location: Location) -> float:
        return float(location.n_layers - 32) if location.position == "layer" else 1.0

    fails(testing.goes_by_location, toy(method, located={"depth": depth}), "not finite at some location")


def test_shrinking_identical_models():
    def method(models: list[Tensor], *, weight: PerModel[Weight]) -> Tensor:
        return 0.99 * sum(model * weight[i] for i, model in enumerate(models))

    fails(breakable.returns_identical_models, toy(method))


def test_rounding_the_base():
    def method(base: Tensor, models: list[Tensor], *, t: Fraction) -> Tensor:
        return base * (1 - t) + models[0] * t

    fails(breakable.returns_base, toy(method), "zero task vectors")


def test_order():
    def method(models: list[Tensor]) -> Tensor:
        return 0.6 * models[0] + 0.4 * models[-1]

    fails(breakable.ignores_order, toy(method))
    assert breakable.ignores_order not in contract(toy(method, breaks={"order": "the first counts more"}))


def test_parameters_that_do_not_follow_their_models():
    def method(models: list[Tensor], *, weight: PerModel[Weight]) -> Tensor:
        return sum(model * weight[0] for model in models)

    fails(breakable.ignores_order, toy(method))


def test_no_op():
    def method(base: Tensor, models: list[Tensor]) -> Tensor:
        return base + 1e-6 * models[0]

    fails(breakable.differs_from_inputs, toy(method), "one of the inputs")


def test_needless_excuses():
    fails(testing.breaks_what_it_says, toy(average, breaks={"order": "who knows"}), "ignores_order holds")


def test_choices_and_flags_are_all_tried():
    def by_flag(models: list[Tensor], *, keep: bool = False) -> Tensor:
        return models[0] * torch.rand(()) if keep else average(models)

    def by_choice(models: list[Tensor], *, rule: Literal["mean", "draw"] = "mean") -> Tensor:
        return models[0] * torch.rand(()) if rule == "draw" else average(models)

    fails(testing.ignores_seed, toy(by_flag), "depends on the seed")
    fails(testing.ignores_seed, toy(by_choice), "depends on the seed")


def test_missing_citations(tmp_path):
    bibliography = tmp_path / "some.bib"
    bibliography.write_text("@article{known2020,\n  title = {T}\n}\n")
    check_citation(merge_method(family="toys", cite="known2020")(average), bibliography)
    with pytest.raises(AssertionError, match=r"'known2021' is not in some\.bib"):
        check_citation(merge_method(family="toys", cite="known2021")(average), bibliography)


def test_probe_runs_what_it_reports():
    def method(models: list[Tensor]) -> Tensor:
        return models[0] * 2

    found = probe(toy(method))
    assert not found["identical_models_return_the_model"]
    assert found["zero_task_vectors_return_the_base"] is None
    assert found["order_matters"]
    assert found["result_differs_from_inputs"]


def test_statistics_that_nothing_reads():
    norm = statistic(lambda models: models.square().sum(), solve=lambda total: total.sqrt())

    def method(models: list[Tensor], norm: Tensor) -> Tensor:
        return models[0]

    fails(testing.reads_its_statistics, toy(method, statistics={"norm": norm}), "nothing reads the statistic 'norm'")

    def reading(models: list[Tensor], norm: Tensor) -> Tensor:
        return models[0] / norm

    testing.reads_its_statistics(toy(reading, statistics={"norm": norm}))


def test_borders_of_parameters():
    def method(models: list[Tensor], *, t: Fraction = default(0.5)) -> Tensor:
        return models[0] * t.log() / t.log()

    fails(testing.stays_finite_at_borders, toy(method), r"not finite at t = 0\.0, a border of its range")
    testing.stays_finite(toy(method))
