"""The dtypes in which models are scored."""

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
    """A dtype for each kind of task.

    Args:
        text: Dtype for texts.
        choices: Dtype for questions.
        harness: Dtype for tasks of lm-eval; None for the dtype of each checkpoint, which is lm-eval's default.
        reason: Why these dtypes were chosen.
    """

    text: str
    choices: str
    harness: str | None
    reason: str

    def of(self, kind: Literal["text", "choices", "lm-eval"], config: Any) -> str:
        """Return the dtype for a kind of task.

        Args:
            kind: The kind.
            config: Config of the model, as transformers reads it.
        """
        if kind == "lm-eval":
            return self.harness or _own(config)
        return self.text if kind == "text" else self.choices

    def shown(self, kinds: Collection[str]) -> str:
        """Return the dtypes for these kinds of tasks as text."""
        used = {"text": self.text, "choices": self.choices, "lm-eval": self.harness or "each model's own"}
        named = {kind: name for kind, name in used.items() if kind in kinds}
        if len({*named.values()}) == 1:
            return next(iter(named.values()))
        return ", ".join(f"{name} for {_FOR[kind]}" for kind, name in named.items())


def given_format(dtype: str) -> Formats:
    """Return one dtype for all kinds of tasks."""
    return Formats(dtype, dtype, dtype, "as given")


def choose_formats(config: Any, device: torch.device, kinds: Collection[str], kept: str | None = None) -> Formats:
    """Choose bfloat16 for texts if it is faster on this device, and float32 for questions.

    Rounding to bfloat16 hardly changes the sums over a text, but it changes the answers to some single questions.

    Args:
        config: Config of a model, as transformers reads it; it gives the sizes of the products that are timed.
        device: Where models are scored.
        kinds: Kinds of the tasks of this evaluation.
        kept: The dtype for texts of the run that is continued; None for a new run.
    """
    text, reason = "float32", ""
    if kept is not None:
        text, reason = kept, "as in the run that is continued"
    elif "text" in kinds:
        text, reason = _for_texts(config, device)
    exact = "single answers depend on rounding" if "choices" in kinds else ""
    return Formats(text, "float32", None, "; ".join(filter(None, [reason, exact])) or "as lm-eval does")


def _for_texts(config: Any, device: torch.device) -> tuple[str, str]:
    """Choose the dtype by timing the matrix product of a layer in both, which takes less than a second."""
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
    """Return the dtype that the config of a checkpoint declares; float32 if it declares none."""
    declared = getattr(config, "dtype", None) or getattr(config, "torch_dtype", None)
    name = str(declared).removeprefix("torch.")
    return name if name in DTYPES else "float32"


def _seconds(width: int, inner: int, dtype: torch.dtype) -> float:
    """Return the shortest measured time of a product of activations and a weight, in seconds."""
    activation, weight = torch.ones(_ROWS, width, dtype=dtype), torch.ones(inner, width, dtype=dtype)
    times = []
    with torch.inference_mode():
        for _ in range(_TRIES):
            begin = time.perf_counter()
            torch.nn.functional.linear(activation, weight)
            times.append(time.perf_counter() - begin)
    return min(times)
