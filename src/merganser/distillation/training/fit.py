"""Train one model: full or low-rank, from the start or from where a killed run stopped."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ...inference.libraries import quiet
from ..losses.gate import FusionGate
from . import libraries
from .batches import Lessons
from .objective import Objective
from .recipe import GATE, FusionRecipe
from .sequences import Example

__all__ = ["Fitted", "fit", "steps_of"]


@dataclass(frozen=True)
class Fitted:
    """A model after training.

    Args:
        model: The model, low-rank updates added to its weights, in float32.
        history: For some steps: `step`, `loss`, and its terms in nats per token.
    """

    model: Any
    history: list[dict[str, float]]


def steps_of(recipe: FusionRecipe, sequences: int) -> int:
    """Return the number of updates: as the recipe says, else one pass over the sequences."""
    return recipe.training.steps or math.ceil(sequences / recipe.training.batch)


def fit(
    model: Any,
    examples: Sequence[Example],
    recipe: FusionRecipe,
    folder: Path,
    *,
    control: bool,
    device: torch.device,
    resume: Path | None = None,
    words: torch.Tensor | None = None,
    step: Callable[[int, int], None],
    saved: Callable[[Path], None],
) -> Fitted:
    """Train a model.

    Args:
        model: The model, in float32; its weights change.
        examples: The sequences with their lessons.
        recipe: How.
        folder: Folder for the states of the Trainer.
        control: Whether the sources are ignored (lambda = 1); everything else is the same.
        device: Where to train.
        resume: State from which to go on; None to start.
        words: Which logits begin a word, if chunks are debiased.
        step: Called with the number of finished steps and of all.
        saved: Called with the folder of each state that is complete.

    Raises:
        NonFiniteError: The loss is not finite.
        UnsupportedError: A library is not installed.
    """
    from .trainer import FusionTrainer, Reporter

    with warnings.catch_warnings():
        # peft uses names that transformers 5 calls deprecated
        warnings.simplefilter("ignore", FutureWarning)
        make = partial(FusionTrainer, callbacks=[Reporter(step, saved)])
        return _fit(model, examples, recipe, folder, control, device, resume, words, make)


def _fit(
    model: Any,
    examples: Sequence[Example],
    recipe: FusionRecipe,
    folder: Path,
    control: bool,
    device: torch.device,
    resume: Path | None,
    words: torch.Tensor | None,
    make_trainer: Callable[..., Any],
) -> Fitted:
    torch.manual_seed(recipe.seed)
    if recipe.lora is not None:
        model = _with_lora(model, recipe.lora.rank, recipe.lora.alpha, folder)
    if recipe.training.gradient_checkpointing:
        # the form that needs no input with a gradient, which low-rank updates have not; transformers 5 has a new name for it
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    gate = FusionGate(len(recipe.sources)) if recipe.choice == GATE and not control else None
    objective = Objective(
        1.0 if control else recipe.lambda_, recipe.loss, recipe.choice, recipe.temperature, gate, words
    )
    with quiet():
        trainer = make_trainer(
            model,
            _arguments(recipe, folder, steps_of(recipe, len(examples)), device),
            Lessons(examples),
            len(recipe.sources),
            objective,
        )
        trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    found = trainer.model
    if recipe.lora is not None:
        found = found.merge_and_unload()
    keys = ("step", "loss", "text", "taught", "learning_rate", "grad_norm")
    history = [{key: own[key] for key in keys if key in own} for own in trainer.state.log_history if "loss" in own]
    return Fitted(found.eval(), history)


def _with_lora(model: Any, rank: int, alpha: float, folder: Path) -> Any:
    peft = libraries.peft()
    # peft looks for the config where the model says it comes from, and asks the Hub if it is not there
    model.config.save_pretrained(folder)
    model.name_or_path = str(folder)
    settings = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules="all-linear", task_type="CAUSAL_LM")
    return peft.get_peft_model(model, settings)


def _arguments(recipe: FusionRecipe, folder: Path, steps: int, device: torch.device) -> Any:
    own = recipe.training
    found = libraries.transformers().TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=own.batch // own.accumulate,
        gradient_accumulation_steps=own.accumulate,
        learning_rate=own.learning_rate,
        lr_scheduler_type="cosine",
        # rounded down: in a step of warmup the first learning rate is 0
        warmup_steps=int(own.warmup * steps),
        weight_decay=own.weight_decay,
        # as FuseLLM has it
        adam_beta2=0.95,
        bf16=own.dtype == "bfloat16",
        logging_steps=max(1, steps // 50),
        save_strategy="steps",
        save_steps=own.save_every,
        # the state before the last one stays until that is complete
        save_total_limit=2,
        seed=recipe.seed,
        use_cpu=device.type == "cpu",
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=device.type != "cpu",
    )
    if found.n_gpu > 1:
        # with several the Trainer would divide a batch among copies of the model, and lessons cannot be divided so
        found._n_gpu = 1
    return found
