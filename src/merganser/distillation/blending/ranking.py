"""Rankers: reward models of transformers, and external commands."""

from __future__ import annotations

import inspect
import json
import math
import shlex
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from ...errors import CheckpointError, DataError, NonFiniteError, UnsupportedError
from ...inference.language_model import Tokenizer, open_tokenizer, positions_of
from ...inference.libraries import explained, quiet
from ...inference.stored import Source, open_stored
from .generation import dtype_on
from .prompts import Prompt, rendered

__all__ = ["CommandRanker", "Ranker", "RewardModel", "Scores", "open_reward_model"]

Scores = list[list[float]]
"""For each prompt the score of each of its answers; more is better."""
Advance = Callable[[int], None]

_KIND = "ForSequenceClassification"


class Ranker(Protocol):
    """Scores answers."""

    @property
    def name(self) -> str:
        """What the user calls it."""

    @property
    def hash(self) -> str | None:
        """Hash of what its scores depend on; None if that is not known, so that they are not kept."""

    def scores(self, prompts: Sequence[Prompt], answers: Sequence[Sequence[str]], advance: Advance) -> Scores:
        """Return the scores of some answers to each prompt; `advance` is called with the number of prompts done."""


class RewardModel:
    """A model of transformers that classifies sequences, with one label: the reward of an answer.

    Where its tokenizer has a chat template, it reads the conversation with the answer in it, else the prompt and the answer
    as a pair of texts.

    Args:
        source: The model.
        config: Its config, as transformers reads it.
        tokenizer: Its tokenizer.
        device: Where it runs.
    """

    def __init__(self, source: Source, config: Any, tokenizer: Tokenizer, device: torch.device) -> None:
        self._source, self._config, self._tokenizer, self._device = source, config, tokenizer, device
        self.name = source.reference

    @property
    def hash(self) -> str | None:
        """Hash of its files."""
        return self._source.hash

    def scores(self, prompts: Sequence[Prompt], answers: Sequence[Sequence[str]], advance: Advance) -> Scores:
        """Load the model and return the scores.

        Raises:
            CheckpointError: Its weights do not fit its config.
            DataError: An answer is longer than what it can see.
            NonFiniteError: A score is NaN or infinite.
        """
        model = self._load()
        found: Scores = []
        for number, (prompt, own) in enumerate(zip(prompts, answers, strict=True), 1):
            found.append([self._score(model, prompt, answer) for answer in own])
            advance(number)
        return found

    def _load(self) -> Any:
        from transformers import AutoModelForSequenceClassification

        kind: Any = AutoModelForSequenceClassification._model_mapping[type(self._config)]
        dtype = dtype_on(self._device, getattr(self._config, "dtype", None))
        with explained(CheckpointError, f"{self.name}: transformers cannot load the model"), quiet():
            model, info = kind.from_pretrained(
                None, config=self._config, state_dict=self._source.read(), dtype=dtype, output_loading_info=True
            )
        if info["missing_keys"]:
            raise CheckpointError(
                f"{self.name}: {min(info['missing_keys'])} is missing; {kind.__name__} needs it; fetch the model again"
            )
        return model.eval().to(self._device)

    def _score(self, model: Any, prompt: Prompt, answer: str) -> float:
        given = self._inputs(prompt, answer)
        most, count = positions_of(self._config), given["input_ids"].shape[1]
        if most is not None and count > most:
            raise DataError(
                f"{prompt.where}: with an answer it has {count:,} tokens for {self.name}, which can see {most:,} at once; "
                "give a shorter prompt, or less max_tokens"
            )
        # tokenizers also mark which text of a pair a token is from, and not all models take that
        known = inspect.signature(model.forward).parameters
        inputs = {name: tensor.to(self._device) for name, tensor in given.items() if name in known}
        with torch.inference_mode(), explained(CheckpointError, f"{prompt.where}: {self.name} cannot score an answer"):
            found = float(model(**inputs).logits[0, 0])
        if not math.isfinite(found):
            raise NonFiniteError(f"{prompt.where}: the score of {self.name} is {found}")
        return found

    def _inputs(self, prompt: Prompt, answer: str) -> Any:
        encoder = self._tokenizer.encoder
        if encoder.chat_template is None:
            return encoder(prompt.text, answer, return_tensors="pt", verbose=False)
        messages = [*prompt.messages, {"role": "assistant", "content": answer}]
        text = rendered(self._tokenizer, messages, f"{prompt.where}: {self.name}", answer=False)
        return encoder(text, add_special_tokens=False, return_tensors="pt", verbose=False)


