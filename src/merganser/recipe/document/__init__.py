"""YAML with the place of every value, whatever it is about: read safely, and refused with its line."""
