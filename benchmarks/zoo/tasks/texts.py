"""Items of the local lm-eval tasks, from the held-out texts of a zoo; nothing is fetched.

The texts are those of `~/.cache/merganser/zoo/real`; the environment variable MERGANSER_ZOO names another folder.
"""

import os
from pathlib import Path
from typing import Any

SPLITS = ("tune", "test")
OTHERS = 3


class Rows(list[dict[str, Any]]):
    """All of a data set that lm-eval asks for: rows, and the names of their columns."""

    @property
    def features(self) -> dict[str, None]:
        return dict.fromkeys(self[0])


Items = dict[str, Rows]


def read(domain: str, split: str) -> list[str]:
    """The paragraphs of a held-out text.

    Raises:
        FileNotFoundError: The zoo was not made.
    """
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "merganser" / "zoo" / "real"
    file = Path(os.environ.get("MERGANSER_ZOO") or home) / "texts" / f"{domain}.{split}.txt"
    if not file.exists():
        raise FileNotFoundError(f"{file}: not found. Make the zoo first: python -m benchmarks.zoo real")
    return [part.strip() for part in file.read_text(encoding="utf-8").split("\n\n") if part.strip()]


def lines(domain: str, least: int = 100, **_: Any) -> Items:
    """Each line of at least so many characters, by itself."""
    return {
        split: Rows({"text": line} for part in read(domain, split) for line in part.split("\n") if len(line) >= least)
        for split in SPLITS
    }


def last_words(domain: str, **_: Any) -> Items:
    """Each paragraph without its last word, and that word: LAMBADA's question."""
    items: Items = {}
    for split in SPLITS:
        pairs = [part.rsplit(" ", 1) for part in read(domain, split)]
        items[split] = Rows({"context": pair[0], "word": pair[1]} for pair in pairs if len(pair) == 2)
    return items


def own_answer(domain: str, **_: Any) -> Items:
    """Each question with its answer among those of the three questions behind it."""
    items: Items = {}
    for split in SPLITS:
        pairs = [part.split("\nAnswer:") for part in read(domain, split)]
        pairs = [[side.strip() for side in pair] for pair in pairs if len(pair) == 2]
        items[split] = Rows()
        for i, (question, answer) in enumerate(pairs):
            other = [pairs[(i + step) % len(pairs)][1] for step in range(1, OTHERS + 1)]
            gold = i % (OTHERS + 1)
            items[split].append({"question": question, "choices": [*other[:gold], answer, *other[gold:]], "gold": gold})
    return items


def two_styles(first: str, second: str, **_: Any) -> Items:
    """The prompts that two texts share, with the answers of both."""
    items: Items = {}
    for split in SPLITS:
        sides = [dict(part.split("\nSay it again:") for part in read(domain, split)) for domain in (first, second)]
        items[split] = Rows(
            {"prompt": prompt, "choices": [answer.strip(), sides[1][prompt].strip()]}
            for prompt, answer in sides[0].items()
            if prompt in sides[1]
        )
    return items
