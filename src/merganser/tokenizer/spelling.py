"""The text that a token stands for, as bytes, whatever way its tokenizer spells it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

__all__ = ["Spelling", "spelling_of"]

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPACE = "▁"


class Spelling:
    """How a tokenizer spells the bytes of a token.

    Args:
        kind: "bytes" (a character per byte, as in GPT-2), "space" (a lower one eighth block for a space, as in
            sentencepiece), "pieces" (a prefix where a word goes on, as in BERT) or "text".
        prefix: The prefix of "pieces".
    """

    def __init__(self, kind: str, prefix: str = "") -> None:
        self.kind = kind
        self._prefix = prefix

    def read(self, token: str) -> bytes | None:
        """Return the bytes of a token; None if it is not spelled this way."""
        if self.kind == "bytes":
            found = [_BYTES.get(letter) for letter in token]
            return None if None in found else bytes(byte for byte in found if byte is not None)
        if self.kind == "space":
            if match := _BYTE.fullmatch(token):
                return bytes([int(match[1], 16)])
            return token.replace(_SPACE, " ").encode(errors="replace")
        if self.kind == "pieces":
            inner = token.startswith(self._prefix) and len(token) > len(self._prefix)
            return (token.removeprefix(self._prefix) if inner else f" {token}").encode(errors="replace")
        return token.encode(errors="replace")

    def write(self, data: bytes) -> str | None:
        """Return the spelling of bytes as one text that the tokenizer's model can cut; None if it has none."""
        if self.kind == "bytes":
            return "".join(_LETTERS[byte] for byte in data)
        try:
            text = data.decode()
        except UnicodeDecodeError:
            return None
        if self.kind == "space":
            return text.replace(" ", _SPACE)
        # models of WordPiece cut words, and mark what is not the first piece of one themselves
        return text.strip() if self.kind == "pieces" else text


def spelling_of(document: Mapping[str, Any]) -> Spelling:
    """Find out how a tokenizer.json spells tokens.

    Args:
        document: Its contents.
    """
    model = document.get("model") or {}
    types = set(_types(document.get("pre_tokenizer"))) | set(_types(document.get("decoder")))
    if "ByteLevel" in types:
        return Spelling("bytes")
    if model.get("type") == "WordPiece" or "WordPiece" in types:
        return Spelling("pieces", model.get("continuing_subword_prefix") or "##")
    if types & {"Metaspace", "ByteFallback"} or model.get("type") == "Unigram" or model.get("byte_fallback"):
        return Spelling("space")
    return Spelling("text")


def _types(part: Any) -> list[str]:
    """Return the types of a part of the file, and of the parts that it is a sequence of."""
    if not isinstance(part, dict):
        return []
    inner = [*(part.get("pretokenizers") or ()), *(part.get("decoders") or ())]
    return [str(part.get("type")), *(name for each in inner for name in _types(each))]


def _byte_letters() -> dict[int, str]:
    """Return GPT-2's letter for each byte: printable ones stand for themselves, the others follow from 256 on."""
    own = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    letters = {byte: chr(byte) for byte in own}
    others = [byte for byte in range(256) if byte not in letters]
    return letters | {byte: chr(256 + place) for place, byte in enumerate(others)}


_LETTERS = _byte_letters()
_BYTES = {letter: byte for byte, letter in _LETTERS.items()}
