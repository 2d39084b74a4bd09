"""The number formats that models are scored in."""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

import torch

DTYPES = ("float32", "bfloat16", "float16")
_ROWS = 256
_TRIES = 6
_WORTHWHILE = 1.3
_FOR = {"text": "texts", "choices": "questions", "lm-eval": "lm-eval"}


@dataclass(frozen=True, slots=True)
class Formats:
    """A number format for each kind of task.

    Args:
        text: For texts.
        choices: For questions.
        harness: For tasks of lm-eval; None for that of each checkpoint, which lm-eval itself takes by default.
        reason: Why.
    """

    text: str
    choices: str
    harness: str | None
    reason: str

    def of(self, kind: Literal["text", "choices", "lm-eval"], config: Any) -> str:
        """Return the format for a kind of task.

        Args:
            kind: The kind.
            config: Config of the model, as transformers reads it.
        """
        if kind == "lm-eval":
            return self.harness or _own(config)
        return self.text if kind == "text" else self.choices

    def shown(self, kinds: Collection[str]) -> str:
        """Name the formats for these kinds of tasks."""
        used = {"text": self.text, "choices": self.choices, "lm-eval": self.harness or "each model's own"}
        named = {kind: name for kind, name in used.items() if kind in kinds}
        if len({*named.values()}) == 1:
            return next(iter(named.values()))
        return ", ".join(f"{name} for {_FOR[kind]}" for kind, name in named.items())


def given_format(dtype: str) -> Formats:
    """Return one format for everything."""
    return Formats(dtype, dtype, dtype, "as given")


def choose_formats(config: Any, device: torch.device, kinds: Collection[str], kept: str | None = None) -> Formats:
    """Choose bfloat16 for texts where it is faster on this device, and float32 for questions.

    The sums over a text hardly notice the rounding of bfloat16; of single questions, some change their answer.

    Args:
        config: Config of a model, as transformers reads it; it gives the sizes of the products that are timed.
        device: Where models are scored.
        kinds: Kinds of tasks that there are.
        kept: What an evaluation that is continued chose for texts.
    """
    text, reason = "float32", ""
    if kept is not None:
        text, reason = kept, "as in the run that is continued"
    elif "text" in kinds:
        text, reason = _for_texts(config, device)
    exact = "single answers depend on rounding" if "choices" in kinds else ""
    return Formats(text, "float32", None, "; ".join(filter(None, [reason, exact])) or "as lm-eval does")


def _for_texts(config: Any, device: torch.device) -> tuple[str, str]:
    """Time the products that a layer consists of in both formats, which takes less than a second."""
    if device.type != "cpu":
        return "bfloat16", "GPUs are fast in bfloat16"
    text = config.get_text_config()
    width = min(getattr(text, "hidden_size", None) or 1024, 4096)
    inner = min(getattr(text, "intermediate_size", None) or 4 * width, 4 * width)
    ratio = _seconds(width, inner, torch.float32) / _seconds(width, inner, torch.bfloat16)
    if ratio >= _WORTHWHILE:
        return "bfloat16", f"products in bfloat16 take 1/{ratio:.1f} of the time here"
    return "float32", f"products in bfloat16 take {1 / ratio:.1f} times as long here"


def _own(config: Any) -> str:
    """Return the format of a checkpoint by its config."""
    found = getattr(config, "dtype", None) or getattr(config, "torch_dtype", None)
    name = str(found).removeprefix("torch.")
    return name if name in DTYPES else "float32"


def _seconds(width: int, inner: int, dtype: torch.dtype) -> float:
    """Return the least time of a product of an activation and a weight."""
    activation, weight = torch.ones(_ROWS, width, dtype=dtype), torch.ones(inner, width, dtype=dtype)
    times = []
    with torch.inference_mode():
        for _ in range(_TRIES):
            begin = time.perf_counter()
            torch.nn.functional.linear(activation, weight)
            times.append(time.perf_counter() - begin)
    return min(times)
