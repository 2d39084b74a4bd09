"""Resolve the devices that kernels run on."""

from __future__ import annotations

import torch

from ...errors import UnsupportedError


def resolve_devices(name: str) -> list[torch.device]:
    """Return the devices for a name: one or more, all of one kind.

    Args:
        name: "cpu", "cuda" (every GPU), "cuda:1", "cuda:0,cuda:2", or "auto" (every GPU, else the CPU).

    Raises:
        UnsupportedError: There is no such device.
    """
    n_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        name = "cuda" if n_gpus else "cpu"
    if name == "cuda" and n_gpus:
        return [torch.device("cuda", index) for index in range(n_gpus)]
    return [_one(part.strip(), n_gpus) for part in name.split(",")]


def _one(name: str, n_gpus: int) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UnsupportedError(f"--device {name}: unknown; use auto, cpu, cuda or cuda:0") from None
    if device.type not in ("cpu", "cuda"):
        raise UnsupportedError(f"--device {name}: only cpu and cuda are supported")
    if device.type == "cuda" and (device.index or 0) >= n_gpus:
        raise UnsupportedError(f"--device {name}: no such GPU here; torch sees {n_gpus}")
    return device
