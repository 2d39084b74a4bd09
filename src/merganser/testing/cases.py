"""Parameter values and inputs for the contract suite, ordinary and degenerate ones."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..engine.kernels.merge_tensor import merge_tensor
from ..errors import ParameterError
from ..method import Location, MergeMethod, Number, Parameter
from ..method.method import fill

Case = tuple[bool, dict[str, Any]]
# the base (or None) and the models
Inputs = tuple[Tensor | None, list[Tensor]]

SHAPE = (12, 37)
SHAPES: list[tuple[int, ...]] = [(), (1,), (37,), (12, 37), (1, 37), (12, 1), (3, 4, 5), (3, 1, 5)]
LOCATIONS = [
    Location("before"),
    *(Location("layer", layer, 32) for layer in (0, 7, 16, 24, 31)),
    Location("after"),
    Location("before", role="embedding"),
    Location("after", role="head"),
]
EMPTY: list[tuple[int, ...]] = [(0,), (0, 5), (5, 0)]

_WITH_BASE = {"required": [True], "optional": [True, False], "unused": [False]}


def count_models(method: MergeMethod) -> int:
    """Return how many models the laws merge: three if the method takes that many."""
    return max(method.min_models, min(3, method.max_models or 3))


def suggest(parameter: Parameter, share: float = 0.5) -> Any:
    """Return a value to try for a parameter, from its search interval or its range.

    Args:
        parameter: The parameter.
        share: Position in the interval, 0 to 1.
    """
    if parameter.kind == "flag":
        return not parameter.default
    if parameter.kind == "choice":
        return parameter.choices[-1]
    allowed = parameter.range or Number()
    low, high = allowed.search or (allowed.low, allowed.high)
    if math.isfinite(low) and math.isfinite(high):
        value = low + share * (high - low)
    elif not parameter.required:
        value = 1.5 * parameter.default
    else:
        value = low + 2 * share if math.isfinite(low) else share
    if parameter.kind == "integer":
        return max(math.ceil(value), 1)
    return value


def cases(method: MergeMethod) -> Iterator[Case]:
    """Yield parameters to try, with or without a base.

    They are: the defaults; other numbers, all together and one by one; each value of a flag or choice. Combinations
    that the method's validation refuses are skipped. If the base is optional, each case is yielded with and without it.
    """
    n = count_models(method)
    required = {name: each(p, n) for name, p in method.parameters.items() if p.required}
    numbers = {name: each(p, n) for name, p in method.parameters.items() if p.kind in ("number", "integer")}
    tried: list[dict[str, Any]] = [{}, numbers, *({name: value} for name, value in numbers.items())]
    for name, parameter in method.parameters.items():
        if parameter.kind in ("flag", "choice"):
            tried += [{name: value} for value in others(parameter, n)]
    done: list[dict[str, Any]] = []
    for choice in tried:
        parameters = {**required, **choice}
        if parameters in done:
            continue
        done.append(parameters)
        with contextlib.suppress(ParameterError):
            fill(method, parameters, n)
            for with_base in _WITH_BASE[method.base]:
                # a method over matrices cannot keep the base's other tensors without one
                if with_base or method.scope != "matrix" or parameters.get("others") != "base":
                    yield with_base, parameters


def make_inputs(
    method: MergeMethod, with_base: bool, shape: Sequence[int] = SHAPE, *, seed: int = 0, scale: float = 1.0
) -> Inputs:
    """Return a base and models, float32: weights of standard deviation `scale`, task vectors with heavy tails."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=generator) * scale
    models = [base + torch.randn(shape, generator=generator) ** 3 * (0.1 * scale) for _ in range(count_models(method))]
    return (base if with_base else None), models


def each(parameter: Parameter, n: int) -> Any:
    """Return a value to try for a parameter; for a per-model parameter, a list of `n` different values."""
    if not parameter.per_model:
        return suggest(parameter)
    return [suggest(parameter, 0.35 + 0.3 * (i + 0.5) / n) for i in range(n)]


def others(parameter: Parameter, n: int) -> list[Any]:
    """Return values of a parameter other than its default: all other choices, or one suggested value."""
    if parameter.kind != "choice":
        return [each(parameter, n)]
    alternatives = [choice for choice in parameter.choices if choice != parameter.default]
    return [[choice] * n if parameter.per_model else choice for choice in alternatives]


def defaults(method: MergeMethod, *, shares: bool = False) -> Iterator[Case]:
    """Yield the defaults as a case; with `shares`, required per-model weights are 1 / number of models."""
    n = count_models(method)
    given = {name: each(p, n) for name, p in method.parameters.items() if p.required}
    for name in given:
        parameter = method.parameters[name]
        if shares and parameter.per_model and math.isinf((parameter.range or Number()).low):
            given[name] = [1 / n] * n
    for with_base in _WITH_BASE[method.base]:
        yield with_base, given


