"""MergeCallback: the model is merged with its reference, or averaged, while a Trainer runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import merganser
from merganser.distillation.callback import MergeCallback
from merganser.errors import MergeError, NotFoundError, ParameterError, UnsupportedError

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning:torch"),
    pytest.mark.usefixtures("little_to_collect"),
]


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3, 2)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        found = self.layer(x)
        return {"loss": (found - labels).square().mean(), "logits": found}


class Watch(MergeCallback):
    """Also keeps the weights before each merge and after it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.seen: list[tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        before = {name: own.clone() for name, own in kwargs["model"].state_dict().items()}
        super().on_step_end(args, state, control, **kwargs)
        self.seen.append((before, {name: own.clone() for name, own in kwargs["model"].state_dict().items()}))


def train(folder: Path, callback: MergeCallback, steps: int = 6, resume: str | None = None, stop: int = 0) -> Model:
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Stop(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == stop:
                raise KeyboardInterrupt

    generator = torch.Generator().manual_seed(1)
    data = [{"x": torch.randn(3, generator=generator), "labels": torch.ones(2)} for _ in range(12)]
    args = TrainingArguments(
        str(folder),
        max_steps=steps,
        per_device_train_batch_size=2,
        learning_rate=0.1,
        save_steps=4,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        logging_strategy="no",
    )
    model = Model()
    trainer = Trainer(model, args, train_dataset=data, callbacks=[callback, Stop()])
    try:
        trainer.train(resume_from_checkpoint=resume)
    except KeyboardInterrupt:
        assert stop
    return model


def test_with_a_reference(tmp_path: Path) -> None:
    reference = Model()
    callback = Watch(2, reference, weight=[0.75, 0.25])
    with torch.no_grad():
        # the callback has its own copy
        expected = {name: own.clone() for name, own in reference.state_dict().items()}
        reference.layer.weight.zero_()
    train(tmp_path, callback)
    for step, (before, after) in enumerate(callback.seen, 1):
        for name, own in before.items():
            wanted = own if step % 2 else 0.75 * own + 0.25 * expected[name]
            torch.testing.assert_close(after[name], wanted, rtol=1e-6, atol=1e-7)


@pytest.mark.slow
def test_the_average_and_its_continuation(tmp_path: Path) -> None:
    callback = Watch(2)
    model = train(tmp_path / "whole", callback)
    average = merganser.Average()
    for step, (before, after) in enumerate(callback.seen, 1):
        assert all(torch.equal(before[name], after[name]) for name in before)
        if step % 2 == 0:
            average.update(before)
    expected = average.state_dict()
    assert all(torch.equal(own, expected[name]) for name, own in model.state_dict().items())
    train(tmp_path / "cut", Watch(2), stop=5)
    again = train(tmp_path / "cut", Watch(2), resume=str(tmp_path / "cut" / "checkpoint-4"))
    for name, own in again.state_dict().items():
        torch.testing.assert_close(own, expected[name], rtol=1e-6, atol=1e-7)
    (tmp_path / "cut" / "checkpoint-4" / "merge_callback.pt").unlink()
    with pytest.raises(NotFoundError, match="is missing, so that the average cannot be continued"):
        train(tmp_path / "cut", Watch(2), resume=str(tmp_path / "cut" / "checkpoint-4"))


def test_what_is_refused() -> None:
    def refused(kind: type[Exception], match: str, *args: Any, **kwargs: Any) -> None:
        with pytest.raises(kind, match=match):
            MergeCallback(*args, **kwargs)

    refused(ParameterError, "every must be a whole number of at least 1, got 0", 0)
    refused(ParameterError, "every must be a whole number of at least 1, got 2.5", 2.5)
    refused(ParameterError, "without a reference the model is averaged", 1, method="ties")
    refused(TypeError, "reference: expected a state dict", 1, 3)
    model = Model()
    model.peft_config = {}  # type: ignore[assignment]
    callback = MergeCallback(1)
    with pytest.raises(UnsupportedError, match="the model has adapters of peft"):
        callback.on_train_begin(None, None, None, model=model)
    assert issubclass(UnsupportedError, MergeError)
