"""The Trainer of transformers with the loss of fusion."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import NonFiniteError
from . import libraries
from .batches import Lessons, collate, whole_batch
from .objective import Objective, Terms

__all__ = ["FusionTrainer"]

_TRANSFORMERS = libraries.transformers()
_GATE = "fusion_gate.pt"


class FusionTrainer(_TRANSFORMERS.Trainer):  # type: ignore[misc,name-defined,unused-ignore]
    """Trains a model on the predictions of sources; batches, states and resuming are those of the Trainer.

    Args:
        model: A causal language model.
        args: Training arguments, with `remove_unused_columns=False`.
        examples: The sequences with their lessons.
        sources: Number of sources.
        objective: The loss.
        callbacks: Further callbacks.
    """

    def __init__(
        self, model: Any, args: Any, examples: Lessons, sources: int, objective: Objective, callbacks: list[Any]
    ) -> None:
        self._objective = objective
        self._sums: dict[str, float] = {}
        super().__init__(
            model=model,
            args=args,
            train_dataset=examples,
            data_collator=partial(collate, sources=sources),
            # first: a state that is reported as complete has its gate
            callbacks=[_GateKeeper(objective), *callbacks],
        )
        self.remove_callback(_TRANSFORMERS.PrinterCallback)
        # the loss of a part is divided by the tokens of the whole batch here; the Trainer would divide it by the number of
        # parts, too, if the model's own loss took no such number
        self.model_accepts_loss_kwargs = True

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        """Tell every part of a batch what its loss must know of the others."""
        parts, count = super().get_batch_samples(*args, **kwargs)
        if parts:
            whole = whole_batch(parts)
            parts = [{**own, "whole": whole} for own in parts]
        return parts, count

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Add the parameters of the gate, if there is one, to those of the model."""
        optimizer = super().create_optimizer(*args, **kwargs)
        gate = self._objective.gate
        if gate is not None:
            gate.to(self.args.device)
            optimizer.add_param_group({"params": [*gate.parameters()], "weight_decay": 0.0})
        return optimizer

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Tensor | int | None = None
    ) -> Any:
        """Return the loss of a batch, or a part of one, per token of the batch.

        Raises:
            NonFiniteError: It is NaN or infinite.
        """
        outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False)
        whole = inputs["whole"]
        terms = self._objective(outputs.logits, inputs["input_ids"], inputs["labels"], inputs["lesson"], whole)
        loss = self._objective.total(terms, whole)
        if not bool(loss.isfinite()):
            raise NonFiniteError(
                f"step {self.state.global_step + 1}: the loss is not finite; a lower learning_rate may help"
            )
        self._count(terms)
        return (loss, outputs) if return_outputs else loss

    def _count(self, terms: Terms) -> None:
        for name, value in (("text", terms.text.detach()), ("taught", terms.taught.detach()), ("tokens", terms.tokens)):
            self._sums[name] = self._sums.get(name, 0.0) + float(value)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the means of both terms since the last time, in nats per token."""
        if "loss" in logs and self._sums.get("tokens"):
            tokens = self._sums.pop("tokens")
            logs = {**logs, **{name: value / tokens for name, value in self._sums.items()}}
            self._sums = {}
        super().log(logs, *args, **kwargs)


class _GateKeeper(_TRANSFORMERS.TrainerCallback):  # type: ignore[misc,name-defined,unused-ignore]
    """Does for the gate what the Trainer does for the model: clear gradients, store it with every state, read it back."""

    def __init__(self, objective: Objective) -> None:
        self._gate = objective.gate

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the gate."""
        if self._gate is not None:
            torch.save(self._gate.state_dict(), _checkpoint(args, state) / _GATE)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Clear its gradients."""
        if self._gate is not None:
            self._gate.zero_grad()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Read the gate of the state from which training goes on."""
        if self._gate is not None and state.global_step:
            self._gate.load_state_dict(torch.load(_checkpoint(args, state) / _GATE, weights_only=True))


class Reporter(_TRANSFORMERS.TrainerCallback):  # type: ignore[misc,name-defined,unused-ignore]
    """Reports steps, and states that are complete.

    Args:
        step: Called with the number of finished steps and of all.
        saved: Called with the folder of a state that is complete.
    """

    def __init__(self, step: Callable[[int, int], None], saved: Callable[[Path], None]) -> None:
        self._step, self._saved = step, saved

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Report a step."""
        self._step(state.global_step, state.max_steps)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Report a state."""
        self._saved(_checkpoint(args, state))


def _checkpoint(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"
