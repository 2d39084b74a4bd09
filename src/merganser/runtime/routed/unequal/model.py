"""Experts of unequal sizes as one model: made from text, stored beside them, loaded again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ....errors import NotFoundError, ParameterError, did_you_mean
from ..gated.fitting import Training
from ..rows import token_rows
from ..storing import store_beside
from .experts import Experts, open_experts
from .fitting import ridge_router, train_mixture
from .settings import MixtureSettings
from .stored import StoredMixture, fits, mixture_to_bytes, read_mixture
from .tables import Tables, check_linear, make_tables

if TYPE_CHECKING:
    from .mixture import Mixture

__all__ = ["UnequalModel"]


class UnequalModel:
    """A folder of models of any depth and width, with one tokenizer, whose outputs are mixed for each text.

    Memory holds all of them. Over a prompt the experts run that the weights need; after it, those that have a weight. `model` is
    a model of transformers: it can be called and can generate as any other.

    Args:
        out: A folder that has a folder for each model; or what `open_experts` returned.
        settings: How they are mixed, which then is made with `fit` where it has a router; None reads what is stored.
        dtype: Dtype of the weights in memory.
        device: Where the models run.

    Raises:
        NotFoundError: There are no models; or no mixture is stored, and no settings are given.
        CheckpointError: They are damaged, have other tokenizers, or do not fit what is stored.
        ParameterError: More experts are to have a weight than there are.
        UnsupportedError: The embeddings of an expert cannot be shared.
    """

    def __init__(
        self,
        out: str | Path | Experts,
        settings: MixtureSettings | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> None:
        from .mixture import Mixture

        self._to = out if isinstance(out, Experts) else open_experts(out)
        self.out, self.tasks = self._to.name, self._to.names
        stored = read_mixture(self._to.file) if settings is None else None
        self.settings = settings or (stored.settings if stored else MixtureSettings())
        top = self.settings.top
        if top is not None and top > len(self.tasks):
            raise ParameterError(
                f"{self.out}: top: {top} experts are to have a weight, and there are {len(self.tasks)}"
            )
        self.device = torch.device(device)
        self.tokenizer = self._to.tokenizer.encoder
        self.positions = self._to.positions
        models = [each.load(each.source.read(), dtype, self.device) for each in self._to.models]
        # some have rows without a token behind the last one, in different numbers
        vocabulary = min(each.config.get_text_config().vocab_size for each in models)
        self._width = max(each.get_input_embeddings().weight.shape[1] for each in models)
        tables = self._tables(models, vocabulary, dtype) if self.settings.shared else None
        seen = [each.positions for each in self._to.models]
        self.model: Mixture = Mixture(self.tasks, models, seen, vocabulary, self.settings, tables)
        if stored is not None:
            self._take(stored)

    def _tables(self, models: Sequence[Any], vocabulary: int, dtype: torch.dtype) -> Tables:
        for name, model in zip(self.tasks, models, strict=True):
            check_linear(f"{self.out}: {name}", model, vocabulary)
        return make_tables(models, vocabulary, dtype)

    def _take(self, stored: StoredMixture) -> None:
        """Use what was stored."""
        fits(stored, self.tasks, self._to.hashes, self._shapes(), self._to.file)
        found = {name: tensor.to(self.device) for name, tensor in stored.tensors.items()}
        if self.settings.by == "router":
            self.model.router = found["router/weight"], found["router/bias"]
        if self.model.tables is not None:
            self.model.tables.into = [found[f"into/{task}"] for task in self.tasks]
            self.model.tables.out = [found[f"out/{task}"] for task in self.tasks]

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the tensors that are stored."""
        shapes: dict[str, tuple[int, ...]] = {}
        if self.settings.by == "router":
            shapes |= {"router/weight": (len(self.tasks), self._width), "router/bias": (len(self.tasks),)}
        if (tables := self.model.tables) is not None:
            for kind, matrices in (("into", tables.into), ("out", tables.out)):
                shapes |= {f"{kind}/{task}": tuple(own.shape) for task, own in zip(self.tasks, matrices, strict=True)}
        return shapes

    @property
    def task(self) -> str | None:
        """The expert that has all the weight; None where they are mixed."""
        return None if self.model.told is None else self.tasks[self.model.told]

    @task.setter
    def task(self, task: str | None) -> None:
        self.model.told = None if task is None else self.tasks.index(self._known(task))

    def fit(
        self,
        texts: Mapping[str, Sequence[str]],
        *,
        ridge: float = 0.1,
        training: Training | None = None,
        length: int = 512,
        advance: Callable[[int, int], None] | None = None,
    ) -> list[float]:
        """Make the router from texts of each expert's task, then train it and the projections if that is asked for.

        Args:
            texts: Texts by the name of the expert that they are for; every one has some.
            ridge: Regularisation of the router, relative to the mean square of what it reads.
            training: How router and projections are trained from there.
            length: Most tokens of a text that are read.
            advance: Called with the number of texts or steps done, and of all.

        Returns:
            The loss of training, before each step.

        Raises:
            ParameterError: An expert is unknown, or has no text of two tokens; or there is nothing to train.
        """
        for name in texts:
            self._known(name)
        tokens = [token_rows(self.tokenizer, texts.get(task, ()), length, self.device) for task in self.tasks]
        if empty := [task for task, own in zip(self.tasks, tokens, strict=True) if not own]:
            raise ParameterError(f"a mixture needs text for every expert; that for {empty[0]!r} is empty")
        self.task = None
        if self.settings.by == "router":
            self.model.router = ridge_router(self.model, tokens, ridge, advance)
        if training is None or not training.steps:
            return []
        return train_mixture(self.model, tokens, training, advance)

    def save(self) -> Path:
        """Write router and projections beside the experts, where opening the folder finds them.

        Returns:
            The file.

        Raises:
            NotFoundError: There is no router, and one is needed.
            OutputError: The file cannot be written, or another one of that name is in its place.
        """
        tensors: dict[str, Tensor] = {}
        if self.settings.by == "router":
            if self.model.router is None:
                raise NotFoundError(f"{self.out}: has no router; make one from text with fit()")
            tensors = dict(zip(("router/weight", "router/bias"), self.model.router, strict=True))
        if (tables := self.model.tables) is not None:
            tensors |= {f"into/{task}": each for task, each in zip(self.tasks, tables.into, strict=True)}
            tensors |= {f"out/{task}": each for task, each in zip(self.tasks, tables.out, strict=True)}
        stored = StoredMixture(self.tasks, self._to.hashes, self.settings, tensors)
        store_beside(self._to.file, mixture_to_bytes(stored), self._to.recorded)
        return self._to.file

    def num_parameters(self) -> int:
        """Return the number of weights of all experts."""
        return int(self.model.num_parameters())

    @torch.no_grad()
    def weights(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Return the weights of the experts for each row, float32, shape [rows, experts].

        Args:
            input_ids: Tokens, shape [rows, length].
            attention_mask: 1 for tokens and 0 for padding on either side, in the same shape; None without padding.
        """
        mask = None if attention_mask is None else attention_mask.to(self.device)
        return self.model.weights_so_far(input_ids.to(self.device), mask)[:, -1].cpu()

    @torch.no_grad()
    def logits(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Return the logits of every row, shape [rows, length, vocabulary].

        Those at a token are what would follow if the text up to it was the prompt.
        """
        found: Tensor = self.model(input_ids, attention_mask).logits
        return found

    def generate(self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Any:
        """Return what `generate` of transformers does; the weights of a row are those of its prompt.

        Args:
            input_ids: Prompts, shape [rows, length].
            attention_mask: 1 for tokens and 0 for padding on either side. The result has padding on the left.
            options: Passed on.

        Raises:
            ParameterError: An option is not possible with a mixture.
        """
        return self.model.generate(input_ids, attention_mask=attention_mask, **options)

    def _known(self, task: str) -> str:
        if task not in self.tasks:
            raise ParameterError(
                f"{self.out}: no expert {task!r}.{did_you_mean(task, self.tasks)} Experts: {', '.join(self.tasks)}"
            )
        return task