def open_reward_model(reference: str | Path, device: torch.device, *, cache_dir: Path | None = None) -> RewardModel:
    """Open a reward model; no weights are read.

    Args:
        reference: A folder or a Hub id.
        device: Where it will run.
        cache_dir: Folder for models from the Hub.

    Raises:
        CheckpointError: It cannot be read, or is not a reward model.
        UnsupportedError: transformers has no model of its type that classifies sequences.
    """
    source = open_stored(reference, cache_dir=cache_dir)
    names = [str(own) for own in source.config.get("architectures") or []]
    if not any(own.endswith(_KIND) for own in names):
        raise CheckpointError(
            f"{reference}: is not a reward model: config.json says {', '.join(names) or 'nothing of its architecture'}, and one "
            f"that classifies sequences is needed (Llama{_KIND} and the like); any other ranker can be a command"
        )
    config = _config(source)
    if config.num_labels != 1:
        raise CheckpointError(
            f"{reference}: has {config.num_labels} labels, so it is not known which one is the reward; a reward model has one"
        )
    return RewardModel(source, config, open_tokenizer(source), device)


def _config(source: Source) -> Any:
    try:
        from transformers import CONFIG_MAPPING, AutoModelForSequenceClassification
    except ImportError:
        raise UnsupportedError(
            "a reward model needs transformers, which is not installed: pip install 'merganser[transformers]'"
        ) from None
    kind = str(source.config.get("model_type"))
    if kind not in CONFIG_MAPPING:
        raise UnsupportedError(f"{source.reference}: transformers has no models of the type {kind!r}")
    with explained(CheckpointError, f"{source.reference}: transformers cannot load config.json"), quiet():
        config: Any = CONFIG_MAPPING[kind].from_dict(dict(source.config))
    if type(config) not in AutoModelForSequenceClassification._model_mapping:
        raise UnsupportedError(f"{source.reference}: transformers has no {kind} that classifies sequences")
    return config


class CommandRanker:
    """A command that reads answers and prints scores.

    It gets a line of JSON for each prompt, `{"messages": [...], "answers": ["...", ...]}`, and prints a line for each: a list
    with a number for each answer, more being better. It may compare the answers of a prompt in pairs.

    Args:
        command: The command, as in a shell, but without its signs: no pipes, no variables.

    Raises:
        DataError: It is not a command.
    """

    hash = None

    def __init__(self, command: str) -> None:
        self.name = command
        try:
            self._words = shlex.split(command)
        except ValueError as error:
            raise DataError(f"rank command: {command!r}: {str(error).lower()}") from None
        if not self._words:
            raise DataError("rank command: is empty; give a program and its arguments")

    def scores(self, prompts: Sequence[Prompt], answers: Sequence[Sequence[str]], advance: Advance) -> Scores:
        """Run the command and return the scores.

        Raises:
            DataError: It cannot be run, fails, or prints something else.
        """
        given = "".join(
            json.dumps({"messages": [dict(each) for each in prompt.messages], "answers": list(own)}) + "\n"
            for prompt, own in zip(prompts, answers, strict=True)
        )
        try:
            done = subprocess.run(self._words, input=given.encode(), stdout=subprocess.PIPE, check=False)
        except OSError as error:
            reason = error.strerror or str(error)
            raise DataError(f"rank command: {self._words[0]}: cannot be run: {reason.lower()}") from None
        if done.returncode:
            raise DataError(f"rank command: {self.name}: ended with exit code {done.returncode}")
        lines = [line for line in done.stdout.decode(errors="replace").splitlines() if line.strip()]
        if len(lines) != len(answers):
            raise DataError(
                f"rank command: {self.name}: printed {len(lines)} lines for {len(answers)} prompts; it must print one list of "
                "numbers for each line that it reads"
            )
        found = [
            self._line(number, line, len(own)) for number, (line, own) in enumerate(zip(lines, answers, strict=True), 1)
        ]
        advance(len(found))
        return found

    def _line(self, number: int, line: str, count: int) -> list[float]:
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, list) or len(found) != count or not all(map(_is_number, found)):
            raise DataError(
                f"rank command: {self.name}: line {number}: expected a list of {count} finite numbers, got {line[:60]!r}"
            )
        return [float(own) for own in found]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
