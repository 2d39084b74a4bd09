"""Models that answer, by `generate` of transformers, several prompts at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ...errors import CheckpointError, DataError, UnsupportedError
from ...inference.language_model import LanguageModel
from ...inference.libraries import explained, quiet
from ...jsonfile import read_object
from .prompts import Task, number_of

__all__ = ["BATCH_TOKENS", "Answer", "Sampling", "Speaker", "check_speaker", "dtype_on", "grouped"]

BATCH_TOKENS = 4096

_GENERATION = "generation_config.json"
# two prompts of different lengths, to see what padding does to a model
_PROBE = "One, two, three, four, five, six."
_SHORT, _LONG, _STEPS = 3, 8, 2
# of the largest logit: what rounding may change in float32, and in 16 bits
_ROUNDING, _COARSE_ROUNDING = 1e-3, 5e-2


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


def _room(task: Task, sampling: Sampling, positions: int | None) -> int:
    """Return the most tokens that an answer may have."""
    return sampling.max_tokens if positions is None else min(sampling.max_tokens, positions - len(task.ids))


def grouped(tasks: Sequence[Task], sampling: Sampling, positions: int | None, budget: int) -> list[list[int]]:
    """Divide tasks into batches of similar lengths, the longest first.

    Batches depend on the arguments alone, so that a continued run has the same ones: rounding makes what a model computes
    for a prompt depend on its batch.

    Args:
        tasks: The tasks.
        sampling: How answers are drawn.
        positions: Tokens that the model can see; None without a limit.
        budget: Most tokens of a batch, of prompts and all their answers, with padding; a longer task is a batch by itself.

    Returns:
        Indices of tasks. All tasks of a batch have room for answers of the same length.
    """
    rooms = [_room(task, sampling, positions) for task in tasks]
    found: list[list[int]] = []
    for index in sorted(range(len(tasks)), key=lambda i: (-rooms[i], -len(tasks[i].ids), i)):
        if found:
            first, rows = found[-1][0], (len(found[-1]) + 1) * sampling.each
            if rooms[first] == rooms[index] and rows * (len(tasks[first].ids) + rooms[first]) <= budget:
                found[-1].append(index)
                continue
        found.append([index])
    return found


class _Draws:
    """Chooses the next tokens of some rows, each with draws of its own.

    The token with the largest sum of log-probability and Gumbel noise is a draw from the probabilities, so that `generate`
    can take the largest logit: its own draws would depend on the other rows.

    Args:
        sampling: How answers are drawn.
        seeds: Of each row.
        device: Of the logits.
    """

    def __init__(self, sampling: Sampling, seeds: Sequence[int], device: torch.device) -> None:
        import transformers

        library: Any = transformers
        self._temperature = sampling.temperature
        self._likely = library.TopPLogitsWarper(sampling.top_p) if sampling.top_p < 1 else None
        self._generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the logits, changed such that the largest one is the token to take.

        Raises:
            ValueError: A logit is NaN.
        """
        if bool(scores.isnan().any()):
            raise ValueError("its logits are NaN")
        if not self._temperature:
            return scores
        scores = scores.double() / self._temperature
        if self._likely is not None:
            scores = self._likely(input_ids, scores)
        size, kind, place = scores.shape[1], scores.dtype, scores.device
        drawn = [torch.rand(size, generator=own, dtype=kind, device=place) for own in self._generators]
        return scores - torch.stack(drawn).log().neg().log()


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
        self._dtype = dtype_on(device, getattr(opened.config, "dtype", None))
        self._model = opened.load(opened.source.read(), self._dtype, device)
        self._ends = sorted(_ends(opened))
        self.name = opened.source.reference

    def answers(self, tasks: Sequence[Task], sampling: Sampling) -> list[list[Answer]]:
        """Return the answers to some prompts, at once where padding changes nothing for this model.

        The draws depend on the seed and on each prompt alone, not on what else is answered.

        Args:
            tasks: The prompts: a batch of `grouped`.
            sampling: How answers are drawn.

        Raises:
            CheckpointError: The model cannot answer, as its logits are NaN.
        """
        if len({len(task.ids) for task in tasks}) > 1 and not self.pads:
            return [own for task in tasks for own in self.answers([task], sampling)]
        rows = [(task, number) for task in tasks for number in range(sampling.each)]
        seeds = [number_of(sampling.seed, task.number, number) for task, number in rows]
        found = self._generate(
            [task.ids for task, _ in rows],
            _Draws(sampling, seeds, self._device),
            max_new_tokens=_room(tasks[0], sampling, self._opened.positions),
        )
        said = [self._answer(row) for row in found.tolist()]
        return [said[start : start + sampling.each] for start in range(0, len(said), sampling.each)]

    @cached_property
    def pads(self) -> bool:
        """Whether padding a prompt on the left changes nothing but by rounding; found by trying it."""
        ids = self._opened.tokenizer.ids(_PROBE)[:_LONG]
        if self._opened.positions is not None and self._opened.positions < len(ids) + _STEPS:
            return False
        alone, beside = (self._logits(rows) for rows in ([ids[:_SHORT]], [ids[:_SHORT], ids]))
        allowed = _ROUNDING if self._dtype == torch.float32 else _COARSE_ROUNDING
        return all(
            float((own[0] - other[0]).abs().max()) <= allowed * float(own[0].abs().max())
            for own, other in zip(alone, beside, strict=True)
        )

    def _logits(self, rows: Sequence[Sequence[int]]) -> list[Tensor]:
        """Return the logits of the next tokens, step by step."""
        found: list[Tensor] = []

        def look(input_ids: Tensor, scores: Tensor) -> Tensor:
            found.append(scores.clone())
            return scores

        # without an end, so that both runs have all steps
        self._generate(rows, look, max_new_tokens=_STEPS, eos_token_id=None)
        return found

    def _generate(self, rows: Sequence[Sequence[int]], choose: Any, **settings: Any) -> Tensor:
        """Return the tokens that follow some rows, shape [rows, new]; those behind an end mean nothing."""
        import transformers

        library: Any = transformers
        # passed as an argument, it would be combined with the model's own settings, which may have penalties
        self._model.generation_config = library.GenerationConfig(
            do_sample=False,
            pad_token_id=self._ends[0] if self._ends else 0,
            **{"eos_token_id": self._ends or None, **settings},
        )
        width = max(map(len, rows))
        given = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows], device=self._device)
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=self._device)
        with (
            torch.inference_mode(),
            explained(CheckpointError, f"{self.name}: cannot answer"),
            quiet(),
        ):
            found: Tensor = self._model.generate(input_ids=given, attention_mask=mask, logits_processor=[choose])
        return found[:, width:]

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