def weak_inputs(method: MergeMethod, with_base: bool, shape: Sequence[int]) -> Iterator[tuple[str, Inputs]]:
    """Yield a description and inputs, most of them degenerate: norms, variances or counts of 0, tiny numbers."""
    base, models = make_inputs(method, with_base, shape)
    zero = torch.zeros(shape)
    yield "ordinary numbers", (base, models)
    yield "zeros", (None if base is None else zero, [zero for _ in models])
    yield "equal models", (base, [models[0] for _ in models])
    yield "models equal to the base", (base, [models[0] if base is None else base for _ in models])
    yield "a zero base", (None if base is None else zero, models)
    yield "a zero model", (base, [zero, *models[1:]])
    yield "constants", (None if base is None else zero, [zero + i for i in range(1, len(models) + 1)])
    denormal = models[0] * 1e-42
    yield "a denormal model", (None if base is None else zero, [denormal, *models[1:]])
    yield "numbers near 1e-30", make_inputs(method, with_base, shape, scale=1e-30)
    yield "denormal numbers", make_inputs(method, with_base, shape, scale=1e-42)
    centre = zero if base is None else base
    yield "opposite models", (base, [centre + (-1) ** i * (models[0] - centre) for i in range(len(models))])
    lonely = zero.clone()
    lonely.view(-1)[:1] = 1.0
    yield "a lonely entry", (None if base is None else zero, [lonely, *(zero for _ in models[1:])])


def bad_values(parameter: Parameter) -> Iterator[Any]:
    """Yield values that a parameter must refuse."""
    if parameter.kind == "flag":
        yield from ("yes", 2)
        return
    yield from (None, "nonsense")
    if parameter.kind == "choice":
        return
    yield from (math.nan, math.inf, True)
    allowed = parameter.range or Number()
    if parameter.kind == "integer":
        yield suggest(parameter) + 0.5
    for end, beyond in ((allowed.low, -1), (allowed.high, 1)):
        if math.isfinite(end):
            yield end + beyond
            if allowed.open:
                yield end


def make_data(method: MergeMethod, shape: Sequence[int], count: int) -> dict[str, list[Any]]:
    """Return statistics from data of made-up inputs and gradients, which differ from model to model, float32."""
    found: dict[str, list[Any]] = {name: [] for name in method.from_data}
    for name, numbers in method.numbers.items():
        losses = [2.0 + 0.5 * model for model in range(count)]
        sequences = [tuple(0.3 * ((7 * model + 3 * i) % 5) for i in range(4)) for model in range(count)]
        layers = [
            {layer: (layer or 40) ** (0.3 * model) + model for layer in (None, *range(32))} for model in range(count)
        ]
        made_up: dict[str, list[Any]] = {"loss": losses, "losses": sequences, "sensitivity": layers}
        found[name] = made_up[numbers.statistic]
    columns = shape[-1] if shape else 1
    rows = shape[-2] if len(shape) > 1 else 1
    for model in range(count if method.data_of == "models" else 1):
        for name, own in method.from_data.items():
            generator = torch.Generator().manual_seed(100 + model + 50 * (own.of == "base_on_models"))
            inputs = _vectors(columns, generator)
            gradients = _vectors(rows, generator)
            each = torch.randn(shape, generator=generator)
            made = {
                "gram": inputs.T @ inputs / len(inputs),
                # as of models that receive the same as the merged model
                "cross_gram": inputs.T @ inputs / len(inputs),
                "second_moment": inputs.square().mean(0),
                "magnitude": inputs.abs().mean(0),
                "gradient_gram": gradients.T @ gradients / len(gradients),
                "fisher": each.square(),
                "gradient": each,
                "absolute_gradient": each.abs(),
                "coefficients": torch.rand(
                    own.shape(shape) if own.learning else min(3, max(math.prod(shape), 1)), generator=generator
                ),
                "groups": _groups(shape, generator),
            }
            tensor = made[own.statistic]
            # packed experts have one each; here all have the same
            packed = len(shape) == 3 and own.summed and not own.elementwise
            found[name].append(tensor.expand(shape[0], *tensor.shape) if packed else tensor)
    return found


def _groups(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Return groups of all outputs, the first axis, in any order; other axes are inputs, each in its own group."""
    order = [torch.randperm(length, generator=generator) for length in shape[:1]]
    return torch.cat(
        [*order, *(-1 - torch.arange(length) for length in shape[1:]), torch.zeros(int(not shape))]
    ).float()


def _vectors(width: int, generator: torch.Generator) -> Tensor:
    scale = torch.rand(width, generator=generator) + 0.1
    return torch.randn(3 * width + 5, width, generator=generator) * scale


def merge(method: MergeMethod, inputs: Inputs, parameters: Mapping[str, Any], **options: Any) -> Tensor:
    """Merge inputs in memory, with statistics from data where the method takes any."""
    base, models = inputs
    if method.from_data or method.numbers:
        options = {"data": make_data(method, models[0].shape, len(models)), **options}
    return merge_tensor(method, base, models, parameters, **options)


def cast(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    """Return the inputs in another dtype."""
    base, models = inputs
    return (None if base is None else base.to(dtype)), [model.to(dtype) for model in models]
