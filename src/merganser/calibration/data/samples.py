"""Make samples from data: tokenise, mark the tokens that count, and draw sequences."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from ...errors import DataError
from ...inference.language_model import Tokenizer
from ...statistics.choice import DEFAULT_LENGTH, DEFAULT_SEQUENCES, Choice
from .batches import Sample, Tokens
from .data import Conversation, DataFile, Pair, Record, Text

__all__ = ["choose_samples", "first_samples"]

_MOST_DRAWN = 16
_drawn: dict[tuple[Any, ...], tuple[Sample, ...]] = {}
"""The sequences that were drawn last, by what determines them: hashes of data and tokenizer, and the choice."""


class _Cutter:
    """Cuts records into samples."""

    def __init__(self, tokenizer: Tokenizer, length: int, tokens: str, config: Any) -> None:
        self._tokenizer = tokenizer
        self._length = length
        self._all = tokens == "all"
        self._config = config
        if config.is_encoder_decoder and not self._all:
            # the completion depends on the encoder's result for every token of the prompt
            raise DataError(
                "tokens: of an encoder-decoder every token counts, those of the prompt too; leave completions out"
            )
        plain, whole = tokenizer.ids("a"), tokenizer.encoder("a")["input_ids"]
        self._suffix = tuple(whole[len(tokenizer.prefix) + len(plain) :])
        if len(tokenizer.prefix) + len(self._suffix) >= length:
            raise DataError(
                f"length: {length} leaves no room for text: the tokenizer itself puts "
                f"{len(tokenizer.prefix) + len(self._suffix)} tokens around it"
            )

    def cut(self, record: Record) -> list[Sample]:
        """Return the samples of a record that contain tokens that count."""
        return [sample for sample in self._all_of(record) if _counts(sample)]

    def first(self, record: Record) -> Sample | None:
        """Return the beginning of a record; None if it contains no token that counts."""
        found = self._all_of(record)[:1]
        return next(filter(_counts, found), None)

    def _all_of(self, record: Record) -> list[Sample]:
        if self._config.is_encoder_decoder:
            return [self._translation(record)]
        ids, counted, framed = self._tokens(record)
        return [Sample((tokens,), record.where) for tokens in self._windows(ids, counted, framed=framed)]

    def _windows(self, ids: Sequence[int], counted: Sequence[bool], *, framed: bool) -> list[Tokens]:
        """Cut tokens into windows.

        Args:
            ids: Tokens of a text.
            counted: For each token, whether it counts.
            framed: Whether `ids` already include the tokenizer's special tokens at the start and end.
        """
        before, behind = ((), ()) if framed else (self._tokenizer.prefix, self._suffix)
        room = self._length - len(before) - len(behind)
        return [
            Tokens(
                (*before, *ids[start : start + room], *behind),
                (*[self._all] * len(before), *counted[start : start + room], *[self._all] * len(behind)),
            )
            for start in range(0, len(ids), room)
        ]

    def _tokens(self, record: Record) -> tuple[list[int], list[bool], bool]:
        """Return a record's tokens, which of them count, and whether special tokens at start and end are included."""
        if isinstance(record, Conversation):
            text, spans = self._rendered(record)
        elif isinstance(record, Pair):
            text, spans = record.prompt + record.completion, [(len(record.prompt), None)]
        else:
            text, spans = record.text, []
        if not self._all and isinstance(record, Text):
            raise DataError(
                f"{record.where}: is a plain text and has no completion; give prompt and completion, or messages, "
                "or let all tokens count"
            )
        ids, ends = self._tokenizer.ids_and_ends(text)
        if self._all:
            counted = [True] * len(ids)
        else:
            counted = [any(begin < end <= (stop or len(text)) for begin, stop in spans) for end in ends]
        return ids, counted, isinstance(record, Conversation)

    def _rendered(self, record: Conversation) -> tuple[str, list[tuple[int, int | None]]]:
        """Return a conversation as text, and the ranges of the assistant's messages in it."""
        text = self._render(record, len(record.messages))
        spans: list[tuple[int, int | None]] = []
        if self._all:
            return text, spans
        for number, message in enumerate(record.messages):
            if message["role"] != "assistant":
                continue
            before, through = self._render(record, number, prompt=True), self._render(record, number + 1)
            if not through.startswith(before) or not text.startswith(through):
                raise DataError(
                    f"{record.where}: message {number + 1}: the model's chat template changes earlier messages "
                    "when one is added, so it is not known which tokens are the completion; let all tokens count"
                )
            spans.append((len(before), len(through)))
        return text, spans

    def _render(self, record: Conversation, count: int, *, prompt: bool = False) -> str:
        encoder = self._tokenizer.encoder
        if encoder.chat_template is None:
            raise DataError(
                f"{record.where}: the model's tokenizer has no chat template, which messages need; "
                "give text, or prompt and completion"
            )
        if not count:
            return ""
        try:
            text: str = encoder.apply_chat_template(
                [dict(message) for message in record.messages[:count]], tokenize=False, add_generation_prompt=prompt
            )
        # a chat template is a program by the model's author, and may raise any exception
        except Exception as error:
            raise DataError(f"{record.where}: the model's chat template refuses the messages: {error}") from None
        return text

    def _translation(self, record: Record) -> Sample:
        """Return the sample of an encoder-decoder: the prompt for the encoder, the completion for the decoder."""
        if not isinstance(record, Pair):
            raise DataError(
                f"{record.where}: the model is an encoder-decoder, which needs prompt and completion; "
                f"found {'messages' if isinstance(record, Conversation) else 'a text'}"
            )
        length = self._length
        room = length - len(self._tokenizer.prefix) - len(self._suffix)
        prompt = (*self._tokenizer.prefix, *self._tokenizer.ids(record.prompt)[:room], *self._suffix)
        completion = (self._config.decoder_start_token_id, *self._tokenizer.ids(record.completion)[: length - 1])
        return Sample(tuple(Tokens(ids, (True,) * len(ids)) for ids in (prompt, completion)), record.where)


