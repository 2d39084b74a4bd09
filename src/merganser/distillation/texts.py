"""The texts that several models read: cut once, by the tokenizer of the one that is taught."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import xxhash

from ..calibration.data.data import Conversation, DataFile, Pair, Record, Text
from ..calibration.data.samples import choose_samples
from ..inference.language_model import Tokenizer
from ..statistics import Choice
from .token_bytes import TokenBytes

__all__ = ["contents", "cut_texts", "plain", "record_number", "trimmed"]


def record_number(record: Record) -> int:
    """Return a hash of what a record holds, from -2^63 to 2^63 - 1; it does not depend on its file."""
    number = xxhash.xxh3_64_intdigest(json.dumps(contents(record), ensure_ascii=False).encode())
    return number - (1 << 64) if number >= 1 << 63 else number


def contents(record: Record) -> dict[str, Any]:
    """Return what a record holds, as a line of a .jsonl file does."""
    if isinstance(record, Text):
        return {"text": record.text}
    if isinstance(record, Pair):
        return {"prompt": record.prompt, "completion": record.completion}
    assert isinstance(record, Conversation)
    return {"messages": [dict(message) for message in record.messages]}


def cut_texts(
    files: Sequence[DataFile], tokenizer: Tokenizer, token_bytes: TokenBytes, config: Any, choice: Choice
) -> Iterator[str]:
    """Draw sequences as calibration does, and yield each as a line of a .jsonl file.

    A text is cut into pieces of as many tokens as the sequences may have, at whole characters; prompts with completions,
    and conversations, are taken as they are.

    Args:
        files: The data.
        tokenizer: Of the model that is taught.
        token_bytes: Bytes of its tokens.
        config: Of the model, as transformers reads it.
        choice: From `Choice.for_model`.

    Raises:
        DataError: There are fewer sequences than asked for, or they do not fit the model.
    """
    records = {record.where: record for file in files for record in file.records}
    taken: set[str] = set()
    for sample in choose_samples(files, tokenizer, config, choice):
        record = records[sample.where]
        if isinstance(record, Text):
            text = trimmed(token_bytes.text_and_ends(sample.stacks[0].ids)[0])[0].decode()
            if text.strip():
                yield json.dumps({"text": text})
        elif record.where not in taken:
            taken.add(record.where)
            yield json.dumps(contents(record))


def plain(line: str) -> str:
    """Return all text of a line that `cut_texts` made, without a chat template."""
    found = json.loads(line)
    if "messages" in found:
        return "\n".join(message["content"] for message in found["messages"])
    return "".join(found.values())


def trimmed(data: bytes) -> tuple[bytes, int]:
    """Return bytes without the parts of letters at their start and end, and the number of bytes left out at the start."""
    start = 0
    while start < min(4, len(data)) and data[start] & 0xC0 == 0x80:
        start += 1
    text = data[start:].decode(errors="ignore")
    return text.encode(), start
