"""`OUT#gates`: a model with gates as what an evaluation opens and scores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ....errors import UnsupportedError
from ....inference.language_model import LanguageModel, Tokenizer, open_model
from ....inference.stored import hash_of, xxh3_of_file
from .belonging import Belonging, open_belonging
from .model import GatedModel
from .stored import read_gates

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["GatedLanguageModel", "open_gated"]


@dataclass(frozen=True)
class GatedLanguageModel(LanguageModel):
    """A model with gates, opened and not yet loaded.

    Args:
        to: What the gates belong to.
    """

    to: Belonging

    def load(self, tensors: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device) -> Any:
        """Return the model of transformers with its gates; `tensors` are not used.

        Raises:
            CheckpointError: As `GatedModel`.
        """
        return GatedModel(self.to, dtype=dtype, device=device).model


def open_gated(
    reference: str, tokenizers: dict[str, Tokenizer] | None = None, *, cache_dir: Path | None = None
) -> GatedLanguageModel:
    """Open a model with gates for an evaluation.

    Raises:
        NotFoundError: There are no gates.
        UnsupportedError: The weights of a token depend on later ones, among them those that are scored.
        CheckpointError: They are damaged.
    """
    to = open_belonging(reference, cache_dir=cache_dir)
    stored = read_gates(to.file)
    if not stored.settings.causal:
        raise UnsupportedError(
            f"{reference}#gates: its weights are means over the whole text (pool 'text'), which shows them the tokens that are "
            "scored; make them with pool 'prefix'"
        )
    shared = open_model(to.shared, tokenizers)
    source = replace(to.shared, reference=f"{reference}#gates", kind="routed", make_hash=lambda: _hash(to), read=dict)
    return GatedLanguageModel(source, shared.config, shared.tokenizer, shared.positions, to=to)


def _hash(to: Belonging) -> str:
    """Return a hash of everything that decides what is computed."""
    sources = {} if to.tasks is None else to.tasks.sources
    return hash_of(
        "gates", xxh3_of_file(to.file), to.shared.hash, *(f"{task} {source.hash}" for task, source in sources.items())
    )
