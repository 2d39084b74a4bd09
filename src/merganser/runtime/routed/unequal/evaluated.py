"""`FOLDER#gates` of experts of unequal sizes, in the form that an evaluation opens and scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from ....inference.language_model import LanguageModel, Tokenizer
from ....inference.stored import hash_of, xxh3_of_file
from ..gated.stored import GATES_FILE
from ..tasks import padded, told_tasks
from .experts import Experts, open_experts
from .stored import is_mixture, read_mixture

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from .model import UnequalModel

__all__ = ["UnequalLanguageModel", "has_mixture", "open_unequal"]


@dataclass(frozen=True)
class UnequalLanguageModel(LanguageModel):
    """Experts of unequal sizes, opened and not yet loaded.

    Args:
        to: The experts.
        told: The task of what is measured, by its name; what is not in it has none.
    """

    to: Experts
    told: Mapping[str, str]

    def load(self, tensors: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device) -> UnequalModel:
        """Return the mixture; `tensors` are not used.

        Raises:
            CheckpointError: As `UnequalModel`.
        """
        from .model import UnequalModel

        return UnequalModel(self.to, dtype=dtype, device=device)

    def most(self, loaded: UnequalModel, texts: Sequence[Sequence[int]]) -> list[str]:
        """Return the expert that has the largest weight for each text.

        Args:
            loaded: What `load` returned.
            texts: Tokens of each text.
        """
        return [loaded.tasks[index] for index in loaded.weights(*padded(texts)).argmax(1).tolist()]


def has_mixture(reference: str | Path) -> bool:
    """Return whether a folder holds a mixture of unequal experts.

    Raises:
        CheckpointError: There are gates that cannot be read.
    """
    return is_mixture(Path(reference).expanduser() / GATES_FILE)


def open_unequal(
    reference: str,
    told: Mapping[str, Sequence[str]],
    tokenizers: dict[str, Tokenizer] | None = None,
    *,
    cache_dir: Path | None = None,
) -> UnequalLanguageModel:
    """Open a mixture of unequal experts for an evaluation.

    Args:
        reference: As for `UnequalModel`.
        told: By the name of what is measured, names that its task may have; the first that there is counts.
        tokenizers: As for `open_model`.
        cache_dir: Folder for models from the Hub.

    Raises:
        CheckpointError: The experts or the mixture are damaged.
    """
    to = open_experts(reference, tokenizers, cache_dir=cache_dir)
    read_mixture(to.file)
    first = to.models[0]
    source = replace(
        first.source,
        reference=f"{reference}#gates",
        kind="routed",
        make_hash=lambda: hash_of("mixture of unequal experts", xxh3_of_file(to.file), *to.hashes),
        read=dict,
    )
    return UnequalLanguageModel(
        source, first.config, to.tokenizer, to.positions, to=to, told=told_tasks(told, to.names)
    )
