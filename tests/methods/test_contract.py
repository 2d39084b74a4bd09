"""Every registered method keeps the contract, without a list of those that want to."""

import importlib
from pathlib import Path

import pytest

from merganser.method.registry import method_names, methods
from merganser.testing import check_citation, check_reproducible, contract, probe

METHODS = methods()
BIBLIOGRAPHY = Path(__file__).parents[2] / "references.bib"


@pytest.mark.parametrize(
    ("name", "law"),
    [pytest.param(name, law, id=f"{name}-{law.__name__}") for name in METHODS for law in contract(METHODS[name])],
)
def test_contract(name, law):
    law(METHODS[name])


@pytest.mark.parametrize("name", METHODS)
def test_citations_are_in_the_bibliography(name):
    check_citation(METHODS[name], BIBLIOGRAPHY)


def test_fresh_processes_with_other_hash_seeds_give_the_same_bytes(tmp_path, monkeypatch):
    """A method that goes by the order of a set is found out, and none of ours is."""
    (tmp_path / "unstable.py").write_text(
        "from torch import Tensor\n"
        "from merganser.method import merge_method\n"
        '@merge_method(family="toys", cite="-")\n'
        "def unstable(models: list[Tensor]) -> Tensor:\n"
        '    return models[0] * float(next(iter({"1", "2", "3", "4", "5", "6", "7"})))\n'
    )
    monkeypatch.syspath_prepend(tmp_path)
    unstable = importlib.import_module("unstable").unstable
    with pytest.raises(AssertionError, match=r"different results: unstable:unstable$"):
        check_reproducible([*METHODS.values(), unstable])


def test_every_file_of_the_folder_is_a_method():
    folder = Path(__file__).parents[2] / "src" / "merganser" / "methods"
    assert {path.stem for path in folder.glob("*.py")} - {"__init__"} <= set(method_names())


def test_probe_tells_methods_apart():
    slerp, linear, stock = (probe(METHODS[name]) for name in ("slerp", "linear", "model_stock"))
    assert slerp == {
        "base": "required",
        "models": "exactly 1 model and a base",
        "scope": "element",
        "passes": 1,
        "random": False,
        "order_matters": True,
        "identical_models_return_the_model": True,
        "zero_task_vectors_return_the_base": True,
        "result_differs_from_inputs": True,
        "peak_memory": slerp["peak_memory"],
    }
    # the inputs, and some of what is computed from them
    assert 2 < slerp["peak_memory"] < 8
    assert (linear["base"], linear["passes"], linear["zero_task_vectors_return_the_base"]) == ("unused", 0, None)
    assert (stock["models"], stock["scope"], stock["order_matters"]) == ("2 or more models and a base", "row", False)
