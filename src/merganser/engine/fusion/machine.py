"""Make machine code in this process, and find out where that cannot be done."""

from __future__ import annotations

import ctypes
import threading
from functools import cache
from typing import Any

_lock = threading.Lock()


@cache
def why_not() -> str | None:
    """Return why this process cannot make machine code; None if it can."""
    try:
        import llvmlite.binding as llvm
    except (ImportError, OSError) as error:
        return f"llvmlite cannot be imported ({error})"
    try:
        # maps a page, writes to it, and asks for it to become executable
        llvm.check_jit_execution()
    except (OSError, RuntimeError):
        return "this process may not map executable memory"
    features = llvm.get_host_cpu_features()
    if llvm.get_process_triple().startswith("x86_64") and not (features.get("avx2") and features.get("f16c")):
        return "this processor lacks AVX2"
    return None


class Function:
    """Machine code, which stays in memory as long as this object.

    Args:
        text: A module in LLVM's assembly language.
        name: Name of the function in it, which takes two addresses.
        cpu: Processor as LLVM names it; by default this one.
    """

    def __init__(self, text: str, name: str, cpu: str | None = None) -> None:
        # LLVM's contexts are not made for several threads
        with _lock:
            self._engine, address = _compile(text, name, cpu)
        self._function = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p)(address)

    def __call__(self, block: int, fixed: int) -> None:
        """Run it; other Python threads run meanwhile."""
        self._function(block, fixed)


def _compile(text: str, name: str, cpu: str | None) -> tuple[Any, int]:
    import llvmlite.binding as llvm

    machine = _machine(cpu)
    module = llvm.parse_assembly(text)
    module.triple = machine.triple
    module.data_layout = str(machine.target_data)
    engine = llvm.create_mcjit_compiler(module, _machine(cpu))
    engine.finalize_object()
    return engine, engine.get_function_address(name)


def _machine(cpu: str | None) -> Any:
    """Return LLVM's description of a processor; an engine takes it over, so that each needs its own."""
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    target = llvm.Target.from_triple(llvm.get_process_triple())
    features = llvm.get_host_cpu_features().flatten() if cpu is None else ""
    return target.create_target_machine(cpu or llvm.get_host_cpu_name(), features, opt=2, jit=True)
