"""Kernels compiled ahead of time: fused once by TorchInductor, kept as shared libraries, loaded within a millisecond.

`torch.compile` needs seconds in every process to find out what it has in its cache. A library needs none of that, and
is called through ctypes, which leaves Python's lock, so that workers run side by side. What cannot be exported (custom
operators, third-party methods whose sources are not known) is left to `torch.compile`.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import logging
import os
import tempfile
import threading
import warnings
import zipfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_OPTIONS = {"cpp.threads": 1, "cpp.enable_kernel_profile": False}
# a wrapper that calls this runs operators which a library alone does not have
_PROXY = "aoti_torch_proxy_executor_call_function"
_lock = threading.Lock()

Function = Callable[[Sequence[Tensor]], Sequence[Tensor]]


class Library:
    """A compiled kernel.

    Args:
        path: The shared library.

    Raises:
        OSError: It cannot be loaded.
    """

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(str(path))
        self._container = ctypes.c_void_p()
        # one instance of the model per caller at a time; they hold nothing
        runners = ctypes.c_size_t(max(2 * (os.cpu_count() or 1), 16))
        self._check(
            self._library.AOTInductorModelContainerCreateWithDevice(
                ctypes.byref(self._container), runners, b"cpu", None
            )
        )
        count = ctypes.c_size_t()
        self._check(self._library.AOTInductorModelContainerGetNumOutputs(self._container, ctypes.byref(count)))
        self._n_outputs = count.value

    def __call__(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Run the kernel on contiguous tensors of the dtypes and ranks that it was compiled for."""
        handles = [
            _pointer(capsule, None) for capsule in torch._C._aoti.unsafe_alloc_void_ptrs_from_tensors([*tensors])
        ]
        inputs = (ctypes.c_void_p * len(handles))(*handles)
        outputs = (ctypes.c_void_p * self._n_outputs)()
        # the kernel takes over the inputs' handles, and leaves those of the outputs to us
        self._check(
            self._library.AOTInductorModelContainerRun(
                self._container,
                inputs,
                ctypes.c_size_t(len(handles)),
                outputs,
                ctypes.c_size_t(self._n_outputs),
                None,
                None,
            )
        )
        return torch._C._aoti.alloc_tensors_by_stealing_from_void_ptrs([_capsule(out, None, None) for out in outputs])

    @staticmethod
    def _check(code: int) -> None:
        if code:
            raise RuntimeError(f"a compiled kernel failed with code {code}")


_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_pointer.restype, _pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
_capsule = ctypes.pythonapi.PyCapsule_New
_capsule.restype, _capsule.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]


def compile_ahead(
    function: Function, identity: Any, inputs: Sequence[Tensor], moving: Sequence[bool]
) -> Function | None:
    """Return a function as a library: from the cache, or compiled now.

    Args:
        function: Takes and returns flat sequences of tensors.
        identity: What the function is made of, as plain values: with `sources` it stands for its code.
        inputs: Tensors to trace it with.
        moving: For each input, whether the sizes of its dimensions vary from call to call.

    Returns:
        None where it cannot be compiled so.
    """
    shapes = [[str(x.dtype), x.dim() if moves else list(x.shape)] for x, moves in zip(inputs, moving, strict=True)]
    key = json.dumps([identity, shapes, _OPTIONS, _surroundings()], sort_keys=True, default=str)
    path = _folder() / f"{hashlib.sha256(key.encode()).hexdigest()[:40]}.so"
    unsuited = path.with_suffix(".unsuited")
    with _lock:
        try:
            if not path.exists() and not unsuited.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                found = _compile(function, inputs, moving)
                _place(*((unsuited, b"") if found is None else (path, found)))
            return None if unsuited.exists() else Library(path)
        except OSError:
            # a cache that cannot be written, or holds what this machine cannot load
            return None


def known_sources(method_file: str | None) -> bool:
    """Say whether a method lies in this package, so that the cache notices when its code changes."""
    return method_file is not None and Path(method_file).is_relative_to(_PACKAGE)


def _compile(function: Function, inputs: Sequence[Tensor], moving: Sequence[bool]) -> bytes | None:
    """Compile; None if that cannot be done, or would need more than the library."""
    from torch._inductor import aoti_compile_and_package
    from torch.export import Dim, export

    class Flat(torch.nn.Module):
        def forward(self, *tensors: Tensor) -> Sequence[Tensor]:
            return function(tensors)

    # of one name, of one size
    names = [Dim(f"n{i}", min=2) for i in range(max(x.dim() for x in inputs))]
    sizes = [dict(enumerate(names[: x.dim()])) if moves else {} for x, moves in zip(inputs, moving, strict=True)]
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        package = Path(folder) / "kernel.pt2"
        level = logging.root.manager.disable
        logging.disable(logging.ERROR)
        try:
            program = export(Flat(), tuple(inputs), dynamic_shapes=(tuple(sizes),), strict=False)
            aoti_compile_and_package(program, package_path=str(package), inductor_configs=dict(_OPTIONS))
        except Exception:
            # whatever the reason is, torch.compile will do it, or give it
            return None
        finally:
            logging.disable(level)
        with zipfile.ZipFile(package) as files:
            parts = {name: files.read(name) for name in files.namelist() if name.endswith((".so", ".wrapper.cpp"))}
    libraries = [data for name, data in parts.items() if name.endswith(".so")]
    wrappers = [data.decode() for name, data in parts.items() if name.endswith(".cpp")]
    if len(libraries) != 1 or any(_PROXY in wrapper for wrapper in wrappers):
        return None
    return libraries[0]


def _place(path: Path, data: bytes) -> None:
    """Write a file that appears complete: other processes compile, too."""
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(data)
    Path(file.name).replace(path)


def _folder() -> Path:
    return cache_folder() / "ahead"


def cache_folder() -> Path:
    """Return the folder for compiled kernels, under the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "merganser" / "compiled"


_PACKAGE = Path(__file__).parents[1]


@cache
def _surroundings() -> list[str]:
    """Return what else the code of a kernel depends on: torch, the processor, and every file that takes part in it."""
    sources = hashlib.sha256()
    for folder in ("methods", "ops", "engine/kernels.py", "engine/ahead.py", "method.py"):
        place = _PACKAGE / folder
        for file in sorted(place.glob("*.py")) if place.is_dir() else [place]:
            sources.update(file.name.encode() + file.read_bytes())
    return [torch.__version__, torch.backends.cpu.get_cpu_capability(), sources.hexdigest()]
