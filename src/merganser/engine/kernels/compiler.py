"""Compile kernels: `python -m merganser.engine.kernels.compiler` reads orders from standard input until it closes.

Each line is a JSON list of a path and an order (`Kernels` writes it), and is answered with a line when it is done. The
result is PATH.so, or PATH.pt2 if the kernel calls custom operators, or PATH.unsuited if it cannot be exported; nothing
is written if the C++ compiler fails.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...method.registry import get_method
from .compiled import LIBRARY, PACKAGE, UNSUITED, cache_folder
from .kernels import Block, Kernels

if TYPE_CHECKING:
    from torch.export import ExportedProgram

_OPTIONS = {"cpp.threads": 1, "cpp.enable_kernel_profile": False}
# a wrapper that calls this function needs custom operators, which a shared library alone cannot run
_PROXY = b"aoti_torch_proxy_executor_call_function"


def main() -> None:
    """Compile the orders that are read from standard input."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder()))
    torch.set_num_threads(1)
    # compilers print to standard output, too: keep it for answers
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        place, order = json.loads(line)
        compile_kernel(Path(place), json.loads(order))
        answers.write("done\n")
        answers.flush()


def compile_kernel(place: Path, ordered: Mapping[str, Any]) -> None:
    """Compile the kernel of an order."""
    from torch._inductor import aoti_compile_and_package

    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "kernel.pt2"
        try:
            program = _export(ordered)
        except Exception as error:
            # torch.compile can still compile the kernel, or reports why not
            if not isinstance(error, MemoryError):
                _place(place.with_suffix(UNSUITED), repr(error).encode())
            return
        try:
            aoti_compile_and_package(program, package_path=str(package), inductor_configs=dict(_OPTIONS))
        except Exception:
            # the compiler, memory or the disk failed: another run may succeed
            return
        with zipfile.ZipFile(package) as files:
            parts = {name: files.read(name) for name in files.namelist()}
        libraries = [data for name, data in parts.items() if name.endswith(".so")]
        alone = not any(_PROXY in data for name, data in parts.items() if name.endswith(".wrapper.cpp"))
        if alone and len(libraries) == 1:
            _place(place.with_suffix(LIBRARY), libraries[0])
        else:
            _place(place.with_suffix(PACKAGE), package.read_bytes())


def _export(ordered: Mapping[str, Any]) -> ExportedProgram:
    """Trace the kernel."""
    from torch.export import Dim, export

    kernels = Kernels(
        get_method(ordered["method"]),
        ordered["static"],
        getattr(torch, ordered["compute"]),
        getattr(torch, ordered["output"]),
        torch.device("cpu"),
        check_finite=ordered["check_finite"],
    )
    forms = ordered["tensors"]
    # sizes that may vary are 0 in the order; any other size works for tracing
    tensors = [torch.zeros([size or 24 for size in shape], dtype=getattr(torch, dtype)) for dtype, shape in forms]
    empty = torch.zeros(0)
    structure = Block(
        empty if ordered["base"] else None,
        [empty] * ordered["models"],
        dict.fromkeys(ordered["rows"], empty),
        dict.fromkeys(ordered["numbers"], empty),
        dict.fromkeys(ordered["known"], empty),
        empty,
        empty,
    )
    phase = (ordered["phase"][0], ordered["phase"][1], ordered["phase"][2])

    class Flat(torch.nn.Module):
        def forward(self, *tensors: Tensor) -> Sequence[Tensor]:
            return kernels.run_eagerly(phase, structure.rebuild(tensors))

    # all inputs have one shape, and statistics over rows share its first dimension
    names = [Dim(f"n{i}", min=2) for i in range(tensors[0].dim())]
    sizes = [{i: names[i] for i, size in enumerate(shape) if not size} for _, shape in forms]
    return export(Flat(), tuple(tensors), dynamic_shapes=(tuple(sizes),), strict=False)


def _place(path: Path, data: bytes) -> None:
    """Write a file atomically: another process may compile the same kernel."""
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(data)
    Path(file.name).replace(path)


if __name__ == "__main__":
    main()
