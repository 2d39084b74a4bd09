"""Arguments of lm-eval that a user passes on to it: how it makes prompts, and how it asks the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import yaml

from ...errors import TaskError, did_you_mean

__all__ = ["NO_ARGUMENTS", "HarnessArguments", "parse_arguments"]

Kind = Literal["flag", "count", "text", "flag or text", "mapping"]

_EVALUATION: dict[str, Kind] = {
    "num_fewshot": "count",
    "apply_chat_template": "flag or text",
    "fewshot_as_multiturn": "flag",
    "system_instruction": "text",
    "gen_kwargs": "mapping",
    "fewshot_random_seed": "count",
    "random_seed": "count",
    "numpy_random_seed": "count",
    "torch_random_seed": "count",
    "confirm_run_unsafe_code": "flag",
}
"""Arguments of `lm_eval.simple_evaluate`."""

_MODEL: dict[str, Kind] = {
    "max_length": "count",
    "truncation": "flag",
    "add_bos_token": "flag",
    "prefix_token_id": "count",
    "softmax_dtype": "text",
    "logits_cache": "flag",
    "think_end_token": "text",
    "enable_thinking": "flag",
    "chat_template_args": "mapping",
}
"""Arguments of lm-eval's model on transformers, `HFLM`, that have an effect on a model that is loaded."""

_OWN = {
    "tasks": "--tasks",
    "limit": "--limit",
    "device": "--device",
    "dtype": "--dtype",
    "batch_size": "--batch-tokens",
    "max_batch_size": "--batch-tokens",
    "model": "the models that are measured",
    "model_args": "the models that are measured; give its arguments one by one",
    "pretrained": "the models that are measured",
    "tokenizer": "the models that are measured",
    "samples": "--limit, and by the halves of a search",
}
"""Arguments of lm-eval that something else here says."""

_SAID: dict[Kind, str] = {
    "flag": "true or false",
    "count": "a whole number from 0",
    "text": "a text",
    "flag or text": "true, false or a text",
    "mapping": "a mapping, such as {max_gen_toks: 64}",
}


@dataclass(frozen=True)
class HarnessArguments:
    """Arguments that are passed on to lm-eval.

    Args:
        evaluation: Those of `lm_eval.simple_evaluate`, by name.
        model: Those of its model on transformers, by name.
    """

    evaluation: Mapping[str, Any] = field(default_factory=dict)
    model: Mapping[str, Any] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.evaluation or self.model)

    def to_json(self) -> dict[str, Any]:
        """Return them as plain data, by name."""
        return {**self.evaluation, **self.model}


NO_ARGUMENTS = HarnessArguments()


def parse_arguments(given: Mapping[str, Any] | Sequence[str]) -> HarnessArguments:
    """Read arguments of lm-eval.

    Args:
        given: By name, or texts `NAME=VALUE`.

    Raises:
        TaskError: An argument is not known, is said elsewhere, is given twice, or has a wrong value.
    """
    pairs = [*given.items()] if isinstance(given, Mapping) else [_split(text) for text in given]
    known = _EVALUATION | _MODEL
    evaluation: dict[str, Any] = {}
    model: dict[str, Any] = {}
    for name, value in pairs:
        if name in _OWN:
            raise TaskError(f"lm-eval: {name} is given by {_OWN[name]}")
        if name not in known:
            raise TaskError(f"lm-eval: {name!r} is not passed on.{did_you_mean(name, known)} Known: {', '.join(known)}")
        if name in evaluation or name in model:
            raise TaskError(f"lm-eval: {name} is given twice")
        kind = known[name]
        found = _read(value, kind) if isinstance(value, str) else value
        if not _fits(found, kind):
            raise TaskError(f"lm-eval: {name}: expected {_SAID[kind]}, got {value!r}")
        (evaluation if name in _EVALUATION else model)[name] = found
    return HarnessArguments(evaluation, model)


def _split(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name.strip():
        raise TaskError(f"lm-eval: expected NAME=VALUE, got {text!r}")
    return name.strip(), value


def _read(text: str, kind: Kind) -> Any:
    """Return the value that a text stands for; the text itself where it stands for none of this kind."""
    if kind == "text":
        return text
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    return found if _fits(found, kind) else text


def _fits(value: Any, kind: Kind) -> bool:
    if kind == "flag":
        return isinstance(value, bool)
    if kind == "count":
        return isinstance(value, int) and not isinstance(value, bool) and value >= 0
    if kind == "mapping":
        return isinstance(value, dict) and all(isinstance(name, str) for name in value)
    return isinstance(value, str) or (kind == "flag or text" and isinstance(value, bool))
