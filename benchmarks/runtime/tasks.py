"""Tasks of RULER's kinds (Hsieh et al. 2024), generated from a text and a seed: what must be found in a long prompt.

RULER's two tasks of questions and answers need data sets, and are not here; its variants of one kind (other haystacks,
other needles) are one task. Prompts are meant for models that continue a text, without instructions.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

NOUNS = [
    *("house", "boat", "garden", "bridge", "castle", "forest", "kitchen", "library", "mountain", "office", "palace"),
    *("river", "school", "station", "theatre", "tower", "village", "window", "workshop", "harbour", "market", "museum"),
    *("hospital", "airport", "factory", "church", "prison", "farm", "hotel", "stable"),
]
CODES = "abcdefghijklmnopqrstuvwxyz"

Encode = Callable[[str], list[int]]


@dataclass(frozen=True)
class Item:
    """One prompt and what its continuation must contain.

    Attributes:
        task: Name of the task.
        tokens: The prompt.
        wanted: Strings, all of which should come.
        count: Number of tokens that a model gets to say them.
    """

    task: str
    tokens: list[int]
    wanted: tuple[str, ...]
    count: int

    def score(self, said: str) -> float:
        """Return the share of the strings that were said, as RULER counts."""
        return sum(each in said for each in self.wanted) / len(self.wanted)


class Maker:
    """Makes the prompts of one length out of a text.

    Args:
        encode: Returns the tokens of a string, without tokens for its beginning or end.
        haystack: Tokens of a text, at least `length` of them.
        length: Tokens of a prompt.
        seed: Equal seeds give equal prompts.
        start: Tokens that begin every prompt, as the model is used to.
    """

    def __init__(self, encode: Encode, haystack: list[int], length: int, seed: int, start: Sequence[int] = ()):
        if len(haystack) < length:
            raise ValueError(f"the text has {len(haystack)} tokens, and prompts need {length}")
        self.encode, self.haystack, self.length, self.random = encode, haystack, length, random.Random(seed)
        self.start = [*start]

    def place(self, task: str, pieces: list[tuple[float, str]], question: str, wanted: list[str]) -> Item:
        """Put pieces at depths (0 is the beginning, 1 just before the question) of a part of the text."""
        inner = [(depth, self.encode(piece)) for depth, piece in sorted(pieces)]
        end = self.encode(question)
        free = self.length - len(self.start) - len(end) - sum(len(piece) for _, piece in inner)
        if free < 0:
            raise ValueError(f"{task}: {self.length} tokens have no room for the task; it takes {self.length - free}")
        first = self.random.randrange(len(self.haystack) - free + 1)
        text, tokens, done = self.haystack[first : first + free], [*self.start], 0
        for depth, piece in inner:
            at = round(depth * free)
            tokens += [*text[done:at], *piece]
            done = at
        tokens += [*text[done:], *end]
        return Item(task, tokens, tuple(wanted), len(self.encode(" " + ", ".join(wanted))) + 2)

    def number(self) -> str:
        """Return a number of four digits."""
        return str(self.random.randrange(1000, 10000))

    def needle(self, depth: float) -> Item:
        """One number, at a depth from 0 to 1."""
        key, value = self.random.choice(NOUNS), self.number()
        return self.place("needle", [(depth, _fact(key, value))], f" The secret number of the {key} is", [value])

    def single(self) -> Item:
        """One number, anywhere."""
        item = self.needle(self.random.random())
        return Item("single", item.tokens, item.wanted, item.count)

    def multikey(self) -> Item:
        """Four numbers of four things, one of which is asked for."""
        keys = self.random.sample(NOUNS, 4)
        values = [self.number() for _ in keys]
        pieces = [(self.random.random(), _fact(*each)) for each in zip(keys, values, strict=True)]
        return self.place("multikey", pieces, f" The secret number of the {keys[0]} is", values[:1])

    def multivalue(self) -> Item:
        """Three numbers of one thing, all of which are asked for."""
        key, values = self.random.choice(NOUNS), [self.number() for _ in range(3)]
        pieces = [(self.random.random(), _fact(key, value)) for value in values]
        return self.place("multivalue", pieces, f" The three secret numbers of the {key} are", values)

    def multiquery(self) -> Item:
        """Four numbers of four things, two of which are asked for."""
        keys = self.random.sample(NOUNS, 4)
        values = [self.number() for _ in keys]
        pieces = [(self.random.random(), _fact(*each)) for each in zip(keys, values, strict=True)]
        question = f" The secret numbers of the {keys[0]} and of the {keys[1]} are"
        return self.place("multiquery", pieces, question, values[:2])

    def tracking(self) -> Item:
        """A chain of assignments: which variables hold the number."""
        names = ["".join(self.random.sample(CODES, 3)).upper() for _ in range(6)]
        chains, pieces = (names[:3], names[3:]), []
        numbers = [self.number(), self.number()]
        for chain, number in zip(chains, numbers, strict=True):
            depths = sorted(self.random.random() for _ in chain)
            for depth, name, value in zip(depths, chain, [number, *chain], strict=False):
                pieces.append((depth, f"\nVAR {name} = {value if value == number else 'VAR ' + value}\n"))
        question = f"\nThe three variables that hold the number {numbers[0]} are: VAR"
        return self.place("tracking", pieces, question, chains[0])

    def common(self) -> Item:
        """A list of words, three of which come more often than all others."""
        words = self.random.sample(NOUNS, 11)
        listed = words[:3] * 9 + words[3:] * 2
        self.random.shuffle(listed)
        question = "\nList of words: " + " ".join(listed) + "\nThe three words that come most often in the list are:"
        return self.place("common", [], question, words[:3])

    def frequent(self) -> Item:
        """A text of coded words, of which the k-th is there about 1 / k**2 as often as the first: the three first."""
        words = ["".join(self.random.choices(CODES, k=5)) for _ in range(8)]
        coded = [word for place, word in enumerate(words, 1) for _ in range(max(1, round(24 / place**2)))]
        self.random.shuffle(coded)
        question = "\nCoded text: " + " ".join(coded) + "\nThe three words that come most often in the coded text are:"
        return self.place("frequent", [], question, words[:3])


TASKS: dict[str, Callable[[Maker], Item]] = {
    "single": Maker.single,
    "multikey": Maker.multikey,
    "multivalue": Maker.multivalue,
    "multiquery": Maker.multiquery,
    "tracking": Maker.tracking,
    "common": Maker.common,
    "frequent": Maker.frequent,
}


def _fact(key: str, value: str) -> str:
    return f" The secret number of the {key} is {value}. Remember it."


def beginning(tokenizer: Any) -> list[int]:
    """Return the tokens that a tokenizer puts before every text: none, or the one that begins a text."""
    first = tokenizer("a", verbose=False).input_ids[:1]
    return first if first == [tokenizer.bos_token_id] else []


def encoder(tokenizer: Any) -> Encode:
    """Return what encodes a string without special tokens."""
    return lambda text: list(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
