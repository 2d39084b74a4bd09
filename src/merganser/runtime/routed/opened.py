"""`OUT#auto` and the like: a routed model in the form that an evaluation opens and scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ...errors import NotFoundError
from ...inference.language_model import LanguageModel, Tokenizer, open_model
from ...inference.stored import hash_of, xxh3_of_file
from ...jsonfile import exists
from .finding import open_tasks
from .gated.evaluated import open_gated
from .model import RoutedModel
from .subspaces import SubspaceSettings
from .tasks import Mix, TaskSet, padded, told_tasks
from .unequal.evaluated import has_mixture, open_unequal

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = ["CHOICES", "SHARED", "RoutedLanguageModel", "open_routed", "routed_name"]

CHOICES = ("auto", "blend", "gates", "perplexity", "subspaces", "told")
"""How a task is chosen: by the router, one or two in shares; by the perplexity of each task's model; by the subspaces that its value
projections read; or by the name of what is measured. With gates, parts of all are added in shares, or outputs of
experts of unequal sizes are, and that with the largest share counts as chosen."""

_BY: Mapping[str, Literal["perplexity", "subspaces"]] = {"perplexity": "perplexity", "subspaces": "subspaces"}

SHARED = "(shared)"
"""What is said to be chosen where no task is: the shared model."""


def routed_name(reference: Any) -> tuple[str, str] | None:
    """Split `OUT#auto` and what else is in `CHOICES`; None for anything else, and where a task has this name."""
    text = str(reference)
    out, sign, choice = text.rpartition("#")
    if not (sign and out and choice in CHOICES) or exists(text):
        return None
    folder = Path(out).expanduser()
    if (folder / "sidecars" / choice).is_dir() or (folder / choice / "adapter_config.json").exists():
        return None
    return out, choice


@dataclass(frozen=True)
class RoutedLanguageModel(LanguageModel):
    """A set of tasks, one of which is chosen for each text, opened and not yet loaded.

    Args:
        tasks: The tasks.
        choice: How one is chosen, one of `CHOICES`.
        told: The task of what is measured, by its name; what is not in it has none.
    """

    tasks: TaskSet
    choice: str
    told: Mapping[str, str]

    def load(self, tensors: Mapping[str, Tensor], dtype: torch.dtype, device: torch.device) -> RoutedModel:
        """Return the routed model; `tensors` are not used.

        Raises:
            CheckpointError: As `RoutedModel`.
        """
        blend = 2 if self.choice == "blend" else 1
        return RoutedModel(self.tasks, dtype=dtype, device=device, by=_BY.get(self.choice, "router"), blend=blend)

    def mixes(self, loaded: RoutedModel, measured: str, texts: Sequence[Sequence[int]]) -> list[Mix]:
        """Return the tasks of each text with their shares; `SHARED` where there is none.

        Args:
            loaded: What `load` returned.
            measured: Name of what is measured.
            texts: Tokens of each text.
        """
        if self.choice == "told":
            return [((self.told.get(measured, SHARED), 1.0),)] * len(texts)
        return loaded.mixes(*padded(texts))


def open_routed(
    reference: str,
    choice: str,
    told: Mapping[str, Sequence[str]],
    tokenizers: dict[str, Tokenizer] | None = None,
    *,
    cache_dir: Path | None = None,
) -> LanguageModel:
    """Open a routed model, or one with gates, for an evaluation.

    Args:
        reference: As for `open_tasks`.
        choice: How a task is chosen, one of `CHOICES`.
        told: By the name of what is measured, names that its task may have; the first that there is counts.
        tokenizers: As for `open_model`.
        cache_dir: Folder for models from the Hub.

    Raises:
        NotFoundError: There are no tasks, or no router or gates and they are needed.
        CheckpointError: They are damaged.
    """
    if choice == "gates":
        if has_mixture(reference):
            return open_unequal(reference, told, tokenizers, cache_dir=cache_dir)
        return open_gated(reference, told, tokenizers, cache_dir=cache_dir)
    tasks = open_tasks(reference, cache_dir=cache_dir)
    if choice in ("auto", "blend") and not tasks.router.exists():
        raise NotFoundError(
            f"{reference}#{choice}: has no router ({tasks.router}); make one: merganser route {reference} --data TASK=FILE ..."
        )
    shared = open_model(tasks.shared, tokenizers)
    own = told_tasks(told, tasks.tasks)
    source = replace(
        tasks.shared,
        reference=f"{reference}#{choice}",
        kind="routed",
        make_hash=lambda: _hash(tasks, choice, own),
        read=dict,
    )
    return RoutedLanguageModel(
        source, shared.config, shared.tokenizer, shared.positions, tasks=tasks, choice=choice, told=own
    )


def _hash(tasks: TaskSet, choice: str, told: Mapping[str, str]) -> str:
    """Return a hash of everything that decides what is computed: all tasks, and the router or what is told."""
    models = [tasks.shared.hash, *(f"{task} {source.hash}" for task, source in tasks.sources.items())]
    router = xxh3_of_file(tasks.router) if choice in ("auto", "blend") else ""
    named = [f"{name}={task}" for name, task in sorted(told.items())] if choice == "told" else []
    read = [repr(SubspaceSettings())] if choice == "subspaces" else []
    return hash_of(choice, router, *models, *named, *read)
