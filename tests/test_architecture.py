"""The rooms of the package: what may import what. Imports go down, and none goes round in a circle."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import merganser

ROOT = Path(merganser.__file__).parent

# From the ground up: a room imports only from itself and from rooms before it in this list, lazily or not, for types or
# not. A folder counts as part of the longest entry that its path begins with. (The registry loads the files of methods by
# name; that is no import, and nothing in `method` knows one of them.)
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


def imports(module: str) -> Iterator[str]:
    """Yield every module of the package that a module imports, at the top, in a function, or for types."""
    path = MODULES[module]
    package = module.split("/") if path.name == "__init__.py" else module.split("/")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            parent = [part for part in package[: len(package) - node.level + 1] if part]
            target = "/".join([*parent, *(node.module or "").split(".")]).strip("/")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "merganser":
            target = "/".join((node.module or "").split(".")[1:])
        else:
            continue
        for name in node.names:
            inner = f"{target}/{name.name}".strip("/")
            yield inner if inner in MODULES else target


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
        for target in imports(module)
        if ROOMS.index(room(target)) > ROOMS.index(room(module))
    ]
    assert up == []


def test_no_import_goes_round_in_a_circle() -> None:
    """Between files, whatever the room."""
    above: dict[str, list[str]] = {module: [] for module in MODULES}
    left = {module: {target for target in imports(module) if target != module} for module in MODULES}
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
