"""Tensors that training tools leave in a checkpoint and that no model class loads."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

from ...checkpoint import Checkpoint
from ...errors import CheckpointError
from ...recipe import ModelReference, Recipe
from ...wording import some

__all__ = ["without_leftovers"]

# Found by name only: importing transformers for every merge would take longer than planning one.
_LEFTOVERS: Mapping[str, re.Pattern[str]] = {
    "LoRA factors that were not merged into the weights": re.compile(
        r"\.(lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector)(\.|$)"
    ),
    "factors of an adapter that were not merged into the weights": re.compile(
        r"\.(ia3_l|hada_[wt]\d(_[ab])?|lokr_[wt]\d(_[ab])?|b?oft_[rRsS]|vera_lambda_[bd])(\.|$)"
    ),
    "base weights wrapped by an adapter": re.compile(r"\.base_layer\.(weight|bias)$"),
    "copies trained by an adapter": re.compile(r"\.(modules_to_save|original_module)\."),
    "a value head": re.compile(r"^(pretrained_model\.|model\.)?(v_head|value_head|critic_head)\."),
    "moving averages": re.compile(r"^(model_ema|ema_model|ema)\."),
    "weights and masks of pruning": re.compile(r"\.(weight|bias)_(orig|mask)$"),
    "flattened parameters of FSDP": re.compile(r"(^|\.)_?flat_param(_\d+)?$"),
    "the state of an optimizer": re.compile(r"^(optimizer|optimizer_state|lr_scheduler)\."),
}


_OTHER_HEADS = re.compile(r"^(score|classifier|qa_outputs|regression_head|reward_head)\.")


def without_leftovers(
    recipe: Recipe, reference: ModelReference, checkpoint: Checkpoint
) -> tuple[Checkpoint, list[str]]:
    """Return the checkpoint without tensors that no model class loads, and warnings that list them.

    Args:
        recipe: Its `unmatched` decides whether such tensors may be left out.
        reference: The checkpoint as the recipe names it.
        checkpoint: An input; returned unchanged if it has no config.json, as its model class is unknown.

    Raises:
        CheckpointError: There are such tensors and `unmatched` is "refuse", or there are no other tensors.
    """
    leftovers = _leftovers(tuple(checkpoint.tensors), _language_model(checkpoint.config))
    if not leftovers or not checkpoint.config:
        return checkpoint, []
    parts = "; ".join(f"{what}: {some(names)}" for what, names in leftovers.items())
    if recipe.unmatched == "refuse":
        raise CheckpointError(
            f"{recipe.place_of_model(reference)}: {reference}: holds tensors that no model class loads: {parts}. Merge adapters into the weights (merge_and_unload), or "
            "write 'unmatched: skip' into the recipe to leave these out"
        )
    left = {name for names in leftovers.values() for name in names}
    tensors = {name: tensor for name, tensor in checkpoint.tensors.items() if name not in left}
    if not tensors:
        raise CheckpointError(
            f"{recipe.place_of_model(reference)}: {reference}: holds only tensors that no model class loads: {parts}"
        )
    reasons = {name: f"no model class loads it: {what}" for what, names in leftovers.items() for name in names}
    reasons = {**checkpoint.left_out, **reasons}
    return replace(checkpoint, tensors=tensors, left_out=reasons), [
        f"{reference}: left out, since no model class loads them: {parts}"
    ]


def _language_model(config: Mapping[str, Any]) -> str | None:
    """Return the class name of a causal language model; None for other classes and for custom code."""
    architectures = config.get("architectures")
    name = str(architectures[0]) if isinstance(architectures, list) and architectures else ""
    return name if name.endswith(("ForCausalLM", "LMHeadModel")) and not config.get("auto_map") else None


@lru_cache(maxsize=1)  # the models of a merge mostly have the same names
def _leftovers(names: Sequence[str], architecture: str | None) -> Mapping[str, list[str]]:
    """Return the names of such tensors by what they are."""
    patterns = dict(_LEFTOVERS)
    if architecture:
        patterns[f"a head that {architecture} does not have"] = _OTHER_HEADS
    found = {what: [name for name in names if pattern.search(name)] for what, pattern in patterns.items()}
    return {what: matching for what, matching in found.items() if matching}
