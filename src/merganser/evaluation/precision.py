"""The number format that models are scored in."""

from __future__ import annotations

import time
from typing import Any

import torch

DTYPES = ("float32", "bfloat16", "float16")
_ROWS = 256
_WORTHWHILE = 1.3


def choose_dtype(config: Any, device: torch.device) -> tuple[str, str]:
    """Choose bfloat16 where it is faster on this device, float32 elsewhere.

    The products that a layer consists of are timed in both, which takes less than a second.

    Args:
        config: Config of a model, as transformers reads it; it gives the sizes.
        device: Where models are scored.

    Returns:
        The dtype's name, and why.
    """
    if device.type != "cpu":
        return "bfloat16", "bfloat16 is what GPUs are fast in"
    text = config.get_text_config()
    width = min(getattr(text, "hidden_size", None) or 1024, 4096)
    inner = min(getattr(text, "intermediate_size", None) or 4 * width, 4 * width)
    slow, fast = (_seconds(width, inner, dtype) for dtype in (torch.float32, torch.bfloat16))
    ratio = slow / fast
    if ratio >= _WORTHWHILE:
        return "bfloat16", f"its matrix products take 1/{ratio:.1f} of the time of float32 here"
    return "float32", f"matrix products in bfloat16 take {1 / ratio:.1f} times as long here"


def _seconds(width: int, inner: int, dtype: torch.dtype) -> float:
    """Return the least time of a product of an activation and a weight."""
    activation, weight = torch.ones(_ROWS, width, dtype=dtype), torch.ones(inner, width, dtype=dtype)
    times = []
    with torch.inference_mode():
        for _ in range(4):
            begin = time.perf_counter()
            torch.nn.functional.linear(activation, weight)
            times.append(time.perf_counter() - begin)
    return min(times[1:])
