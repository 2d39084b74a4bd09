"""Settings that methods are measured at: published ones, and the values that are tried of one parameter."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from merganser.method import MergeMethod
from merganser.method.registry import method_names, methods

Setting = dict[str, Any]
_FILE = Path(__file__).parent / "config.json"


def load_config() -> dict[str, Any]:
    """Return config.json."""
    found: dict[str, Any] = json.loads(_FILE.read_text(encoding="utf-8"))
    return found


def rows(config: Mapping[str, Any]) -> list[str]:
    """Return the names of all rows: the methods that are measured, and their variants, such as `featcal+wudi`."""
    variants = [name for name in config["methods"] if "+" in name]
    return [name for name in [*method_names(), *variants] if name not in config["left_out"]]


def method_of(row: str) -> MergeMethod:
    """Return the method of a row; that of a variant stands before the plus.

    Raises:
        KeyError: There is no such method.
    """
    return methods()[row.partition("+")[0]]


def published(config: Mapping[str, Any], method: str) -> Setting:
    """Return the published settings of a row: those of config.json, the method's own defaults otherwise."""
    given = config["methods"].get(method, {})
    return {"each": dict(given.get("each", {})), "shared": dict(given.get("shared", {}))}


def grid(config: Mapping[str, Any], method: str) -> list[Setting]:
    """Return the settings that tuning tries first: the published ones, then other values of one parameter; none where there is none."""
    first = published(config, method)
    varied = [_with(first, key, value) for key, found in _values(config, method).items() for value in found]
    return [first, *varied] if varied else []


def wider(config: Mapping[str, Any], method: str, tried: Sequence[tuple[Setting, float]]) -> Setting | None:
    """Return what tuning tries next: a value beyond the best one, where that is the least or the largest of those tried.

    Values go on by ratio: after 0.5, 1 and 1.5 comes 2.2.

    Args:
        config: The settings that are measured.
        method: Name of the method.
        tried: All settings that were tried, with the share of the gain that each keeps.

    Returns:
        None where the best value lies between others, where the next one is out of the parameter's range, and where
        values are not numbers.
    """
    first = published(config, method)
    best = max(tried, key=lambda one: one[1])[0]
    names = list(_values(config, method))
    name = next((name for name in names if best["shared"].get(name) != first["shared"].get(name)), names[0])
    parameter = method_of(method).parameters[name]
    if isinstance(parameter.default, str):
        return None

    def value(setting: Setting) -> float:
        return float(setting["shared"].get(name, parameter.default))

    values = sorted(value(setting) for setting, _ in tried if _without(setting, name) == _without(first, name))
    if value(best) == values[0]:
        neighbour = values[1]
    elif value(best) == values[-1]:
        neighbour = values[-2]
    else:
        return None
    beyond = float(f"{value(best) ** 2 / neighbour:.2g}") if neighbour > 0 else 0.0
    known = parameter.range
    return _with(first, name, beyond) if beyond > 0 and (known is None or beyond in known) else None


def is_variant(config: Mapping[str, Any], method: str, setting: Setting) -> bool:
    """Return whether a setting is the published one, or differs from it in one value that tuning varies."""
    first = published(config, method)
    names = _values(config, method)
    return setting == first or any(_without(setting, name) == _without(first, name) for name in names)


def _values(config: Mapping[str, Any], method: str) -> dict[str, list[Any]]:
    """Return the values that tuning tries first, by the name of the parameter."""
    own = config["methods"].get(method, {}).get("grid")
    parameters = method_of(method).parameters
    return own or {key: found for key, found in config["grids"].items() if key in parameters}


def _with(setting: Setting, name: str, value: Any) -> Setting:
    return {"each": setting["each"], "shared": {**setting["shared"], name: value}}


def _without(setting: Setting, name: str) -> Setting:
    return {"each": setting["each"], "shared": {key: v for key, v in setting["shared"].items() if key != name}}
