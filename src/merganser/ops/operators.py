"""Operators of our own: each counts as one operation for whoever records or fuses the operations of a function.

They are defined by the older of torch's two ways: calling an operator of the newer one imports the compiler, 1.5 to 5 s.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_library: Any = torch.library.Library("merganser", "DEF")  # type: ignore[no-untyped-call]


def define(schema: str, compute: Callable[..., Tensor], like: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Define an operator and return it.

    Args:
        schema: Its name, arguments and result, as torch writes them.
        compute: Computes it.
        like: Returns an empty tensor in the shape and dtype of the result, for tensors without values.
    """
    name = schema.partition("(")[0]
    _library.define(schema)
    for device in ("CPU", "CUDA"):
        _library.impl(name, compute, device)
    _library.impl(name, like, "Meta")
    operator: Callable[..., Tensor] = getattr(torch.ops.merganser, name)
    return operator
