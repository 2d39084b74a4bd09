"""Merge while a model trains: a callback for the Trainer of transformers, and for those of TRL, which are made of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..engine.in_memory.running import Average
from ..engine.in_memory.state_dicts import State, merge_state_dicts, state_dict_of
from ..errors import NotFoundError, ParameterError, UnsupportedError
from .training import libraries

__all__ = ["MergeCallback"]

_STATE = "merge_callback.pt"


class MergeCallback(libraries.transformers().TrainerCallback):  # type: ignore[misc,name-defined,unused-ignore]
    """Merges the model that trains with its reference, or averages it over the run.

        callback = merganser.MergeCallback(every=100, reference=reference, method="linear", weight=[0.9, 0.1])
        trainer = Trainer(model, args, callbacks=[callback], ...)

    With a reference the model is replaced after every `every` steps by the merge of itself, the first model, and the reference,
    the second one; without, an average of the model after every `every` steps takes its place at the end of training. Moments
    of the optimiser stay as they are. The average is stored with every state of the Trainer, and continues with it, up to
    rounding to the dtype of the model.

    Args:
        every: Number of steps.
        reference: A module, or a state dict; None to average.
        method: The merge method, as in recipes.
        base: A module or state dict for methods that need a base.
        **parameters: Parameters of the method, as in `merge_state_dicts`.

    Raises:
        ParameterError: `every` is not a whole number of at least 1, or method, base or parameters are given without a reference.
        UnsupportedError: transformers is not installed.
        TypeError: The reference or the base is neither a module nor a state dict.
    """

    def __init__(
        self,
        every: int,
        reference: State | nn.Module | None = None,
        *,
        method: str = "linear",
        base: State | nn.Module | None = None,
        **parameters: Any,
    ) -> None:
        if not isinstance(every, int) or isinstance(every, bool) or every < 1:
            raise ParameterError(f"MergeCallback: every must be a whole number of at least 1, got {every!r}")
        if reference is None and (method != "linear" or base is not None or parameters):
            raise ParameterError(
                "MergeCallback: without a reference the model is averaged, which takes no method or parameters"
            )
        self.every = every
        self._method, self._parameters = method, parameters
        # copies: the caller may train the module itself
        self._reference, self._base = (
            None if own is None else _copied(state_dict_of(own, which))
            for own, which in ((reference, "reference"), (base, "base"))
        )
        self._average = Average()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refuse adapters, whose parts cannot be merged by themselves, and go on with a stored average."""
        if hasattr(kwargs.get("model"), "peft_config"):
            raise UnsupportedError("MergeCallback: the model has adapters of peft; merge them into it first")
        self._average = Average()
        if self._reference is None and state.global_step >= self.every:
            file = Path(args.output_dir, f"checkpoint-{state.global_step}", _STATE)
            if not file.exists():
                raise NotFoundError(
                    f"{file}: is missing, so that the average cannot be continued; resume from another checkpoint, or start "
                    "training again"
                )
            stored = torch.load(file, weights_only=True)
            self._average.update(stored["average"], stored["count"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Merge, or add to the average."""
        if state.global_step % self.every:
            return
        model = kwargs["model"]
        if self._reference is None:
            self._average.update(model)
            return
        device = next(model.parameters()).device
        others = [
            {name: tensor.to(device) for name, tensor in (own or {}).items()} for own in (self._reference, self._base)
        ]
        base = None if self._base is None else others[1]
        _replace(
            model, merge_state_dicts(self._method, [model, others[0]], base=base, integers="first", **self._parameters)
        )

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Store the average."""
        count = state.global_step // self.every
        if self._reference is None and count:
            file = Path(args.output_dir, f"checkpoint-{state.global_step}", _STATE)
            # a run that is killed meanwhile leaves no part of it
            beside = file.with_name(f".{_STATE}.new")
            torch.save({"average": self._average.state_dict(), "count": float(count)}, beside)
            beside.replace(file)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put the average in the model's place."""
        if self._reference is None and self._average.count:
            _replace(kwargs["model"], self._average.state_dict())


def _copied(state: State) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def _replace(model: nn.Module, merged: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            tensor.copy_(merged[name])
