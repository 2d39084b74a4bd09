"""The bytes of text that each token of a tokenizer stands for."""

from __future__ import annotations

import json
from collections.abc import Sequence

from ..errors import UnsupportedError
from ..inference.language_model import Tokenizer
from ..tokenizer.spelling import spelling_of
from .vocabulary import Vocabulary

__all__ = ["TokenBytes"]

# letters of one, two and three bytes, two spaces, a line break
_PROBE = "The  naïve cat\nsaw 東京, didn't it?"


class TokenBytes:
    """The bytes of each token of a tokenizer; none for special tokens, which are no text.

    The bytes are those that the tokens spell, which is the text after the tokenizer's own normalisation. A tokenizer of
    sentencepiece puts a space before a text; that space is part of the first token's bytes.

    Args:
        tokenizer: The tokenizer.
        reference: The model's name for the user.

    Raises:
        UnsupportedError: Its tokens do not spell the text, as those of WordPiece, which leave spaces out.
    """

    def __init__(self, tokenizer: Tokenizer, reference: str) -> None:
        backend = getattr(tokenizer.encoder, "backend_tokenizer", None)
        if backend is None:
            raise UnsupportedError(
                f"{reference}: its tokenizer is not one of the library tokenizers ({type(tokenizer.encoder).__name__}), "
                "so it is not known which bytes a token stands for; give the model a tokenizer.json"
            )
        document = json.loads(backend.to_str())
        spelling = spelling_of(document)
        self._bytes: dict[int, bytes | None] = {
            number: spelling.read(token) for token, number in backend.get_vocab(with_added_tokens=False).items()
        }
        for added in document.get("added_tokens") or ():
            self._bytes[added["id"]] = b"" if added["special"] else added["content"].encode()
        self._special = {own["content"]: own["id"] for own in document.get("added_tokens") or () if own["special"]}
        roles = {"bos": tokenizer.encoder.bos_token_id, "eos": tokenizer.encoder.eos_token_id}
        self._roles = {role: number for role, number in roles.items() if number is not None}
        self._reference = reference
        found = b"".join(self._of(number) or b"" for number in tokenizer.ids(_PROBE))
        if found not in (_PROBE.encode(), b" " + _PROBE.encode()):
            raise UnsupportedError(
                f"{reference}: the tokens of its tokenizer do not spell the text: {_PROBE!r} became "
                f"{found.decode(errors='replace')!r}; where a token ends in the text is then not known"
            )

    def vocabulary(self) -> Vocabulary:
        """Return the tokens, up to the last one that is known."""
        count = 1 + max((number for number, token in self._bytes.items() if token is not None), default=-1)
        return Vocabulary(tuple(map(self._of, range(count))), self._special, self._roles)

    def text_and_ends(self, ids: Sequence[int]) -> tuple[bytes, list[int]]:
        """Return the bytes of some tokens, and for each the number of bytes up to its end.

        Raises:
            UnsupportedError: It is not known which bytes a token stands for.
        """
        text, ends = bytearray(), []
        for number in ids:
            own = self._of(number)
            if own is None:
                raise UnsupportedError(
                    f"{self._reference}: token {number} is in the text, and it is not known which bytes it stands for"
                )
            text += own
            ends.append(len(text))
        return bytes(text), ends

    def _of(self, number: int) -> bytes | None:
        return self._bytes.get(number)
