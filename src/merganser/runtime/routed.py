"""A merge with sidecars as one model that chooses a task for each row of a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..engine.plan.sidecars import INDEX_FILE
from ..errors import CheckpointError, NotFoundError, ParameterError, did_you_mean
from ..inference.language_model import Reused, open_model
from ..inference.stored import open_stored
from ..jsonfile import Entry, read_object
from .router import ROUTER_FILE, TaskRouter, fit_router, read_router, store_router

__all__ = ["RoutedModel"]


class RoutedModel:
    """The tasks of a merge with sidecars, restored one at a time, and a router that chooses among them.

    Memory holds two models whatever the number of tasks: the shared one, which the router reads, and that of one task. A
    change of task restores the next model from its parts.

    Args:
        out: A merge with sidecars.
        dtype: Dtype of the weights in memory.
        device: Where the models run.
        stored_router: Whether to read the router that is stored in `out`, if there is one.

    Raises:
        NotFoundError: `out` has no sidecars.
        CheckpointError: It is damaged, or no language model.
    """

    def __init__(
        self,
        out: str | Path,
        *,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        stored_router: bool = True,
    ) -> None:
        self.out = Path(out)
        index = self.out / INDEX_FILE
        if not index.exists():
            raise NotFoundError(f"{out}: has no sidecars, so there are no tasks to choose from")
        entries = Entry(read_object(index), str(index))["tasks"]
        self.tasks: tuple[str, ...] = tuple(entries.each(lambda entry: entry["name"].text()))
        self._device = torch.device(device)
        shared = open_model(open_stored(self.out))
        self.tokenizer = shared.tokenizer.encoder
        self._shared_hash = shared.source.hash
        self._opened = {task: open_model(open_stored(f"{out}#{task}")) for task in self.tasks}
        for task, opened in self._opened.items():
            if opened.tokenizer.hash != shared.tokenizer.hash:
                raise CheckpointError(f"{out}: task {task!r} has another tokenizer, so no text can be routed to it")
        self.shared: Any = shared.load(shared.source.read(), dtype, self._device)
        self._hidden = self.shared.get_input_embeddings().weight.shape[1]
        self._reused = Reused(dtype, self._device)
        self._loaded: tuple[str, Any] | None = None
        self._task: str | None = None
        self.router: TaskRouter | None = None
        self.positions = shared.positions
        if stored_router and (self.out / ROUTER_FILE).exists():
            self.router = read_router(self.out / ROUTER_FILE, self.tasks, self._hidden, self._shared_hash)

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
        """Write the router beside the sidecars, where opening the folder finds it.

        Raises:
            NotFoundError: There is no router, or the folder has no run record.
            OutputError: The file cannot be written, or another one of that name is in its place.
        """
        return store_router(self.out, self._router())

    def choose(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> list[str]:
        """Return the task of each row: `task` if it is set, else what the router chooses.

        Args:
            input_ids: Tokens, shape [rows, length].
            attention_mask: 1 for tokens and 0 for padding, in the same shape; None without padding.

        Raises:
            NotFoundError: No task is set, and there is no router.
        """
        if self._task is not None:
            return [self._task] * len(input_ids)
        router = self._router()
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        weights = mask.unsqueeze(-1).to(self._device, torch.float32)
        hidden = self._hidden_states(input_ids, mask).float()
        return router.choose((hidden * weights).sum(1) / weights.sum(1).clamp_min(1))

    @torch.inference_mode()
    def logits(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Return the logits of every row by the model of its task, shape [rows, length, vocabulary]."""
        return self._by_task(input_ids, attention_mask, lambda model, given: model(**given).logits)

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
        if options.get("return_dict_in_generate") or options.get("num_return_sequences", 1) != 1:
            raise ParameterError("generate of a routed model returns one row of tokens for each row of the batch")
        padding = options.get("pad_token_id", self.shared.generation_config.pad_token_id) or 0
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
        chosen = self.choose(input_ids, mask)
        found: list[Tensor] = [torch.empty(0)] * len(chosen)
        # the loaded task first, as it needs no restoring
        for task in sorted(set(chosen), key=lambda name: (self._loaded is None or name != self._loaded[0], name)):
            rows = [row for row, own in enumerate(chosen) if own == task]
            given = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids) if mask is None else mask}
            results = run(self._model(task), {name: t[rows].to(self._device) for name, t in given.items()})
            for row, result in zip(rows, results, strict=True):
                found[row] = result
        return torch.nn.utils.rnn.pad_sequence(found, batch_first=True, padding_value=padding)

    def _model(self, task: str) -> Any:
        if self._loaded is None or self._loaded[0] != task:
            self._loaded = None  # a failure half-way leaves weights of no task
            opened = self._opened[task]
            self._loaded = task, self._reused.load(opened, opened.source.read())
        return self._loaded[1]

    @torch.inference_mode()
    def _hidden_states(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        inner = self.shared.base_model
        states: Tensor = inner(
            input_ids=input_ids.to(self._device), attention_mask=mask.to(self._device)
        ).last_hidden_state
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
