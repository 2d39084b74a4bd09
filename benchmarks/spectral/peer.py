"""FusionBench's own functions, without the rest of FusionBench.

The package imports Lightning, Hydra, Transformers and more; the functions that are measured need torch. So the four
files that hold them are loaded by themselves, and what they import from the rest of the package is stood in for by
things that do nothing.
"""

import contextlib
import importlib.metadata
import importlib.util
import io
import os
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

VERSION = "0.2.33"
VARIABLE = "MERGANSER_FUSION_BENCH"

_METHODS = Path("fusion_bench") / "method"
_FILES = {
    "iso": _METHODS / "isotropic_merging" / "iso_utils.py",
    "tsv": _METHODS / "task_singular_vector" / "utils" / "TSVM_utils.py",
    "wudi": _METHODS / "wudi" / "wudi.py",
    "svc": _METHODS / "singular_value_calibration" / "utils.py",
}

LAMBDA, ALPHA = 0.3, 0.1
"""Of singular value calibration, which its authors' program takes: the factor of the sum of the task vectors, and the least overshoot."""

Merge = Callable[[Sequence[Tensor]], Tensor]


class PeerError(RuntimeError):
    """FusionBench is not there, or not the version that is compared with."""


def folder(given: Path | None = None) -> Path:
    """Return where FusionBench is installed.

    Raises:
        PeerError: Nobody says where, or it is not there, or it is another version.
    """
    place = given or (Path(os.environ[VARIABLE]) if os.environ.get(VARIABLE) else None)
    how = f"pip install --no-deps --target DIR fusion-bench=={VERSION}, then {VARIABLE}=DIR"
    if place is None:
        raise PeerError(f"no folder with FusionBench is given; {how}")
    found = version(place)
    if found != VERSION:
        raise PeerError(f"{place}: FusionBench is {found or 'not here'}, the comparison is with {VERSION}; {how}")
    return place


def version(place: Path) -> str | None:
    """Return the version of FusionBench in a folder."""
    for distribution in importlib.metadata.distributions(path=[str(place)]):
        if distribution.metadata["Name"] == "fusion-bench":
            return distribution.version
    return None


def load(place: Path) -> dict[str, Callable[[int], Merge]]:
    """Return FusionBench's functions, on task vectors of one matrix, by the names that recipes here use.

    Args:
        place: From `folder`.

    Returns:
        Each takes the number of Adam's steps, of which only WUDI takes any, and gives the merge.
    """
    with stand_ins(_stood_in()):
        iso, tsv, wudi, svc = (_module(f"fusion_bench_{name}", place / file) for name, file in _FILES.items())
    return {
        "iso_c": lambda _: _quiet(lambda vectors: iso.iso_c(vectors, "cpu")),
        "iso_cts": lambda _: _quiet(lambda vectors: iso.iso_cts(vectors, 0.8, "cpu")),
        "tsv_m": lambda _: _quiet(lambda vectors: tsv.compute_and_sum_svd_mem_reduction(vectors, accelerator="cpu")),
        "wudi": lambda steps: _quiet(lambda vectors: wudi.wudi_merging(vectors, "cpu", steps)),
        "svc": lambda _: _calibrated(svc.subspace_consistency_spectral_calibration_accelerated),
    }


def _calibrated(function: Callable[..., Tensor]) -> Merge:
    """Wrap the function of singular value calibration, which takes weights; it is for what task arithmetic merged."""

    def merge(vectors: Sequence[Tensor]) -> Tensor:
        base = torch.zeros_like(vectors[0])
        return function(base, list(vectors), LAMBDA * sum(vectors, base), ALPHA, accelerator="cpu")

    return merge


def _quiet(function: Callable[[list[dict[str, Tensor]]], dict[str, Tensor]]) -> Merge:
    """Wrap a function over state dicts; it reports on the terminal."""

    def merge(vectors: Sequence[Tensor]) -> Tensor:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            return function([{"weight": vector} for vector in vectors])["weight"].detach()

    return merge


def _module(name: str, file: Path) -> Any:
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _stood_in() -> dict[str, dict[str, Any]]:
    class First:
        pass

    class Second:
        pass

    def nothing(*_: object, **__: object) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    return {
        "fusion_bench": {"BaseAlgorithm": First, "BaseModelPool": First, "auto_register_config": lambda found: found},
        "fusion_bench.mixins": {"LightningFabricMixin": Second},
        "fusion_bench.utils": {"timeit_context": nothing},
        "fusion_bench.utils.type": {"StateDictType": dict},
        "fusion_bench.utils.state_dict_arithmetic": {"state_dict_add": nothing, "state_dict_sub": nothing},
    }


@contextlib.contextmanager
def stand_ins(given: Mapping[str, Mapping[str, Any]]) -> Iterator[None]:
    """Let imports from FusionBench find other things, in this context alone.

    Args:
        given: The names of each module; `__path__` where modules in it are those of a folder.
    """
    before = _modules()
    for name, names in given.items():
        module = types.ModuleType(name)
        module.__dict__.update({"__path__": [], **names})
        sys.modules[name] = module
    try:
        yield
    finally:
        for name in _modules():
            del sys.modules[name]
        sys.modules.update(before)


def _modules() -> dict[str, types.ModuleType]:
    return {name: module for name, module in sys.modules.items() if name.split(".")[0] == "fusion_bench"}
