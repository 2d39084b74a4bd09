"""Merge large language models on the machine you have.

    import merganser

    merganser.merge("recipe.yaml", "out")

Every public name is loaded when it is first used: importing merganser loads neither torch nor transformers.
"""

from __future__ import annotations

import importlib

from .version import __version__ as __version__

# typing would take as long to import as all the rest, before the command line can answer Ctrl-C
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from . import errors, methods
    from .calibration import add_statistics, calibrate
    from .checkpoint import open_checkpoint
    from .distillation import blend_answers, cache_logits, fuse
    from .distillation.callback import MergeCallback
    from .engine.in_memory.running import EMA, LAWA, Average
    from .engine.in_memory.state_dicts import merge_state_dicts
    from .engine.merge import merge, plan
    from .engine.sidecars.restoration import restore
    from .errors import MergeError
    from .evaluation import evaluate
    from .inspection import diff, inspect, kinship
    from .recipe import load_recipe, load_recipes
    from .record import verify
    from .report import write_report

__all__ = [
    "EMA",
    "LAWA",
    "Average",
    "MergeCallback",
    "MergeError",
    "add_statistics",
    "blend_answers",
    "cache_logits",
    "calibrate",
    "diff",
    "errors",
    "evaluate",
    "fuse",
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
    "EMA": "engine.in_memory.running",
    "LAWA": "engine.in_memory.running",
    "Average": "engine.in_memory.running",
    "MergeCallback": "distillation.callback",
    "MergeError": "errors",
    "add_statistics": "calibration",
    "blend_answers": "distillation",
    "cache_logits": "distillation",
    "calibrate": "calibration",
    "diff": "inspection",
    "evaluate": "evaluation",
    "fuse": "distillation",
    "inspect": "inspection",
    "kinship": "inspection",
    "load_recipe": "recipe",
    "load_recipes": "recipe",
    "merge": "engine.merge",
    "merge_state_dicts": "engine.in_memory.state_dicts",
    "open_checkpoint": "checkpoint",
    "plan": "engine.merge",
    "restore": "engine.sidecars.restoration",
    "verify": "record",
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
