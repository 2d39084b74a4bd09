"""The package's public names: what they are, where they lead, and what they cost."""

from __future__ import annotations

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
    "from merganser.cli import app; app(['--help'], standalone_mode=False)",
    "from merganser.cli import app; app(['merge', '--help'], standalone_mode=False)",
    "from merganser.cli import app; app(['--version'], standalone_mode=False)",
]


@pytest.mark.parametrize("text", LIGHT)
def test_neither_torch_nor_transformers_is_loaded(text: str) -> None:
    check = "import sys; print(sorted({'torch', 'transformers', 'rich'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", f"{text}; {check}"], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