def _counts(sample: Sample) -> bool:
    return any(any(tokens.counted) for tokens in sample.stacks)


def choose_samples(files: Sequence[DataFile], tokenizer: Tokenizer, config: Any, choice: Choice) -> list[Sample]:
    """Draw the sequences that a model is calibrated on.

    Records are visited in a random order that depends only on the seed. Each gives an equal share of the windows; more
    windows of a record are used only if these are not enough.

    Args:
        files: The data.
        tokenizer: Of the model.
        config: Of the model, as transformers reads it.
        choice: Which part of the data, from `Choice.for_model`.

    Raises:
        DataError: There are fewer sequences than asked for, none has a token that counts, or they do not fit the model.
    """
    choice.check()
    # planning, calibrating and checking what is kept draw the same sequences, and long texts take seconds to tokenise
    given = tuple((file.path, file.hash) for file in files)
    start = getattr(config, "decoder_start_token_id", None)
    key = (given, tokenizer.hash, config.is_encoder_decoder, start, choice)
    if key not in _drawn:
        while len(_drawn) >= _MOST_DRAWN:
            _drawn.pop(next(iter(_drawn)))
        _drawn[key] = _draw(files, tokenizer, config, choice)
    taken = list(_drawn[key])
    _check_vocabulary(taken, config)
    return taken


def _draw(files: Sequence[DataFile], tokenizer: Tokenizer, config: Any, choice: Choice) -> tuple[Sample, ...]:
    length = choice.length or DEFAULT_LENGTH
    cutter = _Cutter(tokenizer, length, choice.tokens, config)
    draw = random.Random(choice.seed)
    records = [record for file in files for record in file.records]
    draw.shuffle(records)
    wanted = choice.sequences or DEFAULT_SEQUENCES
    share = -(-wanted // len(records))
    taken: list[Sample] = []
    left: list[Sample] = []
    for record in records:
        if len(taken) >= wanted:
            break
        windows = cutter.cut(record)
        draw.shuffle(windows)
        taken += windows[:share]
        left += windows[share:]
    draw.shuffle(left)
    taken = [*taken, *left][:wanted]
    if not taken:
        raise DataError(f"{files[0].path}: no token in the data counts; let all tokens count, or give other data")
    if choice.sequences is not None and len(taken) < choice.sequences:
        raise DataError(
            f"sequences: {choice.sequences} of at most {length} tokens are asked for, the data have "
            f"{len(taken)}; ask for fewer, or give more data"
        )
    return tuple(taken)


def first_samples(files: Sequence[DataFile], tokenizer: Tokenizer, config: Any, choice: Choice) -> list[Sample]:
    """Return the beginning of every record, in the order of the data, if a token of it counts.

    Args:
        files: The data.
        tokenizer: Of the model.
        config: Of the model, as transformers reads it.
        choice: From `Choice.for_model`; `sequences` and `seed` are ignored.

    Raises:
        DataError: No token counts, or the records do not fit the model.
    """
    cutter = _Cutter(tokenizer, choice.length or DEFAULT_LENGTH, choice.tokens, config)
    records = [record for file in files for record in file.records]
    taken = [sample for record in records if (sample := cutter.first(record)) is not None]
    if not taken:
        raise DataError(
            f"{files[0].path}: no token counts within the first {choice.length or DEFAULT_LENGTH} of any record; let all "
            "tokens count, or ask for a larger length"
        )
    _check_vocabulary(taken, config)
    return taken


def _check_vocabulary(samples: Sequence[Sample], config: Any) -> None:
    rows = getattr(config.get_text_config(), "vocab_size", None)
    largest, where = max((max(tokens.ids), sample.where) for sample in samples for tokens in sample.stacks)
    if rows is not None and largest >= rows:
        raise DataError(
            f"{where}: the tokenizer does not match the model: it gives token {largest}, and the model has "
            f"{rows} embeddings; use the tokenizer that the model was trained with"
        )
