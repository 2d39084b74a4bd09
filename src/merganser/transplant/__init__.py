"""Give a model the tokenizer of another one: rows of new tokens are made from rows that the model has."""

from .run import plan_romanised, plan_transplant, transplant

__all__ = ["plan_romanised", "plan_transplant", "transplant"]
