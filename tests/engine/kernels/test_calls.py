"""Methods of third parties that fail, and what is said about it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from merganser.engine.kernels import kernels
from merganser.engine.kernels.kernels import Kernels
from merganser.engine.kernels.merge_tensor import merge_tensor
from merganser.engine.merge import merge, plan
from merganser.engine.plan import memory
from merganser.errors import MethodError
from merganser.method import merge_method, statistic
from merganser.method.registry import get_method
from merganser.ops.random import Random
from tests.making import make_recipe, read_model, register, write_llamas

DOC = "Do something.\n\n    merged = something\n"


def method(function: Callable[..., Any], **declared: Any) -> Any:
    function.__doc__ = DOC
    return merge_method(family="toys", cite="-", **declared)(function)


def halves(models: list[Tensor]) -> Tensor:
    return models[0][: len(models[0]) // 2]


def sideways(models: list[Tensor]) -> Tensor:
    return models[0].T


def signs(models: list[Tensor]) -> Tensor:
    return models[0] > 0


def number(models: list[Tensor]) -> Any:
    return 3.0


def displeased(models: list[Tensor]) -> Tensor:
    raise ValueError("this is no weight")


@pytest.mark.parametrize(
    ("function", "scope", "expected"),
    [
        (
            halves,
            "element",
            r"merge method halves: returned torch.float32 of shape \[20\] for a block of shape \[40\]; it must .*",
        ),
        (
            sideways,
            "row",
            r"merge method sideways: returned torch.float32 of shape \[8, 5\] for a block of shape \[5, 8\]; .*",
        ),
        (signs, "element", r"merge method signs: returned torch.bool of shape \[40\] for .*"),
        (number, "element", "merge method number: number returned float, and must return a tensor"),
        (
            displeased,
            "element",
            r"merge method displeased: ValueError: this is no weight \(test_calls.py, line \d+\)",
        ),
    ],
)
@pytest.mark.parametrize("fused", [False, True])
def test_what_a_method_does_wrong_is_told(function: Callable[..., Any], scope: str, expected: str, fused: bool) -> None:
    with pytest.raises(MethodError, match=f"^w: {expected}$"):
        merge_tensor(method(function, scope=scope), None, [torch.randn(5, 8)], name="w", fused=fused)


def total(models: list[Tensor]) -> Tensor:
    return models[0].double().sum()


def half(measured: Tensor) -> Any:
    return 0.5


def scaled(models: list[Tensor], gain: Tensor) -> Tensor:
    return models[0] * gain


def test_what_solving_does_wrong_is_told() -> None:
    toy = method(scaled, statistics={"gain": statistic(total, half)})
    with pytest.raises(MethodError, match=r"^w: scaled: merge method scaled: half returned float"):
        merge_tensor(toy, None, [torch.randn(5, 8)], name="w")


def test_errors_of_our_own_methods_are_left_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "full_like", lambda *_: torch.zeros(3)[5])
    with pytest.raises(IndexError):
        merge_tensor(get_method("passthrough"), None, [torch.randn(5, 8)])


def blotted(models: list[Tensor], rng: Random) -> Tensor:
    kept = models[0].clone()
    kept[rng.uniform(0, kept.shape) < 0.5] = 0
    return kept


def test_what_cannot_be_stacked_is_merged_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    register(monkeypatch, blotted=method(blotted))
    models = write_llamas(tmp_path, 1)
    found = read_model(merge(make_recipe("blotted", models), tmp_path / "out").out)
    for name, tensor in read_model(models[0]).items():
        expected = merge_tensor(get_method("blotted"), None, [tensor], name=name)
        assert torch.equal(found[name], expected), name
    (said,) = (message for message in caplog.messages if "one by one" in message)
    assert said.startswith("blotted: slower than it might be, as small tensors are merged one by one: ")


def read_numbers(models: list[Tensor]) -> Tensor:
    return models[0] * max(models[0].tolist())


def twice(models: list[Tensor]) -> Tensor:
    return models[0] * 2


def test_a_plan_knows_that_what_is_not_fused_needs_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    toys = {"read_numbers": method(read_numbers), "twice": method(twice)}
    register(monkeypatch, **toys)
    models, found = write_llamas(tmp_path, 1), []
    for name in toys:
        planned = plan(make_recipe(name, models))
        assert planned.fused
        found.append(memory.memory_needs(planned.tensors, True).worker)
    # blocks of intermediate results
    assert found[0] > found[1]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"statistics": {}}, "scaled takes 'gain', which is no input, statistic or located number"),
        (
            {"statistics": {"gain": statistic(lambda modles: modles, half)}},
            "the measuring of gain takes 'modles', .*Did you mean 'models'?",
        ),
        (
            {"statistics": {"gain": statistic(total, lambda measured, sice: sice)}},
            "the solving of gain takes 'sice', which is no input",
        ),
    ],
)
def test_arguments_that_nothing_fills_are_refused(change: dict[str, Any], expected: str) -> None:
    with pytest.raises(TypeError, match=re.escape("scaled: ") + expected):
        method(scaled, **change)


def test_settings_never_share_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = (
        Kernels(get_method("linear"), {"normalize": own}, torch.float32, torch.float32, torch.device("cpu"))
        for own in (False, True)
    )

    class Interrupted(dict[Any, int]):
        """Another thread numbers its settings at the same time."""

        def setdefault(self, key: Any, number: int) -> int:  # type: ignore[override]
            if key[1] == (("normalize", False),):
                _ = other._settings
            return super().setdefault(key, number)

    monkeypatch.setattr(kernels, "_numbers", Interrupted())
    assert one._settings != other._settings
