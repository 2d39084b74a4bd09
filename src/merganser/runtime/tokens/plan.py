"""Which tokens a layer merges, and how many."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from ...errors import ParameterError, did_you_mean
from ..options import in_range, part
from .pitome import pitome
from .tome import tome

__all__ = ["Choose", "Plan", "chosen"]

_METHODS = {"tome": tome, "pitome": pitome}
_ELSEWHERE = {
    "tempme": "it joins the frames of a video: use merge_frames(model, frames=...)",
    "aim": "it merges what an encoder returns: use aim(features)",
    "holitom": "it merges what an encoder returns for the frames of a video: use holitom(features)",
}

Choose = Callable[[Tensor, int, int, float], tuple[Tensor, Tensor]]


def chosen(method: str) -> Choose:
    """Return the function that chooses which tokens go, and into which.

    Raises:
        ParameterError: There is none of this name.
    """
    if method in _ELSEWHERE:
        raise ParameterError(f"method: {method!r} does not merge within each image; {_ELSEWHERE[method]}")
    if method not in _METHODS:
        raise ParameterError(f"method: {method!r} merges no tokens.{did_you_mean(method, _METHODS)} tome and pitome do")
    return _METHODS[method]


class Plan:
    """How many tokens go in each layer: `r` of them, or all but the share `ratio`."""

    def __init__(self, r: int | Sequence[int] | None, ratio: float | None, layers: int):
        if (r is None) == (ratio is None):
            raise ParameterError(
                "r, ratio: give one of the two, the tokens that go or the share that stays in each layer"
            )
        if ratio is not None:
            in_range("ratio", ratio, 0, 1, above=True)
        numbers = [] if r is None else list(r) if isinstance(r, Sequence) else [r] * layers
        if any(not isinstance(each, int) or isinstance(each, bool) or each < 0 for each in numbers):
            raise ParameterError(f"r: must be a whole number of at least 0, or one per layer, not {r!r}")
        if ratio is None and len(numbers) != layers:
            raise ParameterError(f"r: the encoder has {layers} layers, and {len(numbers)} numbers were given")
        self.numbers, self.ratio = numbers, ratio

    def number(self, layer: int, tokens: int) -> int:
        """Return how many of a layer's tokens go."""
        return self.numbers[layer] if self.ratio is None else tokens - part(tokens, self.ratio, up=True)
