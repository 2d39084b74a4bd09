"""Merge large language models on the machine you have.

    import merganser

    merganser.merge("recipe.yaml", "out")

Every public name is loaded when it is first used: importing merganser loads neither torch nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import errors, methods
    from .api import merge, merge_state_dicts, plan
    from .checkpoint import open_checkpoint
    from .difference import diff
    from .errors import MergeError
    from .evaluation import evaluate
    from .inspection import inspect
    from .recipe import load_recipe, load_recipes
    from .report import write_report
    from .restoration import restore
    from .task_vectors import kinship
    from .verification import verify

__version__ = "0.1.0"

__all__ = [
    "MergeError",
    "diff",
    "errors",
    "evaluate",
    "inspect",
    "kinship",
    "load_recipe",
    "load_recipes",
    "merge",
    "merge_state_dicts",
    "methods",
    "open_checkpoint",
    "plan",
    "restore",
    "verify",
    "write_report",
]

_MODULES = ("errors", "methods")
_HOMES = {
    "MergeError": "errors",
    "diff": "difference",
    "evaluate": "evaluation",
    "inspect": "inspection",
    "kinship": "task_vectors",
    "load_recipe": "recipe",
    "load_recipes": "recipe",
    "merge": "api",
    "merge_state_dicts": "api",
    "open_checkpoint": "checkpoint",
    "plan": "api",
    "restore": "restoration",
    "verify": "verification",
    "write_report": "report",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f".{name}", __name__)
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
