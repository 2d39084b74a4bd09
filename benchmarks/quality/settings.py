"""Settings that methods are measured at: published ones, and the few values that are tried of one parameter."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from merganser.method.registry import methods

Setting = dict[str, Any]
_FILE = Path(__file__).parent / "config.json"


def load_config() -> dict[str, Any]:
    """Return config.json."""
    found: dict[str, Any] = json.loads(_FILE.read_text(encoding="utf-8"))
    return found


def published(config: Mapping[str, Any], method: str) -> Setting:
    """Return the published settings of a method: those of config.json, its own defaults otherwise."""
    given = config["methods"].get(method, {})
    return {"each": dict(given.get("each", {})), "shared": dict(given.get("shared", {}))}


def grid(config: Mapping[str, Any], method: str) -> list[Setting]:
    """Return the settings that tuning tries: the published ones, then other values of one parameter; none where there is none."""
    own = config["methods"].get(method, {}).get("grid")
    parameters = methods()[method].parameters
    values = own or {key: found for key, found in config["grids"].items() if key in parameters}
    first = published(config, method)
    varied = [
        {"each": first["each"], "shared": {**first["shared"], key: value}}
        for key, found in values.items()
        for value in found
    ]
    return [first, *varied] if varied else []
