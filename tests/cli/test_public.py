"""The package's public names: what they are, where they lead, and what they cost."""

from __future__ import annotations

import ast
import gc
import subprocess
import sys
from pathlib import Path

import pytest

import merganser
from merganser.method import MergeMethod
from tests.cli.tiny import linear


def test_all_is_sorted_and_every_name_is_there() -> None:
    # as ruff sorts: names in capitals first
    assert merganser.__all__ == sorted(merganser.__all__, key=lambda name: (not name.isupper(), name))
    assert set(merganser.__all__) <= set(dir(merganser))
    for name in merganser.__all__:
        assert getattr(merganser, name) is not None
    assert set(merganser.__all__) == {*merganser._HOMES, *merganser._MODULES}


def test_unknown_name() -> None:
    with pytest.raises(AttributeError, match="module 'merganser' has no attribute 'merg'"):
        merganser.merg  # noqa: B018


def test_every_public_name_of_a_module_is_its_own() -> None:
    """A module of that name would take the place of a function when it is imported."""
    package = Path(merganser.__file__).parent
    modules = {path.stem for path in package.iterdir()}
    assert not modules & set(merganser._HOMES)


def test_methods_can_be_called_whatever_was_imported() -> None:
    import merganser.methods.linear as module

    found = merganser.methods()
    assert found["linear"] is module.linear
    assert all(isinstance(method, MergeMethod) for method in found.values())


def test_merge_in_three_lines(models: Path) -> None:
    result = merganser.merge(linear("a", "b"), "out")
    assert merganser.verify(result.out).ok
    assert merganser.diff("out", result.out).identical


LIGHT = [
    "import merganser",
    "import merganser.cli",
    "import merganser; merganser.load_recipe, merganser.open_checkpoint, merganser.verify, merganser.errors",
    "import merganser; merganser.diff, merganser.inspect, merganser.methods, merganser.merge, merganser.plan",
    "from merganser.cli import make_app; make_app()(['--help'], standalone_mode=False)",
    "from merganser.cli import make_app; make_app('merge')(['merge', '--help'], standalone_mode=False)",
    "from merganser.cli import make_app; make_app()(['--version'], standalone_mode=False)",
]


@pytest.mark.parametrize("text", LIGHT)
def test_neither_torch_nor_transformers_is_loaded(text: str) -> None:
    check = "import sys; print(sorted({'torch', 'transformers', 'rich'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", f"{text}; {check}"], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize("verb", ["merge", "eval", "fuse"])
def test_only_the_files_of_a_verb_are_loaded(verb: str) -> None:
    """To describe the other verbs would take a tenth of a second of each command."""
    code = (
        "import sys; from merganser.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "finally: print(sorted(name[14:] for name in sys.modules if name.count('.') == 2 and name[:14] == 'merganser.cli.'))"
    )
    done = subprocess.run([sys.executable, "-c", code, verb, "--help"], capture_output=True, text=True, check=True)
    loaded = ast.literal_eval(done.stdout.splitlines()[-1])
    assert sorted({verb, "_errors", "_mergekit", "_options", "printing"}) == loaded


def test_garbage_is_looked_for_as_ever_where_it_is_a_library(models: Path) -> None:
    """The command looks for it later; what else runs in a user's process is not to know of it."""
    before = gc.get_threshold(), gc.isenabled(), gc.get_freeze_count()
    merganser.merge(linear("a", "b"), "out")
    assert (gc.get_threshold(), gc.isenabled(), gc.get_freeze_count()) == before
