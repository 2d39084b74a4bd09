"""The fuser: a model that is shown a request and the best answers to it, and writes another."""

from __future__ import annotations

from collections.abc import Sequence

from ...inference.language_model import LanguageModel
from .prompts import Prompt, Task, number_of, tokens_of

__all__ = ["Fuser"]

_TASK = (
    "Below are a request and several answers to it. Write one answer that is better than each of them: keep what is right, "
    "leave out what is wrong. Reply with that answer alone."
)


class Fuser:
    """A fuser.

    Args:
        opened: The model.
        top: Number of answers that it is shown.
    """

    def __init__(self, opened: LanguageModel, top: int) -> None:
        self.opened, self._top = opened, top

    def task(self, prompt: Prompt, answers: Sequence[str]) -> Task | None:
        """Return what the fuser is to answer: with fewer answers if they do not fit; None if not even one does.

        Args:
            prompt: The prompt.
            answers: The answers to it, the best first.
        """
        for count in range(min(self._top, len(answers)), 0, -1):
            text = fuser_text(prompt.text, answers[:count])
            asked = Prompt(({"role": "user", "content": text},), f"{text}\n\nBetter answer:\n", prompt.where, {})
            ids = tokens_of(self.opened.tokenizer, asked, self.opened.source.reference)
            if self.opened.positions is None or len(ids) < self.opened.positions:
                return Task(number_of("fused", text), ids, count)
        return None


def fuser_text(request: str, answers: Sequence[str]) -> str:
    """Return the text that a fuser answers."""
    listed = [f"Answer {number}:\n{own}" for number, own in enumerate(answers, 1)]
    return "\n\n".join([_TASK, f"Request:\n{request}", *listed])
