"""`OUT#gates`: a model with gates in the form that an evaluation opens and scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ....errors import UnsupportedError
from ....inference.language_model import LanguageModel, Tokenizer, open_model
from ....inference.stored import hash_of, xxh3_of_file
from ..tasks import padded, told_tasks
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
        told: The task of what is measured, by its name; what is not in it has none.
    """

    to: Belonging
    told: Mapping[str, str]

    def load(self, tensors: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device) -> GatedModel:
        """Return the model with its gates; `tensors` are not used.

        Raises:
            CheckpointError: As `GatedModel`.
        """
        found = GatedModel(self.to, dtype=dtype, device=device)
        # the layers have them in the dtype that is scored; nothing is saved from here
        found.parts = {}
        return found

    def most(self, loaded: GatedModel, texts: Sequence[Sequence[int]]) -> list[str]:
        """Return the task that has the largest share of each text, on average over its tokens and all gates.

        Args:
            loaded: What `load` returned.
            texts: Tokens of each text.
        """
        ids, mask = padded(texts)
        shares = loaded.shares(ids.to(loaded.device), mask.to(loaded.device))
        return [loaded.tasks[index] for index in shares.argmax(1).tolist()]


def open_gated(
    reference: str,
    told: Mapping[str, Sequence[str]],
    tokenizers: dict[str, Tokenizer] | None = None,
    *,
    cache_dir: Path | None = None,
) -> GatedLanguageModel:
    """Open a model with gates for an evaluation.

    Args:
        reference: As for `GatedModel`.
        told: By the name of what is measured, names that its task may have; the first that there is counts.
        tokenizers: As for `open_model`.
        cache_dir: Folder for models from the Hub.

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
    own = told_tasks(told, to.names)
    return GatedLanguageModel(source, shared.config, shared.tokenizer, shared.positions, to=to, told=own)


def _hash(to: Belonging) -> str:
    """Return a hash of everything that decides what is computed."""
    sources = {} if to.tasks is None else to.tasks.sources
    # measurements that were stored before the largest share was measured, too, are not used
    return hash_of(
        "gates and their largest share",
        xxh3_of_file(to.file),
        to.shared.hash,
        *(f"{task} {source.hash}" for task, source in sources.items()),
    )
