"""Laws that a method may break, with a reason in `breaks`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..method import MergeMethod
from .cases import LOCATIONS, SHAPE, cases, cast, count_models, defaults, make_data, make_inputs, merge

Law = Callable[[MergeMethod], None]


def returns_identical_models(method: MergeMethod) -> None:
    """Identical models give that model, up to rounding; weights without default are 1 / number of models."""
    for with_base, parameters in defaults(method, shares=True):
        base, (model, *_) = make_inputs(method, with_base)
        # numbers that follow from the layer differ from place to place
        for where in LOCATIONS if method.goes_by_location else LOCATIONS[:1]:
            models = [model.clone() for _ in range(count_models(method))]
            close(method, merge(method, (base, models), parameters, location=where), model)


def returns_base(method: MergeMethod) -> None:
    """Models equal to the base give exactly the base."""
    for with_base, parameters in cases(method):
        for dtype in (torch.float32, torch.bfloat16):
            base, models = cast(make_inputs(method, with_base), dtype)
            if base is not None:
                merged = merge(method, (base, [base.clone() for _ in models]), parameters)
                require(torch.equal(merged, base), f"{method.name}: zero task vectors change the base, {parameters}")


def ignores_order(method: MergeMethod) -> None:
    """Models in another order, with their parameters in that order, give the same result up to rounding."""
    for with_base, parameters in cases(method):
        base, models = make_inputs(method, with_base)
        turned = {
            name: value[::-1] if method.parameters[name].per_model else value for name, value in parameters.items()
        }
        result = merge(method, (base, models), parameters)
        data = {name: own[::-1] for name, own in make_data(method, SHAPE, len(models)).items()}
        close(method, merge(method, (base, models[::-1]), turned, data=data), result)


def differs_from_inputs(method: MergeMethod) -> None:
    """The result is neither the base nor one of the models."""
    for with_base, parameters in defaults(method):
        base, models = make_inputs(method, with_base)
        merged = merge(method, (base, models), parameters)
        others = models if base is None else [base, *models]
        step = (
            min((one - other).norm() for one in others for other in others if one is not other) if others[1:] else 1.0
        )
        for tensor in others:
            require(bool((merged - tensor).norm() > 1e-3 * step), f"{method.name}: the result is one of the inputs")


BREAKABLE = {
    "identical": returns_identical_models,
    "zero_delta": returns_base,
    "order": ignores_order,
    "differs": differs_from_inputs,
}


def applies(name: str, method: MergeMethod) -> bool:
    """Return whether a law, by its name in `breaks`, says anything of a method."""
    if name == "identical":
        # with exactly one model and a base (SLERP) there are no two models to be identical
        return method.base == "unused" or method.max_models != 1
    if name == "zero_delta":
        return method.base != "unused"
    if name == "order":
        # random draws depend on the position of a model
        return method.max_models != 1 and not method.random
    return True


def holds(law: Law, method: MergeMethod) -> bool:
    """Return whether a method satisfies a law."""
    try:
        law(method)
    except AssertionError:
        return False
    return True


def close(method: MergeMethod, merged: Tensor, expected: Tensor) -> None:
    """Compare up to rounding, which matrix functions amplify."""
    bound = 1e-4 if method.scope == "matrix" else 1e-6
    torch.testing.assert_close(merged, expected, rtol=bound, atol=bound)


def require(condition: bool, message: str) -> None:
    """Raise AssertionError with a message unless the condition holds."""
    if not condition:
        raise AssertionError(message)
