"""A model in which gates weight what several tasks add to its linear layers, or what their modules give."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ....anatomy import infer_anatomy
from ....errors import NotFoundError, ParameterError, UnsupportedError, did_you_mean
from ....inference.language_model import open_model
from ..rows import token_rows
from ..storing import store_beside
from ..tasks import TaskSet, placed
from .belonging import Belonging, open_belonging
from .experts import collect_experts, find_modules
from .fitting import Training, ridge_gates, train_gates
from .layers import GatedLayers
from .modules import ExpertModules
from .parts import Part, collect_parts
from .routing import Routing
from .settings import GateSettings, settings_of
from .stored import StoredGates, fits, gates_to_bytes, read_gates

__all__ = ["GatedModel"]


class GatedModel:
    """A shared model and the parts of tasks, or their attention and MLPs, which gates weight for every token.

    Memory holds the shared model and the parts or modules. `model` is a model of transformers with hooks in its layers: it can
    be called and can generate as any other, with batches that are padded on either side.

    Args:
        out: A merge with sidecars, a folder of adapters, `BASE+FOLDER` of adapters or of fine-tunes, or a folder with gates
            that hold the parts; or what `open_tasks` returned.
        gates: The name of a kind of gates or their settings, which then are made with `fit`; None reads those that are
            stored.
        dtype: Dtype of the weights in memory.
        device: Where the model runs.

    Raises:
        NotFoundError: There are no tasks, or no gates and none are named.
        CheckpointError: They are damaged, or do not fit each other.
        UnsupportedError: No linear layer differs between the tasks; or whole modules are to be mixed in a type of model that
            was not tried.
    """

    def __init__(
        self,
        out: str | Path | TaskSet | Belonging,
        gates: str | GateSettings | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> None:
        self._to = out if isinstance(out, Belonging) else open_belonging(out)
        self.out, self.tasks = self._to.name, self._to.names
        stored = read_gates(self._to.file) if gates is None else None
        if stored is not None:
            self.settings = stored.settings
        else:
            self.settings = gates if isinstance(gates, GateSettings) else settings_of(str(gates))
        self.device = torch.device(device)
        shared = open_model(self._to.shared)
        self.tokenizer = shared.tokenizer.encoder
        self.positions = shared.positions
        tensors = shared.source.read()
        self.model: Any = shared.load(tensors, dtype, self.device)
        self._task: str | None = None
        self.unused = 0
        self.parts: Mapping[str, Part] = {}
        self.layers: Routing
        if self.settings.mix == "outputs":
            self.layers = self._modules(tensors)
        else:
            self.parts = self._parts(stored, tensors)
            moved = {layer: part.to(dtype, self.device) for layer, part in self.parts.items()}
            self.layers = GatedLayers(self.model, moved, self.settings, len(self.tasks))
        del tensors
        if stored is not None:
            fits(stored, self.tasks, shared.source.hash, self.layers.keys(), self._to.file)
            self.layers.gates = stored.gates
        elif not self.layers.keys():
            self.layers.gates = self.layers.zeros()

    def _parts(self, stored: StoredGates | None, shared: Mapping[str, Tensor]) -> Mapping[str, Part]:
        if stored is not None and stored.parts is not None:
            return stored.parts
        names = list(_linear_layers(self.model, self.settings.where))
        found, self.unused = collect_parts(self._tasks(), shared, names, self.settings)
        if not found:
            raise UnsupportedError(
                f"{self.out}: no task changes a linear layer that may have parts (where: {self.settings.where})"
            )
        return found

    def _modules(self, shared: Mapping[str, Tensor]) -> ExpertModules:
        modules = find_modules(self.model, self.settings.where)
        changes, self.unused = collect_experts(self._tasks(), shared, modules)
        if not changes:
            raise UnsupportedError(
                f"{self.out}: no task changes an attention or MLP that may have experts (where: {self.settings.where})"
            )
        return ExpertModules(self.model, changes, self.settings, len(self.tasks))

    def _tasks(self) -> TaskSet:
        if self._to.tasks is None:
            raise NotFoundError(f"{self.out}: the tasks are not there, only gates that were made of them")
        return self._to.tasks

    @property
    def task(self) -> str | None:
        """The task that has all the weight; None where the gates decide."""
        return self._task

    @task.setter
    def task(self, task: str | None) -> None:
        if task is None:
            self.layers.ask()
        elif task in self.tasks:
            self.layers.tell(self.tasks.index(task))
        else:
            raise ParameterError(
                f"{self.out}: no task {task!r}.{did_you_mean(task, self.tasks)} Tasks: {', '.join(self.tasks)}"
            )
        self._task = task

    @property
    def part_bytes(self) -> int:
        """Bytes of the parts, as they are stored; or of the experts, as they are in memory."""
        if isinstance(self.layers, ExpertModules):
            return self.layers.nbytes
        return sum(part.nbytes for part in self.parts.values())

    def fit(
        self,
        texts: Mapping[str, Sequence[str]],
        *,
        ridge: float = 0.1,
        training: Training | None = None,
        length: int = 512,
        advance: Callable[[int, int], None] | None = None,
    ) -> list[float]:
        """Make the gates from texts of each task: by ridge regression, then by training if that is asked for.

        Args:
            texts: Texts by the name of their task; every task has some.
            ridge: Regularisation, relative to the mean square of what the gates read.
            training: How the gates are trained from there; those that read outputs begin with weights that are alike.
            length: Most tokens of a text that are read.
            advance: Called with the number of texts or steps done, and of all.

        Returns:
            What became less in training, before each step.

        Raises:
            ParameterError: A task is unknown, or has no text of two tokens.
            UnsupportedError: The gates read outputs, and are not to be trained.
        """
        for name in texts:
            if name not in self.tasks:
                raise ParameterError(
                    f"{self.out}: no task {name!r}.{did_you_mean(name, self.tasks)} Tasks: {', '.join(self.tasks)}"
                )
        tokens = [token_rows(self.tokenizer, texts.get(task, ()), length, self.device) for task in self.tasks]
        if empty := [task for task, own in zip(self.tasks, tokens, strict=True) if not own]:
            raise ParameterError(f"gates need text of every task; that of {empty[0]!r} is empty")
        trained = training is not None and training.steps > 0
        if trained and not self.layers.keys():
            raise UnsupportedError("gates that read a projection (smile) have nothing that could be trained")
        if self.settings.reads == "outputs" and trained:
            self.layers.gates = self.layers.zeros()
        else:
            self.layers.gates = ridge_gates(self.model, self.layers, tokens, ridge, advance)
        self.task = None
        if training is None or not trained:
            return []
        return train_gates(self.model, self.layers, tokens, training, advance)

    def save(self) -> Path:
        """Write the gates beside the tasks, with the parts where those are smaller than what the tasks have.

        Returns:
            The file.

        Raises:
            NotFoundError: There are no gates.
            OutputError: The file cannot be written, or another one of that name is in its place.
        """
        if self.layers.gates is None:
            raise NotFoundError(f"{self.out}: has no gates; make them from text with fit()")
        parts = self.parts if self.settings.reduced else None
        shared = self._to.shared
        stored = StoredGates(self.tasks, self.settings, self.layers.gates, parts, shared.hash, shared.reference)
        store_beside(self._to.file, gates_to_bytes(stored), self._to.recorded)
        return self._to.file

    def num_parameters(self) -> int:
        """Return the number of weights of the shared model."""
        return int(self.model.num_parameters())

    @torch.inference_mode()
    def shares(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Return the mean weight of each task over all gates and tokens of each row, shape [rows, tasks]."""
        self.layers.noted = {}
        try:
            inner = self.model.base_model
            inner(**placed(inner, input_ids, attention_mask), use_cache=False)
            return torch.stack(list(self.layers.noted.values())).mean(0).cpu()
        finally:
            self.layers.noted = None

    @torch.inference_mode()
    def logits(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Return the logits of every row, shape [rows, length, vocabulary]."""
        found: Tensor = self.model(**placed(self.model, input_ids, attention_mask), use_cache=False).logits
        return found

    def generate(self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Any:
        """Return what `generate` of transformers does; prompts are padded on the left."""
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        return self.model.generate(input_ids=input_ids, attention_mask=mask, **options)


def _linear_layers(model: Any, where: str) -> Sequence[str]:
    """Return the linear layers of the model's layers that may have parts."""
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    anatomy = infer_anatomy(shapes, model.config.to_dict())
    roles = ("attention", "mlp") if where == "all" else (where,)
    found = []
    for name, module in model.named_modules():
        part = anatomy.parts.get(f"{name}.weight")
        if part is None or not isinstance(module, torch.nn.Linear):
            continue
        if part.layer is not None and part.stack == anatomy.main and part.role in roles:
            found.append(name)
    return found
