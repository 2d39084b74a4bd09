"""Call the functions that a merge method is made of, and say where one of a third party fails."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import MergeError, MethodError
from ...method import MergeMethod
from ..fusion.graph import Unfusable

# folders of torch's code and of ours
_LIBRARIES = (str(Path(torch.__file__).parent), str(Path(__file__).parents[2]))


class Undecomposed(MethodError):
    """The decomposition of a matrix did not converge; it never does for one that holds NaN or infinity."""


def call(method: MergeMethod, function: Callable[..., Any], given: Mapping[str, Any]) -> Tensor:
    """Call a function of a merge method with these arguments, by name.

    Raises:
        Undecomposed: A decomposition in it did not converge.
        MethodError: It returns no tensor, or is a function of a third party and raises an error. Errors of our own functions
            are left as they are.
    """
    try:
        result = function(**given)
    except (MergeError, MemoryError, Unfusable):
        raise
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise Undecomposed(f"merge method {method.name}: {error}") from error
    except Exception as error:
        if not method.foreign or "allocate memory" in str(error):
            raise
        told = f"merge method {method.name}: {type(error).__name__}: {error}{_place(error)}"
        raise MethodError(told) from error
    if not isinstance(result, Tensor):
        name = getattr(function, "__name__", "a function")
        raise MethodError(
            f"merge method {method.name}: {name} returned {type(result).__name__}, and must return a tensor"
        )
    return result


def _place(error: BaseException) -> str:
    """Return the author's line that an error comes from; an empty text if there is none."""
    steps = [step for step in traceback.extract_tb(error.__traceback__) if not step.filename.startswith(_LIBRARIES)]
    return f" ({Path(steps[-1].filename).name}, line {steps[-1].lineno})" if steps else ""
