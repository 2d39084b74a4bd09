"""Which data statistics are computed on: what `merganser calibrate` and the key `data` of a recipe can say."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..errors import DataError

__all__ = ["BATCH_TOKENS", "COUNTED", "DEFAULT_LENGTH", "DEFAULT_SEQUENCES", "LABELS", "Choice", "Dataset"]

DEFAULT_SEQUENCES = 64
DEFAULT_LENGTH = 256
BATCH_TOKENS = 2048
DEFAULT_SPLIT = "train"

COUNTED = ("all", "completions")
"""Which tokens can count."""

LABELS = ("data", "sampled")
"""The tokens whose likelihood can be the loss: the next ones of the text, or ones drawn from the model."""


@dataclass(frozen=True, slots=True)
class Dataset:
    """A data set, opened by the library `datasets`.

    Args:
        name: Id on the Hub, or a local folder.
        subset: Name of its configuration; None for the only one, or its default.
        split: Name of the split.
    """

    name: str
    subset: str | None = None
    split: str = DEFAULT_SPLIT

    def __str__(self) -> str:
        return f"{self.name} ({', '.join(filter(None, [self.subset, self.split]))})"


@dataclass(frozen=True)
class Choice:
    """The part of the data to use.

    Args:
        sequences: Number of sequences; None for 64, or fewer if the data has fewer.
        length: Largest number of tokens of a sequence; longer texts are cut into several. None for 256, or the model's
            context window if it is smaller.
        seed: Seed of the draw of sequences.
        tokens: Which tokens count in statistics: `all`, or only those of `completions` (what follows a prompt, and the
            assistant's messages in a conversation).
    """

    sequences: int | None = None
    length: int | None = None
    seed: int = 0
    tokens: str = "all"

    def check(self) -> None:
        """Check that all values are allowed.

        Raises:
            DataError: A value is not allowed.
        """
        for name in ("sequences", "length", "seed"):
            value = getattr(self, name)
            # compared by type, since True is an int in Python
            if (value is not None or name == "seed") and type(value) is not int:
                raise DataError(f"{name}: must be a whole number, found {value!r}")
        if self.sequences is not None and self.sequences < 1:
            raise DataError(f"sequences: must be at least 1, found {self.sequences}")
        if self.length is not None and self.length < 2:
            raise DataError(f"length: must be at least 2 tokens, found {self.length}")
        if self.seed < 0:
            raise DataError(f"seed: must be at least 0, found {self.seed}")
        if self.tokens not in COUNTED:
            raise DataError(f"tokens: must be {' or '.join(COUNTED)}, found {self.tokens!r}")

    def for_model(self, positions: int | None) -> Choice:
        """Return the same with the length that it means for a model.

        Args:
            positions: Most tokens that the model can see at once; None without such a limit.

        Raises:
            DataError: The length is more than the model can see.
        """
        length = self.length or min(DEFAULT_LENGTH, positions or DEFAULT_LENGTH)
        if positions is not None and length > positions:
            raise DataError(f"length: {length} tokens, but the model sees at most {positions} at once")
        return replace(self, length=length)
