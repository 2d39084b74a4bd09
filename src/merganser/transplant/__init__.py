"""Give a model the tokenizer of another one, or more tokens: rows of new tokens are made from rows that it has."""

from .run import plan_merged_tokens, plan_romanised, plan_transplant, transplant

__all__ = ["plan_merged_tokens", "plan_romanised", "plan_transplant", "transplant"]
