"""How experts of unequal sizes are mixed, as data."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from ....errors import ParameterError

__all__ = ["KIND", "MixtureSettings"]

KIND = "mergeme"
"""The name of this kind of gates: `merganser route --gates mergeme`."""

_CHOICES = {"by": ("router", "perplexity"), "embeddings": ("own", "shared")}


@dataclass(frozen=True, slots=True)
class MixtureSettings:
    """How experts of unequal sizes are mixed: the output is `sum_k a_k output_k`, with one weight per expert and text.

    Args:
        by: Where the weights come from: a "router", which reads the mean embedding of the text; or the "perplexity" of the
            text under each expert, for which every expert reads it.
        embeddings: "own": every expert keeps its embedding and head, and logits are mixed. "shared": all have the average of
            their embeddings and of their heads, padded with zeros to the largest width, with a linear projection in front
            of each expert's layers and one behind them; what these give is mixed, and the shared head makes logits of it.
        top: Only so many experts, those with the largest scores, have a weight; None for all.

    Raises:
        ParameterError: A setting is not valid.
    """

    by: str = "router"
    embeddings: str = "own"
    top: int | None = 1

    def __post_init__(self) -> None:
        for name, allowed in _CHOICES.items():
            value = getattr(self, name)
            if value not in allowed:
                raise ParameterError(f"{name}: must be {' or '.join(map(repr, allowed))}, found {value!r}")
        if self.top is not None and (not isinstance(self.top, int) or isinstance(self.top, bool) or self.top < 1):
            raise ParameterError(f"top: must be a whole number of at least 1, found {self.top!r}")

    @property
    def shared(self) -> bool:
        """Whether the experts share embedding and head."""
        return self.embeddings == "shared"

    def to_json(self) -> str:
        """Return the settings as text."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> MixtureSettings:
        """Read what `to_json` wrote.

        Raises:
            ParameterError: It does not describe such settings.
        """
        try:
            return cls(**json.loads(text))
        except (ValueError, TypeError) as error:
            raise ParameterError(f"does not describe settings of a mixture: {error}") from None
