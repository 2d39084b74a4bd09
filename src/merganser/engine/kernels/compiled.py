"""Kernels compiled ahead of time: fused once by TorchInductor, cached as shared libraries, loaded within a millisecond.

`torch.compile` spends seconds in every process to look up its cache. A shared library avoids that, and calling it
through ctypes releases the GIL, so that workers run in parallel. The compiler runs in a process of its own (see
`compiler`), so that the first merge takes no more memory than later ones. Kernels with custom operators are called
through torch's own loader, which holds the GIL. Methods of other packages use `torch.compile`, because the cache cannot
notice that their sources changed.
"""

from __future__ import annotations

import ctypes
import hashlib
import inspect
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...method import MergeMethod

LIBRARY = ".so"
PACKAGE = ".pt2"
UNSUITED = ".unsuited"

_lock = threading.Lock()

Function = Callable[[Sequence[Tensor]], Sequence[Tensor]]


def _runners() -> int:
    """Return how many calls may run at a time; an idle one costs no memory."""
    return max(2 * (os.cpu_count() or 1), 16)


class KernelError(RuntimeError):
    """A compiled kernel failed; it reports no reason."""


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
        runners = ctypes.c_size_t(_runners())
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
        # the kernel frees the handles of the inputs; those of the outputs are freed by torch, which takes them over
        # below
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
            raise KernelError(f"a compiled kernel failed with code {code}")


_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_pointer.restype, _pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
_capsule = ctypes.pythonapi.PyCapsule_New
_capsule.restype, _capsule.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]


def compile_ahead(order: Mapping[str, Any]) -> Function | None:
    """Return a kernel on flat sequences of tensors: from the cache, or compiled now.

    Args:
        order: What `compiler` makes the kernel from, as JSON. With the sources, it is the key of the cache.

    Returns:
        None if the kernel cannot be compiled ahead of time.
    """
    text = json.dumps(order, sort_keys=True)
    name = hashlib.sha256(json.dumps([text, _surroundings()]).encode()).hexdigest()[:40]
    place = cache_folder() / "ahead" / name
    with _lock:
        try:
            if not any(place.with_suffix(kind).exists() for kind in (LIBRARY, PACKAGE, UNSUITED)):
                place.parent.mkdir(parents=True, exist_ok=True)
                _compiler.compile(text, place)
            if place.with_suffix(LIBRARY).exists():
                return Library(place.with_suffix(LIBRARY))
            if place.with_suffix(PACKAGE).exists():
                package = str(place.with_suffix(PACKAGE))
                loader = torch._C._aoti.AOTIModelPackageLoader(package, "model", False, _runners(), -1)
                return lambda tensors: loader.boxed_run([*tensors])
        except (OSError, RuntimeError):
            # the cache cannot be written, or holds a library that this machine cannot load: use torch.compile
            pass
    return None


class _Compiler:
    """A process that compiles kernels one at a time. It ends when its stdin closes, also if this process is killed."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._since: float | None = None
        self._seconds = 0.0

    @property
    def busy(self) -> bool:
        """Whether a kernel is being compiled."""
        return self._since is not None

    def compile(self, order: str, place: Path) -> None:
        """Wait until a kernel is compiled; nothing is written if that fails."""
        self._since = time.monotonic()
        try:
            self._ask(order, place)
        finally:
            self._seconds += time.monotonic() - self._since
            self._since = None

    def _ask(self, order: str, place: Path) -> None:
        if self._process is None or self._process.poll() is not None:
            path = os.pathsep.join(filter(None, [str(_PACKAGE.parent), os.environ.get("PYTHONPATH")]))
            self._process = subprocess.Popen(
                [sys.executable, "-m", "merganser.engine.kernels.compiler"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": path},
                # Ctrl-C must reach this process alone
                start_new_session=True,
            )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{json.dumps([str(place), order])}\n".encode())
        self._process.stdin.flush()
        self._process.stdout.readline()

    def end(self) -> float:
        """End the process, if there is one; return the seconds that compiling took since the last end."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()
        seconds, self._seconds = self._seconds, 0.0
        return seconds


_compiler = _Compiler()


def end_compiler() -> float:
    """End the compiler process, and return the seconds that it worked; the next kernel starts a new one."""
    return _compiler.end()


def is_compiling() -> bool:
    """Return whether a kernel is being compiled."""
    return _compiler.busy


def known_sources(method_file: str | None) -> bool:
    """Return whether a method's file is in this package, so that the key of the cache covers its code."""
    return method_file is not None and Path(method_file).is_relative_to(_PACKAGE)


def cache_folder() -> Path:
    """Return the folder for compiled kernels, under the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "merganser" / "compiled"


_PACKAGE = Path(__file__).parents[2]


@cache
def _surroundings() -> list[str]:
    """Return what a kernel depends on besides its order: the version of torch, the processor, and our own sources."""
    sources = hashlib.sha256()
    for part in ("methods", "ops", "method", "engine/kernels"):
        place = _PACKAGE / part
        for file in sorted(place.glob("*.py")) if place.is_dir() else [place]:
            sources.update(file.name.encode() + file.read_bytes())
    return [torch.__version__, torch.backends.cpu.get_cpu_capability(), sources.hexdigest()]


def compiled_ahead(method: MergeMethod) -> bool:
    """Return whether a method's kernels are compiled ahead of time on a CPU."""
    return known_sources(inspect.getsourcefile(method.combine))


def fused(function: Callable[..., Any]) -> Callable[..., Any]:
    """Fuse a kernel: one thread per call, since the engine runs several calls at once, and without the GIL."""
    return torch.compile(
        function,
        dynamic=True,
        fullgraph=True,
        options={"cpp_wrapper": True, "cpp.threads": 1, "cpp.enable_kernel_profile": False},
    )


def prepare_compiler_cache() -> None:
    """Keep compiled kernels under the user's cache folder, unless the user chose another place."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder()))
