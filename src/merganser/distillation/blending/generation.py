"""Models that answer, by `generate` of transformers, one prompt at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ...errors import CheckpointError, DataError, UnsupportedError
from ...inference.language_model import LanguageModel
from ...inference.libraries import explained, quiet
from ...jsonfile import read_object
from .prompts import number_of

__all__ = ["Answer", "Sampling", "Speaker", "check_speaker", "dtype_on"]

_GENERATION = "generation_config.json"


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn.

    Args:
        each: Answers of each model to each prompt.
        max_tokens: Most tokens of an answer.
        temperature: Divides the logits; 0 takes the likeliest token.
        top_p: Only the likeliest tokens are drawn, with this probability together.
        seed: Seed of the draws.

    Raises:
        DataError: A number is out of range.
    """

    each: int = 1
    max_tokens: int = 256
    temperature: float = 0.7
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("each", 1), ("max_tokens", 1), ("seed", 0)):
            if getattr(self, name) < least:
                raise DataError(f"{name}: must be at least {least}, got {getattr(self, name)}")
        # written so that NaN is refused, too
        if not 0 <= self.temperature <= 100:
            raise DataError(f"temperature: must be from 0 to 100, got {self.temperature:g}")
        if not 0 < self.top_p <= 1:
            raise DataError(f"top_p: must be above 0, and at most 1, got {self.top_p:g}")
        if self.each > 1 and self.temperature == 0:
            raise DataError(
                f"temperature: with 0 all {self.each} answers of a model are the same; give a temperature, or each: 1"
            )

    def to_json(self) -> dict[str, Any]:
        """Return the settings as plain data."""
        return asdict(self)


@dataclass(frozen=True)
class Answer:
    """An answer.

    Args:
        text: The text.
        ended: Whether the model ended it; False if it was cut after `max_tokens`, or at the end of the model's context.
    """

    text: str
    ended: bool


def check_speaker(opened: LanguageModel) -> None:
    """Refuse models that do not continue a text.

    Raises:
        UnsupportedError: It is an encoder-decoder.
    """
    if opened.config.is_encoder_decoder:
        raise UnsupportedError(
            f"{opened.source.reference}: is an encoder-decoder; only models that continue a text can answer here"
        )


def dtype_on(device: torch.device, declared: Any) -> torch.dtype:
    """Return float32 on a CPU, and the dtype that a model's config declares elsewhere."""
    name = str(declared).removeprefix("torch.")
    if device.type == "cpu" or name not in ("bfloat16", "float16"):
        return torch.float32
    found: torch.dtype = getattr(torch, name)
    return found


class Speaker:
    """A loaded model that answers.

    Args:
        opened: The model.
        device: Where it runs.

    Raises:
        CheckpointError: Its weights do not fit its config.
    """

    def __init__(self, opened: LanguageModel, device: torch.device) -> None:
        self._opened, self._device = opened, device
        dtype = dtype_on(device, getattr(opened.config, "dtype", None))
        self._model = opened.load(opened.source.read(), dtype, device)
        self._ends = sorted(_ends(opened))

    def answers(self, ids: Sequence[int], number: int, sampling: Sampling) -> list[Answer]:
        """Return the answers to a prompt.

        The draws depend on the seed and on the prompt alone, not on what was answered before.

        Args:
            ids: Its tokens; there is room for one more.
            number: A hash of the prompt.
            sampling: How answers are drawn.

        Raises:
            CheckpointError: The model cannot answer, as its logits are NaN.
        """
        import transformers

        room = sampling.max_tokens
        if self._opened.positions is not None:
            room = min(room, self._opened.positions - len(ids))
        drawn: dict[str, Any] = {"do_sample": False}
        if sampling.temperature > 0:
            drawn = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
        # as an argument it would be mixed with the model's own, which may have penalties and other values
        library: Any = transformers
        self._model.generation_config = library.GenerationConfig(
            max_new_tokens=room,
            num_return_sequences=sampling.each,
            eos_token_id=self._ends or None,
            pad_token_id=self._ends[0] if self._ends else 0,
            **drawn,
        )
        given = torch.tensor([list(ids)], device=self._device)
        devices = [self._device] if self._device.type == "cuda" else []
        with (
            torch.inference_mode(),
            torch.random.fork_rng(devices=devices),
            explained(CheckpointError, f"{self._opened.source.reference}: cannot answer"),
            quiet(),
        ):
            torch.manual_seed(number_of(sampling.seed, number))
            rows = self._model.generate(input_ids=given, attention_mask=torch.ones_like(given))
        return [self._answer(row[len(ids) :].tolist()) for row in rows]

    def _answer(self, ids: list[int]) -> Answer:
        end = next((place for place, own in enumerate(ids) if own in self._ends), None)
        encoder = self._opened.tokenizer.encoder
        text: str = encoder.decode(ids[:end], skip_special_tokens=True)
        # white space at the start of a continuation belongs to the text, at that of an answer it does not
        return Answer(text.rstrip() if encoder.chat_template is None else text.strip(), end is not None)


def _ends(opened: LanguageModel) -> set[int]:
    """Return the tokens that end an answer: as the tokenizer, the config and generation_config.json say, together."""
    given: list[Any] = [opened.tokenizer.encoder.eos_token_id, getattr(opened.config, "eos_token_id", None)]
    if _GENERATION in opened.source.files:
        given.append(read_object(opened.source.files[_GENERATION]).get("eos_token_id"))
    found = {own for each in given for own in (each if isinstance(each, list) else [each])}
    return {own for own in found if isinstance(own, int) and not isinstance(own, bool) and own >= 0}
