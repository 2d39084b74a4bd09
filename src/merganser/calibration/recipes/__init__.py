"""Make what a recipe's method or `align` needs from the data that the recipe names."""
