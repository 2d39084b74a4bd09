"""Where kernels run."""

from __future__ import annotations

import os
import shutil

import torch

from ..errors import UnsupportedError


def resolve_device(name: str) -> torch.device:
    """Return the device of that name; "auto" is the first GPU, else the CPU.

    Raises:
        UnsupportedError: There is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UnsupportedError(f"--device {name}: unknown; use auto, cpu, cuda or cuda:0") from None
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise UnsupportedError(f"--device {name}: no such GPU here; torch sees {torch.cuda.device_count()}")
    if device.type not in ("cpu", "cuda"):
        raise UnsupportedError(f"--device {name}: only cpu and cuda are supported")
    return device


def has_compiler(device: torch.device) -> bool:
    """Say whether kernels can be fused: on a CPU this takes a C++ compiler."""
    if device.type != "cpu":
        return True
    return any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "g++", "clang++"))
