"""The search space: the free values of a recipe as dimensions."""
