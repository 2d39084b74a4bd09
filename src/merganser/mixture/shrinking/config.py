"""The keys of a config that depend on the number of experts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...anatomy.settings.mixtures import COUNTS, with_experts
from ...errors import CheckpointError, DataError, UnsupportedError

__all__ = ["Sizes", "choose_sizes", "sized_config"]


@dataclass(frozen=True, slots=True)
class Sizes:
    """How many experts there are, and will be.

    Args:
        before: Number of experts of a layer.
        after: Number of those of the output.
        chosen: How many compute each token.
        chosen_after: How many do in the output.
        parts: Number of groups that the router chooses among first; each is shrunk by itself.
    """

    before: int
    after: int
    chosen: int
    chosen_after: int
    parts: int

    @property
    def notes(self) -> list[str]:
        """What the user should know."""
        if self.chosen_after == self.chosen:
            return []
        return [f"experts per token: {self.chosen_after} in place of {self.chosen}"]


def choose_sizes(config: Any, before: int, after: int, per_token: int | None, name: str) -> Sizes:
    """Return the sizes of the output.

    Args:
        config: The config as transformers reads it.
        before: Number of experts in each layer.
        after: Number wanted.
        per_token: Number of experts per token wanted; None for what the model has, or all if these are fewer.
        name: The model's name for the user.

    Raises:
        CheckpointError: The config contradicts itself.
        DataError: A number is not possible.
        UnsupportedError: The config does not say how many experts compute a token.
    """
    text = config.get_text_config()
    chosen = getattr(text, "num_experts_per_tok", None)
    if not isinstance(chosen, int):
        raise UnsupportedError(f"{name}: its config does not say how many experts compute each token")
    if not 1 <= chosen <= before:
        raise CheckpointError(
            f"{name}: config.json says that {chosen} experts compute each token, and its layers have {before}"
        )
    if not 1 <= after <= before:
        raise DataError(f"--experts: must be 1 to {before}, as {name} has {before} experts per layer; found {after}")
    if per_token is not None and not 1 <= per_token <= after:
        raise DataError(f"--per-token: must be 1 to {after}, the experts of the output; found {per_token}")
    parts, open_parts = getattr(text, "n_group", None) or 1, getattr(text, "topk_group", None) or 1
    if parts > 1 and (after % parts or after < 2 * parts):
        raise DataError(
            f"--experts: {name} routes within {parts} groups of experts (n_group), so it must be a multiple of {parts}, "
            f"and at least {2 * parts}; found {after}"
        )
    reachable = after // parts * open_parts if parts > 1 else after
    if per_token is not None and per_token > reachable:
        raise DataError(
            f"--per-token: {name} chooses among {reachable} experts of the output at most; found {per_token}"
        )
    return Sizes(before, after, chosen, per_token or min(chosen, reachable), parts)


def sized_config(config: Mapping[str, Any], sizes: Sizes, name: str) -> dict[str, Any]:
    """Return config.json for the output.

    Raises:
        CheckpointError: It does not say how many experts there are.
    """
    found = with_experts(config, sizes.after, sizes.chosen_after)
    if found is None:
        raise CheckpointError(f"{name}: config.json does not say how many experts there are ({', '.join(COUNTS)})")
    return found
