"""Prompts to be answered, and how each model reads them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import xxhash

from ...calibration.data.data import Conversation, make_record
from ...errors import CheckpointError, DataError, did_you_mean
from ...inference.language_model import Tokenizer
from ...jsonfile import MAX_JSON_BYTES, os_reason, parse_object, read_file

__all__ = ["MADE", "Message", "Prompt", "Task", "number_of", "read_prompts", "rendered", "tokens_of"]

Message = Mapping[str, str]

_KEYS = ("prompt", "messages")
MADE = ("answers", "chosen", "fused")
"""Keys that are added to a prompt."""
_FORMS = "each line must hold one object with a prompt, or with messages"


@dataclass(frozen=True)
class Prompt:
    """A prompt.

    Args:
        messages: What was said so far, each message with `role` and `content`; the last one is to be answered.
        plain: The text, if the line has a `prompt`; a model without a chat template continues it. None for messages.
        where: File and line, for messages to the user.
        given: The whole line.
    """

    messages: tuple[Message, ...]
    plain: str | None
    where: str
    given: Mapping[str, Any]

    @cached_property
    def number(self) -> int:
        """A hash of what is to be answered, from 0 to 2^63 - 1; it does not depend on the file."""
        return number_of(self.plain, self.messages)

    @property
    def text(self) -> str:
        """What is to be answered, without a template."""
        if len(self.messages) == 1:
            return self.messages[0]["content"]
        return "\n\n".join(f"{own['role']}: {own['content']}" for own in self.messages)


@dataclass(frozen=True)
class Task:
    """What a model is to answer.

    Args:
        number: A hash of it.
        ids: Its tokens.
        shown: Number of answers in it, if it is for a fuser.
    """

    number: int
    ids: Sequence[int]
    shown: int = 0


def number_of(*parts: Any) -> int:
    """Return a hash of some plain data, from 0 to 2^63 - 1."""
    return xxhash.xxh3_64_intdigest(json.dumps(parts, ensure_ascii=False).encode()) >> 1


def read_prompts(file: str | Path) -> tuple[Prompt, ...]:
    """Read a file with one prompt per line.

    Args:
        file: Lines of JSON, each with a `prompt` (a text) or `messages` (objects with `role` and `content`); other keys are
            kept as they are.

    Raises:
        DataError: The file is missing, empty or malformed.
    """
    name, path = str(file), Path(file).expanduser()
    try:
        data = read_file(path, MAX_JSON_BYTES)
    except FileNotFoundError:
        raise DataError(f"{name}: there is no such file") from None
    except OSError as error:
        raise DataError(f"{name}: cannot be read: {os_reason(error)}") from None
    found = tuple(_lines(name, data))
    if not found:
        raise DataError(f"{name}: has no prompts; {_FORMS}")
    return found


def _lines(name: str, data: bytes) -> Iterator[Prompt]:
    # not splitlines: JSON strings may contain U+2028 and other Unicode line ends
    for number, line in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if line.strip():
            yield _prompt(f"{name}:{number}", line)


def _prompt(where: str, line: bytes) -> Prompt:
    try:
        found = parse_object(line, where)
    except CheckpointError as error:
        raise DataError(f"{error}; {_FORMS}") from None
    given = [key for key in _KEYS if key in found]
    if len(given) != 1:
        near = next((f" Is {key!r} meant to be{hint[13:]}" for key in found if (hint := did_you_mean(key, _KEYS))), "")
        what = "has both prompt and messages" if given else f"has neither prompt nor messages.{near}"
        raise DataError(f"{where}: {what}; {_FORMS}. Found: {', '.join(map(repr, found)) or 'nothing'}")
    for key in MADE:
        if key in found:
            raise DataError(f"{where}: has {key!r}, which is written here; leave it out, or give it another name")
    if "messages" in found:
        record = make_record(where, {"messages": found["messages"]})
        assert isinstance(record, Conversation)
        if record.messages[-1]["role"] == "assistant":
            raise DataError(f"{where}: the last message is the assistant's, so there is nothing to answer")
        return Prompt(record.messages, None, where, found)
    text = found["prompt"]
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"{where}: prompt must be a text that is not empty, found {str(text)[:60]!r}")
    make_record(where, {"text": text})
    return Prompt(({"role": "user", "content": text},), text, where, found)


def rendered(tokenizer: Tokenizer, messages: Sequence[Message], where: str, *, answer: bool) -> str:
    """Return a conversation in a model's chat template.

    Args:
        tokenizer: Of the model.
        messages: The conversation.
        where: File and line, for messages to the user.
        answer: Whether the beginning of the model's answer is added.

    Raises:
        DataError: The template refuses the messages.
    """
    try:
        text: str = tokenizer.encoder.apply_chat_template(
            [dict(own) for own in messages], tokenize=False, add_generation_prompt=answer
        )
    # a chat template is a program by the model's author, and may raise any exception
    except Exception as error:
        raise DataError(f"{where}: the model's chat template refuses the messages: {error}") from None
    return text


def tokens_of(tokenizer: Tokenizer, prompt: Prompt, name: str) -> list[int]:
    """Return the tokens that a model answers: in its chat template, or the plain text if it has none.

    Raises:
        DataError: The model has no chat template, which messages need, or it refuses them.
    """
    if tokenizer.encoder.chat_template is not None:
        # the template writes the token that begins a text itself
        return tokenizer.ids(rendered(tokenizer, prompt.messages, f"{prompt.where}: {name}", answer=True))
    if prompt.plain is None:
        raise DataError(
            f"{prompt.where}: {name} has no chat template, which messages need; give a prompt, which it continues"
        )
    found = [*tokenizer.prefix, *tokenizer.ids(prompt.plain)]
    return found
