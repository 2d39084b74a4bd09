"""Laws of the contract suite for methods with a sidecar."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..engine.sidecars.tensor import TensorSidecar, make_sidecar, restore_tensor
from ..method import MergeMethod
from .cases import EMPTY, SHAPES, cases, cast, count_models, defaults, make_inputs, weak_inputs

_LARGE = [(40, 16), (64,), (3, 24, 8)]


def stores_what_it_declares(method: MergeMethod) -> None:
    """The stored parts of a tensor have the sizes and dtypes that were declared from its shape."""
    for _, parameters in cases(method):
        for shape in [*SHAPES, *EMPTY, *_LARGE]:
            base, models = _inputs(method, shape)
            made = make_sidecar(method, base, models, parameters)
            for name, part in made.declared.items():
                for stored in [made.shared[name]] if part.shared else [own[name] for own in made.tasks]:
                    dtype = base.dtype if part.dtype is None else getattr(torch, part.dtype)
                    actual = f"{stored.dtype} of {stored.numel()}"
                    expected = f"{dtype} of {torch.Size(part.shape).numel()}"
                    said = f"{method.name}: part {name} of shape {list(shape)} is {actual}, declared was {expected}"
                    _require(actual == expected, said)
            _require({*made.shared, *made.tasks[0]} == {*made.declared}, f"{method.name}: parts other than declared")


def stores_the_same_again(method: MergeMethod) -> None:
    """The same inputs give the same stored data, with blocks of any size, and are not modified."""
    for _, parameters in cases(method):
        for shape in _LARGE:
            base, models = _inputs(method, shape)
            before = [tensor.clone() for tensor in (base, *models)]
            first = make_sidecar(method, base, models, parameters)
            said = f"{method.name}: two results of the same inputs, shape {list(shape)}, {parameters}"
            _require(_same(first, make_sidecar(method, base, models, parameters)), said)
            said = f"{method.name}: blocks change what is stored, shape {list(shape)}, {parameters}"
            _require(_same(first, make_sidecar(method, base, models, parameters, block=64)), said)
            said = f"{method.name}: its sidecar writes to its inputs"
            _require(all(map(torch.equal, before, (base, *models))), said)
            restored = restore_tensor(method, first, 0, base, parameters)
            again = restore_tensor(method, first, 0, base, parameters, block=64)
            _require(torch.equal(restored, again), f"{method.name}: blocks change what is restored, {parameters}")


def restores_finite_numbers(method: MergeMethod) -> None:
    """Models restored from degenerate inputs have the shape of the tensor and no NaN or infinity."""
    tried = [(parameters, shape) for _, parameters in cases(method) for shape in [(37,), (12, 37)]]
    tried += [(parameters, shape) for _, parameters in defaults(method) for shape in [*SHAPES, *EMPTY]]
    for parameters, shape in tried:
        for kind, (base, models) in weak_inputs(method, True, shape):
            assert base is not None
            for i, restored in enumerate(_restored(method, base, models, parameters)):
                said = f"{method.name}: task {i} is restored with numbers that are not finite, on {kind}, shape {list(shape)}"
                _require(bool(torch.isfinite(restored).all()), f"{said}, {parameters}")
                _require(restored.shape == shape, f"{method.name}: restores {list(restored.shape)} for {list(shape)}")


def restores_the_base(method: MergeMethod) -> None:
    """Models equal to the base are restored exactly."""
    for _, parameters in cases(method):
        for dtype in (torch.float32, torch.bfloat16):
            for shape in [(37,), (12, 37)]:
                base, _ = cast(_inputs(method, shape), dtype)
                assert base is not None
                models = [base.clone() for _ in range(count_models(method))]
                for restored in _restored(method, base, models, parameters):
                    said = f"{method.name}: models equal to the base do not come back, {dtype}, {parameters}"
                    _require(torch.equal(restored, base), said)


def restores_without_loss(method: MergeMethod) -> None:
    """With the settings that the method declares lossless, every model is restored up to rounding."""
    assert method.sidecar is not None
    settings = method.sidecar.lossless
    if settings is None:
        return
    for _, parameters in defaults(method):
        for shape in [*SHAPES, *_LARGE]:
            base, models = _inputs(method, shape)
            models = models[: settings.models or len(models)]
            given = {**parameters, **settings.parameters}
            for model, restored in zip(models, _restored(method, base, models, given), strict=True):
                error = float((restored - model).norm() / model.norm().clamp(min=1e-30))
                said = f"{method.name}: {given} loses {error:.1e} of a model of shape {list(shape)}"
                _require(error <= settings.tolerance, said)


def _inputs(method: MergeMethod, shape: tuple[int, ...]) -> tuple[Tensor, list[Tensor]]:
    base, models = make_inputs(method, True, shape)
    assert base is not None
    return base, models


def _restored(method: MergeMethod, base: Tensor, models: list[Tensor], parameters: Mapping[str, Any]) -> list[Tensor]:
    made = make_sidecar(method, base, models, parameters)
    return [restore_tensor(method, made, i, base, parameters) for i in range(len(models))]


def _same(a: TensorSidecar, b: TensorSidecar) -> bool:
    """Compare stored parts: integers exactly, floats up to the rounding of sums in another order."""
    pairs = [(a.shared[name], b.shared[name]) for name in a.shared]
    pairs += [(own[name], other[name]) for own, other in zip(a.tasks, b.tasks, strict=True) for name in own]

    def same(x: Tensor, y: Tensor) -> bool:
        if x.shape != y.shape or not x.is_floating_point():
            return torch.equal(x, y)
        return torch.allclose(x, y, rtol=2**-21, atol=2**-23)

    return all(same(x, y) for x, y in pairs)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise AssertionError(message)


SIDECAR_LAWS: list[Callable[[MergeMethod], None]] = [
    stores_what_it_declares,
    stores_the_same_again,
    restores_finite_numbers,
    restores_the_base,
    restores_without_loss,
]
"""Laws that a method with a sidecar must satisfy, in addition to those of its merge."""
