"""The rooms of the package: what may import what. Imports go down, and none goes round in a circle."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import merganser

ROOT = Path(merganser.__file__).parent

# From the ground up: a room imports only from itself and from rooms before it in this list, lazily or not, for types or
# not. A folder counts as part of the longest entry that its path begins with. (The registry loads the files of methods by
# name; that is not an import, and nothing in `method` knows one of them.)
ROOMS = [
    "version",
    "errors",
    "wording",
    "process",
    "system",
    "jsonfile",
    "files",
    "catalogue",
    "method",
    "ops",
    "methods",
    "factor_methods",
    "checkpoint",
    "statistics",
    "record",
    "tokenizer",
    "anatomy/settings",
    "anatomy",
    "recipe/document",
    "recipe/fields",
    "recipe",
    "adapters",
    "inspection",
    "engine/fusion",
    "engine/kernels",
    "engine/plan",
    "engine/alignment",
    "engine/vocabulary",
    "engine/agreement",
    "engine/output",
    "engine/permutation",
    "engine/stream",
    "engine/sidecars",
    "engine/adapters",
    "engine",
    "inference",
    "transplant",
    "calibration/data",
    "calibration/output",
    "calibration/forward",
    "calibration/sums",
    "calibration/reverse",
    "calibration/single",
    "calibration/matching",
    "calibration/within",
    "calibration/learning",
    "calibration/planning",
    "calibration/recipes",
    "calibration/seams",
    "calibration",
    # the entry: it calibrates what a recipe lacks, and so stands above
    "engine/merge",
    "mixture",
    "runtime",
    "inference/sources",
    "evaluation/scoring",
    "evaluation",
    "distillation",
    "search",
    "report",
    "publishing",
    "testing",
    "",
    "cli",
    "__main__",
]


def modules() -> dict[str, Path]:
    """Return the file of every module, by its path in the package, such as "engine/plan/tensor"."""
    found = {}
    for path in ROOT.rglob("*.py"):
        name = path.relative_to(ROOT).with_suffix("").as_posix()
        found["" if name == "__init__" else name.removesuffix("/__init__")] = path
    return found


MODULES = modules()


class Facts(NamedTuple):
    """What the tests need of a module, so that it is parsed once."""

    imports: list[str]
    private: list[str]
    lengths: dict[str, int]


@cache
def facts(module: str) -> Facts:
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    lengths: dict[str, int] = {}
    for name, lines in lengths_of(tree):
        lengths[name] = max(lines, lengths.get(name, 0))
    found = [*imports_of(module, tree)]
    private = [name for _, name in found if name.startswith("_") and not name.startswith("__")]
    return Facts([target for target, _ in found], private, lengths)


def imports_of(module: str, tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Yield every module of the package that a module imports, at the top, in a function, or for types.

    Also the name that it imports from there; none if that is the module itself.
    """
    path = MODULES[module]
    package = module.split("/") if path.name == "__init__.py" else module.split("/")[:-1]
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            parent = [part for part in package[: len(package) - node.level + 1] if part]
            target = "/".join([*parent, *(node.module or "").split(".")]).strip("/")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "merganser":
            target = "/".join((node.module or "").split(".")[1:])
        else:
            continue
        for name in node.names:
            inner = f"{target}/{name.name}".strip("/")
            yield (inner, "") if inner in MODULES else (target, name.name)


def lengths_of(tree: ast.Module) -> Iterator[tuple[str, int]]:
    """Yield the number of lines of the body of every function, without its docstring."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[1:] if ast.get_docstring(node, clean=False) is not None else node.body
            if body:
                yield node.name, (body[-1].end_lineno or 0) - body[0].lineno + 1


def room(module: str) -> str:
    """Return the room that a module belongs to."""
    if module == "":
        return ""
    return max((r for r in ROOMS if r and (module == r or module.startswith(f"{r}/"))), key=len, default="?")


def test_every_module_has_a_room() -> None:
    assert [module for module in MODULES if room(module) == "?"] == []


def test_the_root_names_rooms() -> None:
    assert len(list(ROOT.glob("*.py"))) <= 9


def test_imports_go_down() -> None:
    up = [
        f"{module} imports {target}"
        for module in MODULES
        for target in facts(module).imports
        if ROOMS.index(room(target)) > ROOMS.index(room(module))
    ]
    assert up == []


def test_no_import_goes_round_in_a_circle() -> None:
    """Between files, whatever the room."""
    above: dict[str, list[str]] = {module: [] for module in MODULES}
    left = {module: {target for target in facts(module).imports if target != module} for module in MODULES}
    for module, targets in left.items():
        for target in targets:
            above[target].append(module)
    ready = [module for module, targets in left.items() if not targets]
    while ready:
        module = ready.pop()
        del left[module]
        for other in above[module]:
            left[other].discard(module)
            if not left[other] and other not in ready:
                ready.append(other)
    assert {module: sorted(targets & left.keys()) for module, targets in left.items()} == {}


LONGEST = 50
"""Most lines of the body of a function, without its signature and docstring."""

# longer because they are one clear list: a literal, or steps that end in one constructor call
LONG = {
    "engine/planner/planner:build_plan",
    "recipe/schema:_properties",
    "recipe/schema:_shared",
}


def test_functions_are_short() -> None:
    """A function whose body is longer does two things; one in the list that became short is to be taken out."""
    long = {
        f"{module}:{name}" for module in MODULES for name, lines in facts(module).lengths.items() if lines > LONGEST
    }
    assert long == LONG


def test_names_with_an_underscore_stay_in_their_file() -> None:
    assert {module: facts(module).private for module in MODULES if facts(module).private} == {}
