"""Parts of a recipe as plain data, each with its reader: references, values of parameters, and keys that hold a mapping."""
