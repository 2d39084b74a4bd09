"""Read the `modules` of a recipe for a model of several parts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import cast

from .document.place import Entry, Node
from .document.scalar import shown
from .fields.setting import Setting
from .keys import MODULE_KEYS
from .model import Module, Slice, Source

__all__ = ["over", "read_module_body", "read_modules"]

Settings = dict[str, Setting]


def read_module_body(entry: Entry) -> dict[str, Entry]:
    """Return the entries of one module.

    Raises:
        RecipeError: It has an unknown key, or not exactly one of models and slices.
    """
    module = entry.mapping(MODULE_KEYS)
    if ("models" in module) == ("slices" in module):
        raise entry.error("a module has exactly one of models and slices")
    return module


def read_modules(
    entry: Entry,
    model: Callable[[Entry], Source],
    piece: Callable[[Entry], Slice],
    parameters: Callable[[dict[str, Entry]], Settings],
) -> tuple[tuple[Module, ...], tuple[Slice, ...]]:
    """Return the modules, and the slices of all of them one after the other; whole models are one slice.

    Args:
        entry: The value of `modules`.
        model: Reads an entry of `models`.
        piece: Reads an entry of `slices`.
        parameters: Reads the `parameters` among some entries.

    Raises:
        RecipeError: There is no module, one is not valid, or `default`, the name of the only part, is not alone.
    """
    modules: list[Module] = []
    slices: list[Slice] = []
    written = entry.mapping()
    empty = [name for name in cast("dict[str, Node]", entry.value) if name not in written]
    if empty or not written:
        raise entry.error(
            f"{shown(empty[0])} has no value; write its models, or leave it out"
            if empty
            else "names no module; name one, such as text_decoder"
        )
    if "default" in written:
        raise written["default"].error("'default' is the name of the only module of a model, and there are others here")
    for name, each in written.items():
        body, first = read_module_body(each), len(slices)
        own = parameters(body)
        if "models" in body:
            slices.append(Slice(tuple(model(item) for item in body["models"].items()), own, None, body["models"].place))
        else:
            pieces = (piece(item) for item in body["slices"].items())
            slices += [replace(found, parameters=over(dict(found.parameters), own)) for found in pieces]
        modules.append(Module(name, range(first, len(slices)), "models" in body, each.place))
    return tuple(modules), tuple(slices)


def over(near: Settings, far: Settings) -> Settings:
    """Return the settings of two levels as one: where no filter of the near level matches, the far level applies."""
    both = {name: Setting(near[name].rules + far[name].rules, near[name].place) for name in near.keys() & far.keys()}
    return far | near | both
