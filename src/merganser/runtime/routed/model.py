"""Several tasks as one model that chooses one for each row of a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ...errors import CheckpointError, NotFoundError, ParameterError, did_you_mean
from ...inference.language_model import Reused, open_model
from .finding import open_tasks
from .router import TaskRouter, fit_router, mix_of, read_router
from .storing import store_beside
from .subspaces import Subspaces, SubspaceSettings, open_subspaces, strengths_in
from .tasks import Mix, TaskSet, Weights, blended, placed

__all__ = ["RoutedModel"]

_BY = ("router", "perplexity", "subspaces")


class RoutedModel:
    """The tasks of a merge with sidecars, adapters of one base, or fine-tunes of it, and what chooses among them.

    Memory holds two models whatever the number of tasks: the shared one, which the router reads, and that of one task. A
    change of task overwrites the weights that differ, one tensor at a time, with those that the parts give.

    Args:
        out: What `open_tasks` takes: a merge with sidecars, a folder of adapters, or `BASE+FOLDER`; or what it returned.
        dtype: Dtype of the weights in memory.
        device: Where the models run.
        stored_router: Whether to read the router that is stored with the tasks, if there is one.
        by: What chooses a task: the router; the perplexity that the text has under the model of each task; or, as MergeVLA, how
            strongly the hidden states of each task's model lie in the "subspaces" that some weights read. The latter two
            need no router, and run every model on every text.
        blend: Most tasks of a row. With more than 1, its weights are the sum of the tasks' weights in shares: by the router's
            predictions above zero, or by the softmax of the inverse perplexities or of the strengths; rounded to twentieths.
        subspaces: Which weights are read, where subspaces choose.

    Raises:
        NotFoundError: There are no sidecars and no adapters.
        CheckpointError: They are damaged, or no language models.
        ParameterError: A setting is not valid.
    """

    def __init__(
        self,
        out: str | Path | TaskSet,
        *,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        stored_router: bool = True,
        by: Literal["router", "perplexity", "subspaces"] = "router",
        blend: int = 1,
        subspaces: SubspaceSettings | None = None,
    ) -> None:
        if blend < 1:
            raise ParameterError(f"blend: must be a number of tasks, at least 1, found {blend}")
        if by not in _BY:
            raise ParameterError(f"by: must be {', '.join(map(repr, _BY))}, found {by!r}")
        if subspaces is not None and by != "subspaces":
            raise ParameterError(f"subspaces: are for by 'subspaces', found by {by!r}")
        self._set = out if isinstance(out, TaskSet) else open_tasks(out)
        self.out = self._set.name
        self.tasks = self._set.tasks
        self.by = by
        self.blend = blend
        self.device = torch.device(device)
        shared = open_model(self._set.shared)
        self.tokenizer = shared.tokenizer.encoder
        self._shared_hash = shared.source.hash
        self._opened = {task: open_model(source) for task, source in self._set.sources.items()}
        for task, opened in self._opened.items():
            if opened.tokenizer.hash != shared.tokenizer.hash:
                raise CheckpointError(
                    f"{self.out}: task {task!r} has another tokenizer, so no text can be routed to it"
                )
        self.shared: Any = shared.load(shared.source.read(), dtype, self.device)
        self._hidden = self.shared.get_input_embeddings().weight.shape[1]
        self._reused = Reused(dtype, self.device)
        self._loaded: tuple[Mix, Weights, Any] | None = None
        self._task: str | None = None
        self._subspaces: Subspaces | None = open_subspaces(self._set, subspaces) if by == "subspaces" else None
        self.router: TaskRouter | None = None
        self.positions = shared.positions
        if stored_router and self._set.router.exists():
            self.router = read_router(self._set.router, self.tasks, self._hidden, self._shared_hash)

    @property
    def task(self) -> str | None:
        """The task of every row; None where the router chooses."""
        return self._task

    @task.setter
    def task(self, task: str | None) -> None:
        self._task = None if task is None else self._known(task)

    def fit(self, texts: Mapping[str, Sequence[str]], *, ridge: float = 0.1, length: int = 512) -> TaskRouter:
        """Make the router from texts of each task, and use it.

        Args:
            texts: Texts by the name of their task; every task has some.
            ridge: Regularisation, relative to the mean square of the hidden states.
            length: Most tokens of a text that are read.

        Raises:
            ParameterError: A task is unknown, or has no text.
        """
        for name in texts:
            self._known(name)
        states = [torch.cat([self._empty(), *self._states(texts.get(t, ()), length)]) for t in self.tasks]
        self.router = fit_router(self.tasks, states, self._shared_hash, ridge)
        return self.router

    def save_router(self) -> Path:
        """Write the router beside the sidecars or adapters, where opening the folder finds it.

        Returns:
            The file.

        Raises:
            NotFoundError: There is no router.
            OutputError: The file cannot be written, or another one of that name is in its place.
        """
        store_beside(self._set.router, self._router().to_bytes(), self._set.recorded)
        return self._set.router

    def choose(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> list[str]:
        """Return the task of each row: `task` if it is set, else what the router or the perplexity chooses.

        Where tasks are blended, that with the largest share.

        Args:
            input_ids: Tokens, shape [rows, length].
            attention_mask: 1 for tokens and 0 for padding, in the same shape; None without padding.

        Raises:
            NotFoundError: No task is set, and a router is needed and there is none.
            ParameterError: The perplexity is to choose, and a row has fewer than two tokens.
            UnsupportedError: Subspaces are to choose, and a weight that they read is not that of a linear layer.
        """
        return [mix[0][0] for mix in self.mixes(input_ids, attention_mask)]

    def mixes(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> list[Mix]:
        """Return the tasks of each row with their shares, as `choose` does; one task unless tasks are blended."""
        if self._task is not None:
            return [((self._task, 1.0),)] * len(input_ids)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if self.by == "perplexity":
            likely = self._surprise(input_ids, mask).neg().T
            # MergeME: the softmax of the inverse perplexities
            scores = likely.exp().softmax(1)
            return [mix_of(self.tasks, row, self.blend) for row in scores.tolist()]
        if self._subspaces is not None:
            strengths = self._strengths(self._subspaces, input_ids, mask).softmax(1)
            return [mix_of(self.tasks, row, self.blend) for row in strengths.tolist()]
        router = self._router()
        weights = mask.unsqueeze(-1).to(self.device, torch.float32)
        hidden = self._hidden_states(input_ids, mask).float()
        return router.mixes((hidden * weights).sum(1) / weights.sum(1).clamp_min(1), self.blend)

    @torch.inference_mode()
    def logits(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Return the logits of every row by the model of its task, shape [rows, length, vocabulary]."""
        return self._by_task(
            input_ids,
            attention_mask,
            lambda model, given: model(**placed(model, given["input_ids"], given["attention_mask"])).logits,
        )

    @torch.inference_mode()
    def generate(self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Tensor:
        """Return what `generate` of transformers does, every row by the model of its task, chosen from its prompt.

        Args:
            input_ids: Prompts, padded on the left, shape [rows, length].
            attention_mask: 1 for tokens and 0 for padding, in the same shape; None without padding.
            options: Passed on. Rows that end earlier are filled with the padding token, else with 0.

        Raises:
            ParameterError: More than the tokens, or more than one answer per row, is asked for.
        """
        settings = options.get("generation_config") or self.shared.generation_config

        def asked(name: str) -> Any:
            return options.get(name, getattr(settings, name, None))

        if asked("return_dict_in_generate") or (asked("num_return_sequences") or 1) != 1:
            raise ParameterError("generate of a routed model returns one row of tokens for each row of the batch")
        padding = asked("pad_token_id") or 0
        return self._by_task(
            input_ids, attention_mask, lambda model, given: model.generate(**given, **options), padding
        )

    def _by_task(
        self,
        input_ids: Tensor,
        mask: Tensor | None,
        run: Callable[[Any, dict[str, Tensor]], Tensor],
        padding: float = 0,
    ) -> Tensor:
        """Run the rows of each task together, and put the results into the order of the batch."""
        chosen = self.mixes(input_ids, mask)
        found: list[Tensor] = [torch.empty(0)] * len(chosen)
        for mix in sorted(set(chosen), key=self.loaded_first):
            rows = [row for row, own in enumerate(chosen) if own == mix]
            given = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids) if mask is None else mask}
            results = run(self.model(mix), {name: t[rows].to(self.device) for name, t in given.items()})
            for row, result in zip(rows, results, strict=True):
                found[row] = result
        return torch.nn.utils.rnn.pad_sequence(found, batch_first=True, padding_value=padding)

    def model(self, task: str | Mix) -> Any:
        """Return the model of a task, or of several in shares; it is valid until that of others is asked for.

        Raises:
            CheckpointError: A file is damaged, or the tasks cannot be blended.
        """
        mix = ((task, 1.0),) if isinstance(task, str) else task
        for name, _ in mix:
            self._known(name)
        if self._loaded is None or self._loaded[0] != mix:
            parts = [(self._set.weights(name), share) for name, share in mix]
            weights = parts[0][0] if len(parts) == 1 else blended(parts)
            # what both have from the shared model is in memory
            same = frozenset[str]() if self._loaded is None else weights.shared & self._loaded[1].shared
            self._loaded = None  # a failure half-way leaves weights of no task
            self._loaded = mix, weights, self._reused.load(self._opened[mix[0][0]], weights, same)
        return self._loaded[2]

    def loaded_first(self, mix: Mix) -> tuple[bool, Mix]:
        """Return a key by which what is loaded comes first, as it needs no change of weights."""
        return self._loaded is None or mix != self._loaded[0], mix

    def num_parameters(self) -> int:
        """Return the number of weights of the shared model."""
        return int(self.shared.num_parameters())

    @torch.inference_mode()
    def _surprise(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        """Return the mean negative log-likelihood of each row's tokens by each task, float32, shape [tasks, rows]."""
        counted = mask.to(self.device, torch.float32)[:, 1:] * mask.to(self.device, torch.float32)[:, :-1]
        if not bool((counted.sum(1) > 0).all()):
            raise ParameterError("by perplexity: a row has fewer than two tokens, so no model has a perplexity on it")
        found: dict[str, Tensor] = {}
        ids = input_ids.to(self.device)
        for task in sorted(self.tasks, key=lambda name: self.loaded_first(((name, 1.0),))):
            model = self.model(task)
            logits = model(**placed(model, ids, mask.to(self.device))).logits[:, :-1].float()
            nats = torch.nn.functional.cross_entropy(logits.mT, ids[:, 1:], reduction="none")
            found[task] = (nats * counted).sum(1) / counted.sum(1)
        return torch.stack([found[task] for task in self.tasks]).cpu()

    def _strengths(self, subspaces: Subspaces, input_ids: Tensor, mask: Tensor) -> Tensor:
        """Return the score of every task for each row, float32, shape [rows, tasks]."""
        found: dict[str, Tensor] = {}
        ids, kept = input_ids.to(self.device), mask.to(self.device)
        for task in sorted(self.tasks, key=lambda name: self.loaded_first(((name, 1.0),))):
            found[task] = strengths_in(self.model(task), subspaces, task, ids, kept)
        return torch.stack([found[task] for task in self.tasks], 1)

    @torch.inference_mode()
    def _hidden_states(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        inner = self.shared.base_model
        states: Tensor = inner(**placed(inner, input_ids.to(self.device), mask.to(self.device))).last_hidden_state
        return states

    def _states(self, texts: Sequence[str], length: int) -> list[Tensor]:
        ids = [self.tokenizer(text, verbose=False)["input_ids"][:length] for text in texts]
        rows = [torch.tensor([own]) for own in ids if own]
        return [self._hidden_states(row, torch.ones_like(row))[0].float().cpu() for row in rows]

    def _empty(self) -> Tensor:
        return torch.empty(0, self._hidden)

    def _router(self) -> TaskRouter:
        if self.router is None:
            raise NotFoundError(f"{self.out}: has no router; make one from text with fit(), or set the task")
        return self.router

    def _known(self, task: str) -> str:
        if task not in self.tasks:
            raise ParameterError(
                f"{self.out}: no task {task!r}.{did_you_mean(task, self.tasks)} Tasks: {', '.join(self.tasks)}"
            )
        return task
